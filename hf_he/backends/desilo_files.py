"""Bytes of the DESILO backend's keys and ciphertexts: the library's own bytes inside the checked container."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_he.backends.base import Ciphertext, EvaluationKeys
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import CorruptFileError, WrongKeyError
from hf_he.serialization import pack, read_file, unpack_for, write_file

BACKEND = "desilo"
BOOTSTRAP_FILE = "desilo.keys"


def _metadata(parameters: CKKSParameters, key_id: str, **fields: str) -> dict[str, str]:
    described = {"backend": BACKEND, "parameters": json.dumps(parameters.to_dict()), "fingerprint": parameters.fingerprint}
    return {**described, "key_id": key_id, **fields}


def _array(data: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(bytes(data), dtype=np.uint8)


def _loaded(load: Callable[[bytes], Any], array: np.ndarray, kind: str) -> Any:
    try:
        return load(array.tobytes())
    except (RuntimeError, ValueError, TypeError):
        raise CorruptFileError(f"DESILO FHE does not accept the contents of this {kind} file: write it again with this version of hf_he") from None


def _garbled(kind: str) -> CorruptFileError:
    return CorruptFileError(f"this {kind} file misses or garbles a field: write it again with this version of hf_he")


def write_ciphertext(engine: Any, parameters: CKKSParameters, ct: Ciphertext) -> bytes:
    arrays = {str(i): _array(engine.serialize_ciphertext(item)) for i, item in enumerate(ct.payload.items)}
    arrays["shape"] = np.array(ct.batch_shape, dtype=np.int64)
    fields = {"level": str(ct.level), "scale": ct.scale.hex(), "components": str(ct.components), "pending": str(int(ct.payload.pending))}
    return pack("ciphertext", arrays, _metadata(parameters, ct.key_id, **fields))


def read_ciphertext(engine: Any, parameters: CKKSParameters, data: bytes) -> Ciphertext:
    from hf_he.backends.desilo import Values

    arrays, metadata = unpack_for(data, "ciphertext", BACKEND, parameters.fingerprint)
    try:
        level, scale, components = int(metadata["level"]), float.fromhex(metadata["scale"]), int(metadata["components"])
        pending, sizes = metadata["pending"] == "1", arrays["shape"]
        shape = tuple(int(size) for size in sizes)
        valid = sizes.dtype == np.int64 and sizes.ndim == 1 and all(size > 0 for size in shape) and len(shape) <= 8
        count = math.prod(shape)
        if not valid or set(arrays) != {"shape", *map(str, range(count))} or components not in (2, 3) or not pending <= level <= parameters.max_level:
            raise ValueError
        if not (math.isfinite(scale) and scale > 0 and math.log2(scale) <= parameters.log2_modulus(level)):
            raise ValueError
    except (KeyError, ValueError, OverflowError):
        raise _garbled("ciphertext") from None
    items = [_loaded(engine.deserialize_ciphertext, arrays[str(i)], "ciphertext") for i in range(count)]
    if any(item.level != level - pending or item.polynomial_count != components for item in items):
        raise _garbled("ciphertext")
    return Ciphertext(Values(items, pending), shape, level, scale, metadata["key_id"], components)


def write_evaluation_keys(engine: Any, parameters: CKKSParameters, keys: EvaluationKeys) -> bytes:
    held, steps = keys.payload, sorted(keys.rotations)
    arrays = {str(step): _array(engine.serialize_fixed_rotation_key(held.rotations[step])) for step in steps}
    arrays["relinearization"] = _array(engine.serialize_relinearization_key(held.relinearization))
    if keys.conjugation:
        arrays["conjugation"] = _array(engine.serialize_conjugation_key(held.conjugation))
    return pack("evaluation_keys", arrays, _metadata(parameters, keys.key_id))


def read_evaluation_keys(engine: Any, parameters: CKKSParameters, data: bytes) -> EvaluationKeys:
    from hf_he.backends.desilo import DesiloKeys

    kind = "evaluation_keys"
    arrays, metadata = unpack_for(data, kind, BACKEND, parameters.fingerprint)
    arrays = dict(arrays)
    try:
        relinearization = _loaded(engine.deserialize_relinearization_key, arrays.pop("relinearization"), kind)
        conjugating = arrays.pop("conjugation", None)
        steps = {int(name): name for name in arrays}
        if not all(0 < step < parameters.slots and str(step) == name for step, name in steps.items()):
            raise ValueError
    except (KeyError, ValueError):
        raise _garbled(kind) from None
    conjugation = None if conjugating is None else _loaded(engine.deserialize_conjugation_key, conjugating, kind)
    turned = {step: _loaded(engine.deserialize_fixed_rotation_key, arrays[name], kind) for step, name in steps.items()}
    payload = DesiloKeys(relinearization, turned, conjugation, fingerprint=parameters.fingerprint)
    return EvaluationKeys(payload, metadata["key_id"], frozenset(steps), conjugation is not None)


def write_key(parameters: CKKSParameters, kind: str, key_id: str, data: bytes | bytearray) -> bytes:
    return pack(kind, {"key": _array(data)}, _metadata(parameters, key_id))


def read_key(load: Callable[[bytes], Any], parameters: CKKSParameters, kind: str, data: bytes) -> tuple[str, Any]:
    """The key id and the key."""
    arrays, metadata = unpack_for(data, kind, BACKEND, parameters.fingerprint)
    if set(arrays) != {"key"}:
        raise _garbled(kind)
    return metadata["key_id"], _loaded(load, arrays["key"], kind)


def save_bootstrapping_keys(engine: Any, parameters: CKKSParameters, keys: EvaluationKeys, folder: Path) -> int:
    held = keys.bootstrapping
    arrays = {
        "conjugation": _array(engine.serialize_conjugation_key(held.conjugation)),
        "roll": _array(engine.serialize_roll_key(held.roll)),
        "small": _array(engine.serialize_small_bootstrap_key(held.small)),
    }
    data = pack("bootstrapping_keys", arrays, _metadata(parameters, keys.key_id))
    write_file(folder / BOOTSTRAP_FILE, data)
    return len(data)


def load_bootstrapping_keys(engine: Any, parameters: CKKSParameters, keys: EvaluationKeys, folder: Path) -> EvaluationKeys:
    from hf_he.backends.desilo import BootstrapKeys

    kind = "bootstrapping_keys"
    arrays, metadata = unpack_for(read_file(folder / BOOTSTRAP_FILE, "bootstrapping-key"), kind, BACKEND, parameters.fingerprint)
    if metadata["key_id"] != keys.key_id:
        raise WrongKeyError(f"the bootstrapping keys belong to key {metadata['key_id']}, the evaluation keys to {keys.key_id}: use one key folder")
    if set(arrays) != {"conjugation", "roll", "small"}:
        raise _garbled(kind)
    loaders = {
        "conjugation": engine.deserialize_conjugation_key,
        "roll": engine.deserialize_roll_key,
        "small": engine.deserialize_small_bootstrap_key,
    }
    return replace(keys, bootstrapping=BootstrapKeys(**{name: _loaded(load, arrays[name], kind) for name, load in loaders.items()}))
