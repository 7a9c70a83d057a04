"""Bytes of ciphertexts and keys in the container of hf_he.serialization, and defensive readers of them.

Residues modulo a prime of b bits take ceil(b/8) bytes, those of evaluation keys what they take in memory (`keys.pack_half`), so that a file can be
mapped and used where it is. Uniform halves (of evaluation keys, public keys, fresh ciphertexts encrypted under the secret
key) are stored as 32-byte seeds. Rows are in the engine's NTT order. Readers raise CorruptFileError, or ParameterError for another
backend or parameter set, and never allocate more than a small multiple of the file's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from hf_he.ckks.context import Context
from hf_he.ckks.keys import PublicKey, SecretKey, SwitchingKeys, expand_half, half_bytes, pack_half, residues_fit
from hf_he.ckks.random import SEED_BYTES, uniform, uniform_into
from hf_he.errors import CorruptFileError
from hf_he.serialization import pack, pack_residues, unpack_for, unpack_residues

BACKEND = "native"


def _metadata(context: Context, key_id: str, **more: str) -> dict[str, str]:
    parameters = context.parameters
    return {"backend": BACKEND, "parameters": json.dumps(parameters.to_dict()), "fingerprint": parameters.fingerprint, "key_id": key_id, **more}


def _open(context: Context, data: bytes, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    return unpack_for(data, kind, BACKEND, context.parameters.fingerprint)


def _garbled(kind: str, what: str) -> CorruptFileError:
    return CorruptFileError(f"this {kind} file misses or garbles {what}: write it again with this version of hf_he")


def _array(arrays: dict[str, np.ndarray], name: str, kind: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    """arrays[name], checked; None in `shape` matches any size."""
    found = arrays.get(name)
    if (
        found is None
        or found.dtype != dtype
        or found.ndim != len(shape)
        or any(want not in (None, size) for size, want in zip(found.shape, shape, strict=True))
    ):
        raise _garbled(kind, f"the array {name}")
    return found


def _only(arrays: dict[str, np.ndarray], kind: str, limbs: int, *others: str) -> None:
    """Raise unless `arrays` are the residues of `limbs` moduli and `others`, no more and no less."""
    if set(arrays) != {f"residues.{k}" for k in range(limbs)} | set(others):
        raise _garbled(kind, "its arrays")


def _pack_rows(values: np.ndarray, modulus: int) -> np.ndarray:
    """Residues within 0.6 q to their packed canonical form."""
    values = np.where(values > modulus // 2, values - modulus, values)
    return pack_residues(np.where(values < -(modulus // 2), values + modulus, values), modulus)


def _width(modulus: int) -> int:
    return ((modulus - 1).bit_length() + 7) // 8


def write_ciphertext(context: Context, residues: np.ndarray, seeds: np.ndarray | None, level: int, scale: float, key_id: str) -> bytes:
    """[*batch, C, L, N] residues; with `seeds` [*batch, 32] only component 0 is stored."""
    stored = residues if seeds is None else residues[..., :1, :, :]
    arrays = {f"residues.{k}": _pack_rows(stored[..., k, :], context.chain[k]) for k in range(residues.shape[-2])}
    if seeds is not None:
        arrays["seeds"] = seeds
    return pack("ciphertext", arrays, _metadata(context, key_id, level=str(level), scale=float(scale).hex(), components=str(residues.shape[-3])))


def read_ciphertext(context: Context, data: bytes) -> tuple[np.ndarray, np.ndarray | None, int, float, str]:
    """The inverse: residues, seeds or None, level, scale, key id."""
    kind = "ciphertext"
    arrays, metadata = _open(context, data, kind)
    try:
        level, scale, components = int(metadata["level"]), float.fromhex(metadata["scale"]), int(metadata["components"])
    except (KeyError, ValueError, OverflowError):
        raise _garbled(kind, "the level, scale or component count") from None
    parameters = context.parameters
    if not 0 <= level <= parameters.max_level or components not in (2, 3) or not (math.isfinite(scale) and scale > 0):
        raise _garbled(kind, "the level, scale or component count")
    if math.log2(scale) > parameters.log2_modulus(level):
        raise _garbled(kind, "the scale")
    seeds = arrays.get("seeds")
    _only(arrays, kind, level + 1, *({"seeds"} & set(arrays)))
    first = arrays["residues.0"]
    if first.ndim < 3:
        raise _garbled(kind, "the residues")
    batch = first.shape[:-3]
    stored = components if seeds is None else 1
    if seeds is not None:
        seeds = _array(arrays, "seeds", kind, np.uint8, (*batch, SEED_BYTES))
        if components != 2:
            raise _garbled(kind, "the component count")
    residues = np.empty((*batch, components, level + 1, context.ring_degree))
    for k in range(level + 1):
        packed = _array(arrays, f"residues.{k}", kind, np.uint8, (*batch, stored, context.ring_degree, _width(context.chain[k])))
        residues[..., :stored, k, :] = unpack_residues(packed, context.chain[k])
    if seeds is not None:
        for position in np.ndindex(*batch):
            seed = seeds[position].tobytes()
            for k in range(level + 1):
                uniform_into(seed, k, context.chain[k], residues[position][1, k])
    return residues, None if seeds is None else seeds.copy(), level, scale, metadata["key_id"]


def checked_half(context: Context, packed: np.ndarray, limbs: int, kind: str) -> np.ndarray:
    """`packed`, the b-half of a key in a file. Raises CorruptFileError for a residue that is none."""
    if not residues_fit(context, packed, limbs):
        raise CorruptFileError(f"a residue in this {kind} file is not below its modulus: write it again with this version of hf_he")
    return packed


def write_switching_keys(context: Context, keys: SwitchingKeys, rotations: frozenset[int], levels: Mapping[int, int], conjugation: bool, key_id: str) -> bytes:
    """Relinearisation, rotation and (optionally) conjugation keys, each for its level: the b-halves and the seeds of the a-halves."""
    steps = sorted(rotations)
    chosen = [0, *(keys.index[context.galois_element(s)] for s in steps)]
    if conjugation:
        chosen.append(keys.index[context.conjugation_element])
    reached = [levels.get(s, context.limbs - 1) for s in steps]
    arrays = {"rotations": np.array(steps, dtype=np.int64), "levels": np.array(reached, dtype=np.int64), "seeds": keys.seeds[chosen]}
    arrays |= {_key_name(i): keys.halves[key][0] for i, key in enumerate(chosen)}
    return pack("evaluation_keys", arrays, _metadata(context, key_id, conjugation=str(int(conjugation))))


def _key_name(i: int) -> str:
    return f"key.{i:05d}"


def read_switching_keys(context: Context, data: bytes) -> tuple[SwitchingKeys, frozenset[int], dict[int, int], bool, str]:
    """The inverse: keys, rotations, levels of those below the top, conjugation, key id.

    The keys read their b-halves where they are in `data`, which may be a mapped file and must not change; the others are regenerated.
    """
    kind = "evaluation_keys"
    arrays, metadata = _open(context, data, kind)
    if metadata.get("conjugation") not in ("0", "1"):
        raise _garbled(kind, "the conjugation flag")
    conjugation = metadata["conjugation"] == "1"
    rotations = _array(arrays, "rotations", kind, np.int64, (None,))
    if (np.diff(rotations, prepend=0) <= 0).any() or (rotations >= context.parameters.slots).any():
        raise _garbled(kind, "the list of rotations")
    levels = _array(arrays, "levels", kind, np.int64, rotations.shape)
    if ((levels < 0) | (levels >= context.limbs)).any():
        raise _garbled(kind, "the levels of the rotations")
    steps = rotations.tolist()
    limbs = [context.limbs, *(levels + 1).tolist(), *([context.limbs] * conjugation)]
    names = [_key_name(i) for i in range(len(limbs))]
    if set(arrays) != {"rotations", "levels", "seeds", *names}:
        raise _garbled(kind, "its arrays")
    seeds = _array(arrays, "seeds", kind, np.uint8, (len(limbs), SEED_BYTES))
    packed = [_array(arrays, name, kind, np.uint8, (half_bytes(context, count),)) for name, count in zip(names, limbs, strict=True)]
    index = {context.galois_element(s): i + 1 for i, s in enumerate(steps)}
    if conjugation:
        index[context.conjugation_element] = len(limbs) - 1
    keys = SwitchingKeys(context, limbs, index)
    for i, count in enumerate(limbs):
        seed = seeds[i].tobytes()
        keys.fill(i, seed, checked_half(context, packed[i], count, kind), pack_half(context, expand_half(context, seed, count)))
    reached = {s: int(level) for s, level in zip(steps, levels, strict=True) if level < context.limbs - 1}
    return keys, frozenset(steps), reached, conjugation, metadata["key_id"]


def write_public_key(context: Context, key: PublicKey) -> bytes:
    """b and the seed of a."""
    arrays = {f"residues.{k}": _pack_rows(key.b[k], q) for k, q in enumerate(context.parameters.moduli)}
    arrays["seed"] = np.frombuffer(key.seed, dtype=np.uint8)
    return pack("public_key", arrays, _metadata(context, key.key_id))


def read_public_key(context: Context, data: bytes) -> PublicKey:
    """The inverse."""
    kind = "public_key"
    arrays, metadata = _open(context, data, kind)
    _only(arrays, kind, len(context.parameters.moduli), "seed")
    seed = _array(arrays, "seed", kind, np.uint8, (SEED_BYTES,)).tobytes()
    b = np.stack(
        [unpack_residues(_array(arrays, f"residues.{k}", kind, np.uint8, (context.ring_degree, _width(q))), q) for k, q in enumerate(context.parameters.moduli)]
    )
    a = uniform(seed, context.parameters.moduli, context.ring_degree)
    return PublicKey(metadata["key_id"], context.parameters.fingerprint, seed, b, a)


def write_secret_key(context: Context, key: SecretKey) -> bytes:
    """The ternary coefficients: for a file only its owner can read."""
    return pack("secret_key", {"coefficients": key._coefficients}, _metadata(context, key.key_id))


def read_secret_key(context: Context, data: bytes) -> SecretKey:
    """The inverse."""
    kind = "secret_key"
    arrays, metadata = _open(context, data, kind)
    _only(arrays, kind, 0, "coefficients")
    coefficients = _array(arrays, "coefficients", kind, np.int8, (context.ring_degree,))
    if not ((coefficients >= -1) & (coefficients <= 1)).all() or not coefficients.any():
        raise _garbled(kind, "the coefficients")
    return SecretKey(context, coefficients, metadata["key_id"])
