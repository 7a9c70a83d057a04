"""Bytes of the FHElium backend's keys and ciphertexts: residues modulo each prime packed as everywhere, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_he.backends.base import Ciphertext, EvaluationKeys
from hf_he.backends.fhelium_bootstrap import CONJUGATION, LOWER, RAISE, RELINEARIZATION, FheliumBootstrapping, FheliumEvaluator, KeyPart
from hf_he.backends.fhelium_keys import HOST, FheliumKeys, FheliumPublicKey, FheliumSecretKey
from hf_he.ckks.bootstrapping.keys import rotation_limbs
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import CorruptFileError, WrongKeyError
from hf_he.serialization import pack, pack_residues, read_file, unpack_for, unpack_residues, write_file

BACKEND = "fhelium"
BOOTSTRAPPING = "bootstrapping_keys"


def _metadata(parameters: CKKSParameters, key_id: str, **fields: str) -> dict[str, str]:
    described = {"backend": BACKEND, "parameters": json.dumps(parameters.to_dict()), "fingerprint": parameters.fingerprint}
    return {**described, "key_id": key_id, **fields}


def _garbled(kind: str) -> CorruptFileError:
    return CorruptFileError(f"this {kind} file misses or garbles a field: write it again with this version of hf_he")


def _chain(parameters: CKKSParameters) -> tuple[int, ...]:
    """All moduli in FHElium's order: from the top level down, then the special ones."""
    return (*reversed(parameters.moduli), *parameters.special_moduli)


def _packed(name: str, data: torch.Tensor, moduli: tuple[int, ...]) -> dict[str, np.ndarray]:
    """[..., limbs, N] int64 residues, one array per limb."""
    arrays = {}
    for k, modulus in enumerate(moduli):
        row = data[..., k, :].remainder(modulus).cpu().numpy()
        arrays[f"{name}.{k}"] = pack_residues(np.where(row > modulus // 2, row - modulus, row), modulus)
    return arrays


def _unpacked(
    arrays: dict[str, np.ndarray], name: str, shape: tuple[int, ...] | None, moduli: tuple[int, ...], degree: int, device: torch.device
) -> torch.Tensor:
    """The inverse; `shape` of the leading axes, or None for any. Raises ValueError or CorruptFileError."""
    rows = []
    for k, modulus in enumerate(moduli):
        row = unpack_residues(arrays.pop(f"{name}.{k}"), modulus)
        shape = row.shape[:-1] if shape is None else shape
        if row.shape != (*shape, degree):
            raise ValueError
        rows.append(np.where(row < 0, row + modulus, row).astype(np.int64))
    return torch.from_numpy(np.stack(rows, axis=-2)).to(device)


def _open(parameters: CKKSParameters, data: bytes, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    arrays, metadata = unpack_for(data, kind, BACKEND, parameters.fingerprint)
    return dict(arrays), metadata


def _read(kind: str, read: Any) -> Any:
    """A reader that turns what is missing or of a wrong shape into CorruptFileError, and refuses arrays it did not use."""

    def reader(parameters: CKKSParameters, device: torch.device, data: bytes) -> Any:
        arrays, metadata = _open(parameters, data, kind)
        try:
            item = read(parameters, device, arrays, metadata)
        except (KeyError, ValueError, OverflowError):
            raise _garbled(kind) from None
        if arrays:
            raise _garbled(kind)
        return item

    return reader


def write_ciphertext(parameters: CKKSParameters, ct: Ciphertext) -> bytes:
    moduli = _chain(parameters)[parameters.max_level - ct.level : parameters.max_level + 1]
    fields = {"level": str(ct.level), "scale": ct.scale.hex(), "components": str(ct.components)}
    return pack("ciphertext", _packed("residues", ct.payload, moduli), _metadata(parameters, ct.key_id, **fields))


def _ciphertext(parameters: CKKSParameters, device: torch.device, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Ciphertext:
    level, scale, components = int(metadata["level"]), float.fromhex(metadata["scale"]), int(metadata["components"])
    if not 0 <= level <= parameters.max_level or components not in (2, 3) or not (math.isfinite(scale) and scale > 0):
        raise ValueError
    if math.log2(scale) > parameters.log2_modulus(level):
        raise ValueError
    moduli = _chain(parameters)[parameters.max_level - level : parameters.max_level + 1]
    data = _unpacked(arrays, "residues", None, moduli, parameters.ring_degree, device)
    if data.ndim < 3 or data.shape[0] != components:
        raise ValueError
    return Ciphertext(data, tuple(data.shape[1:-2]), level, scale, metadata["key_id"], components)


def write_evaluation_keys(parameters: CKKSParameters, keys: EvaluationKeys) -> bytes:
    held = keys.payload
    steps = sorted(keys.rotations)
    switching = [held.relinearization, *(held.rotations[step] for step in steps), *([held.conjugation] if keys.conjugation else [])]
    arrays = _packed("keys", torch.stack([key.data for key in switching]), _chain(parameters))
    arrays["rotations"] = np.array(steps, dtype=np.int64)
    return pack("evaluation_keys", arrays, _metadata(parameters, keys.key_id, conjugation=str(int(keys.conjugation))))


def _evaluation_keys(parameters: CKKSParameters, device: torch.device, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> EvaluationKeys:
    from fhelium import ConjugationKey, RelinearizationKey, RotationKey

    rotations = arrays.pop("rotations")
    if rotations.dtype != np.int64 or rotations.ndim != 1 or (np.diff(rotations, prepend=0) <= 0).any() or (rotations >= parameters.slots).any():
        raise ValueError
    if metadata["conjugation"] not in ("0", "1"):
        raise ValueError
    conjugation = metadata["conjugation"] == "1"
    steps = rotations.tolist()
    digits = -(-len(parameters.moduli) // parameters.digit_size)
    shape = (1 + len(steps) + conjugation, digits, 2)
    data = _unpacked(arrays, "keys", shape, _chain(parameters), parameters.ring_degree, HOST)
    primes = tuple(range(len(_chain(parameters))))
    turned = {step: RotationKey(data=data[i], prime_ids=primes, rotation_step=-step % parameters.slots) for i, step in enumerate(steps, start=1)}
    conjugating = ConjugationKey(data=data[-1], prime_ids=primes) if conjugation else None
    payload = FheliumKeys(RelinearizationKey(data=data[0], prime_ids=primes), turned, conjugating, fingerprint=parameters.fingerprint)
    return EvaluationKeys(payload, metadata["key_id"], frozenset(steps), conjugation)


def write_public_key(parameters: CKKSParameters, key: FheliumPublicKey) -> bytes:
    return pack("public_key", _packed("residues", key.key.data, tuple(reversed(parameters.moduli))), _metadata(parameters, key.key_id))


def _public(parameters: CKKSParameters, device: torch.device, arrays: dict[str, np.ndarray], name: str) -> Any:
    from fhelium import PublicKey

    moduli = tuple(reversed(parameters.moduli))
    return PublicKey(_unpacked(arrays, name, (2,), moduli, parameters.ring_degree, device), tuple(range(len(moduli))))


def _public_key(parameters: CKKSParameters, device: torch.device, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> FheliumPublicKey:
    return FheliumPublicKey(metadata["key_id"], parameters.fingerprint, _public(parameters, device, arrays, "residues"))


def write_secret_key(parameters: CKKSParameters, key: FheliumSecretKey) -> bytes:
    arrays = _packed("secret", key.secret.data, _chain(parameters)) | _packed("public", key.public.data, tuple(reversed(parameters.moduli)))
    return pack("secret_key", arrays, _metadata(parameters, key.key_id))


def _secret_key(parameters: CKKSParameters, device: torch.device, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> FheliumSecretKey:
    from fhelium import SecretKey

    chain = _chain(parameters)
    secret = SecretKey(_unpacked(arrays, "secret", (), chain, parameters.ring_degree, device), tuple(range(len(chain))))
    return FheliumSecretKey(metadata["key_id"], parameters.fingerprint, secret, _public(parameters, device, arrays, "public"))


def _key_types(bootstrapping: FheliumBootstrapping) -> dict[str, tuple[FheliumEvaluator, Any]]:
    """Name of each bootstrapping key, where it is used, and what makes it of data and prime ids."""
    from fhelium import ConjugationKey, KeySwitchKey, RelinearizationKey, RotationKey

    full, plan = bootstrapping.full, bootstrapping.plan
    turned = {str(step): (full, partial(RotationKey, rotation_step=-step % plan.parameters.slots)) for step in rotation_limbs(plan)}
    others = {RELINEARIZATION: (full, RelinearizationKey), CONJUGATION: (full, ConjugationKey), RAISE: (full, KeySwitchKey)}
    return others | {LOWER: (bootstrapping.small, KeySwitchKey)} | turned


def write_bootstrapping_keys(bootstrapping: FheliumBootstrapping, parts: Iterator[KeyPart], key_id: str, folder: Path) -> int:
    """One file per key; returns the bytes written."""
    types, written, parameters = _key_types(bootstrapping), 0, bootstrapping.plan.parameters
    for name, key in parts:
        data = pack(BOOTSTRAPPING, _packed("key", key.data, _chain(types[name][0].parameters)), _metadata(parameters, key_id, name=name))
        write_file(folder / f"{name}.key", data)
        written += len(data)
    return written


def read_bootstrapping_keys(bootstrapping: FheliumBootstrapping, key_id: str, folder: Path) -> Iterator[KeyPart]:
    """Every key of the plan. Raises CorruptFileError, ParameterError or WrongKeyError."""
    parameters = bootstrapping.plan.parameters
    for name, (evaluator, make) in _key_types(bootstrapping).items():
        arrays, metadata = _open(parameters, read_file(folder / f"{name}.key", "bootstrapping-key"), BOOTSTRAPPING)
        if metadata["key_id"] != key_id:
            raise WrongKeyError(f"the bootstrapping keys belong to key {metadata['key_id']}, the evaluation keys to {key_id}: use one key folder")
        chain = _chain(evaluator.parameters)
        try:
            data = _unpacked(arrays, "key", (evaluator.engine.key_digit_count, 2), chain, parameters.ring_degree, HOST)
        except (KeyError, ValueError):
            raise _garbled(BOOTSTRAPPING) from None
        if arrays or metadata.get("name") != name:
            raise _garbled(BOOTSTRAPPING)
        yield KeyPart(name, make(data=data, prime_ids=tuple(range(len(chain)))))


READERS = {
    "ciphertext": _read("ciphertext", _ciphertext),
    "evaluation_keys": _read("evaluation_keys", _evaluation_keys),
    "public_key": _read("public_key", _public_key),
    "secret_key": _read("secret_key", _secret_key),
}
