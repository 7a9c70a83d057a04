"""Bootstrapping keys on disk: a folder of containers, one per key, written one after another and read through memory maps.

At N = 2^16 a key takes 60 MB: the half that is not pseudo-random, in ceil(b/8) bytes per residue, and the seed of the other half. Neither
side ever holds more than one key beyond the keys themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hf_he.ckks.bootstrapping.keys import BootstrappingKeys, ephemeral_parameters, galois_elements
from hf_he.ckks.bootstrapping.plan import BootstrapPlan
from hf_he.ckks.context import Context, context_for
from hf_he.ckks.files import BACKEND, _pack_rows, _width
from hf_he.ckks.keys import SwitchingKeys
from hf_he.ckks.random import SEED_BYTES
from hf_he.errors import CorruptFileError
from hf_he.serialization import pack, unpack_for, unpack_residues, write_file

KIND = "bootstrapping_key"
_GALOIS, _RAISE, _LOWER = "galois", "raise", "lower"


def _file_name(group: str, i: int) -> str:
    return f"{group}-{i:03d}.key"


def _parts(plan: BootstrapPlan) -> dict[str, tuple[Context, dict[int, int]]]:
    """Context and Galois index of each group of keys; key 0 of a group belongs to no automorphism."""
    full, small = context_for(plan.full), context_for(ephemeral_parameters(plan))
    return {_GALOIS: (full, {g: i + 1 for i, g in enumerate(galois_elements(plan))}), _RAISE: (full, {}), _LOWER: (small, {})}


def save(keys: BootstrappingKeys, plan: BootstrapPlan, key_id: str, folder: str | Path) -> int:
    """Write the keys under `folder` (created if missing); returns their size in bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for (group, (context, _)), part in zip(_parts(plan).items(), (keys.galois, keys.raise_key, keys.lower_key), strict=True):
        for i in range(len(part.residues)):
            arrays = {f"residues.{k}": _pack_rows(part.half(i, k), q) for k, q in enumerate(context.chain)}
            arrays["seed"] = part.seeds[i]
            metadata = {"backend": BACKEND, "parameters": json.dumps(plan.parameters.to_dict()), "fingerprint": plan.parameters.fingerprint}
            data = pack(KIND, arrays, {**metadata, "key_id": key_id, "group": group, "index": str(i)})
            write_file(folder / _file_name(group, i), data)
            total += len(data)
    return total


def load(plan: BootstrapPlan, folder: str | Path) -> tuple[BootstrappingKeys, str]:
    """The keys of a folder and their key id. Raises CorruptFileError for a missing or damaged file, ParameterError for other parameters."""
    ids: set[str] = set()
    groups = []
    for group, (context, index) in _parts(plan).items():
        keys = SwitchingKeys.allocate(context, 1 + len(index), index)
        a, b = np.empty((2, context.dnum, len(context.chain), context.ring_degree))
        for i in range(1 + len(index)):
            ids.add(_read(Path(folder) / _file_name(group, i), group, i, context, plan.parameters.fingerprint, keys, b))
            keys.expand(context, i, a)
            keys.fill(i, b, a)
        groups.append(keys)
    if len(ids) != 1:
        raise CorruptFileError(f"{folder} mixes the bootstrapping keys of several secret keys: make them again with `hf-he keygen --bootstrapping`")
    return BootstrappingKeys(*groups, plan.parameters.fingerprint), ids.pop()


def _read(path: Path, group: str, i: int, context: Context, fingerprint: str, keys: SwitchingKeys, b: np.ndarray) -> str:
    """Seed of key i and its stored half into b [digit, modulus, N]; returns the key id."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path.name} cannot be read ({error}): make the bootstrapping keys again with `hf-he keygen --bootstrapping`") from None
    arrays, metadata = unpack_for(memoryview(data), KIND, BACKEND, fingerprint)
    shapes = {f"residues.{k}": (context.dnum, context.ring_degree, _width(q)) for k, q in enumerate(context.chain)} | {"seed": (SEED_BYTES,)}
    shaped = {key: array.shape for key, array in arrays.items()} == shapes and all(array.dtype == np.uint8 for array in arrays.values())
    if not shaped or metadata.get("group") != group or metadata.get("index") != str(i):
        raise CorruptFileError(f"{path.name} does not hold the key its name says: make the bootstrapping keys again with `hf-he keygen --bootstrapping`")
    for k, q in enumerate(context.chain):
        b[:, k] = unpack_residues(arrays[f"residues.{k}"], q)
    keys.seeds[i] = arrays["seed"]
    return metadata["key_id"]
