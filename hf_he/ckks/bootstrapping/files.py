"""Bootstrapping keys on disk: a folder of containers, one per key, written one after another and memory-mapped.

At N = 2^16 a key takes 60 MB: the half that is not pseudo-random, as the kernels read it, and the seed of the other half. `write` makes keys and never
holds more than one. `load` maps each file read-only after checking its size, header, checksum and residues, and regenerates the other halves in memory:
processes that use one folder share the mapped half. Files are written under another name and renamed (hf_he.serialization.write_file), and are read-only
themselves: one that is replaced or deleted while it is mapped stays what it was. Only a program that truncates it in place can end the process
(SIGBUS), as with any mapped library or checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hf_he.ckks.bootstrapping.keys import GALOIS, LOWER, RAISE, BootstrappingKeys, KeyPart, key_groups
from hf_he.ckks.bootstrapping.plan import MIN_PERIOD, BootstrapPlan
from hf_he.ckks.files import BACKEND, checked_half
from hf_he.ckks.keys import expand_half, half_bytes, pack_half
from hf_he.ckks.parameters import CKKSParameters
from hf_he.ckks.random import SEED_BYTES
from hf_he.errors import CorruptFileError
from hf_he.serialization import map_file, pack, unpack_for, write_file

KIND = "bootstrapping_key"
_AGAIN = "make the bootstrapping keys again with `hf-he keygen --bootstrapping`"


def _file_name(group: str, i: int) -> str:
    return f"{group}-{i:03d}.key"


def write(parts: Iterable[KeyPart], plan: BootstrapPlan, key_id: str, folder: str | Path) -> int:
    """Write keys under `folder` (created if missing) as they come; returns their size in bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"backend": BACKEND, "parameters": json.dumps(plan.parameters.to_dict()), "fingerprint": plan.parameters.fingerprint, "key_id": key_id}
    metadata["period"] = str(plan.period)
    total = 0
    for part in parts:
        arrays = {"half": part.b, "seed": np.frombuffer(part.seed, dtype=np.uint8)}
        data = pack(KIND, arrays, {**metadata, "group": part.group, "index": str(part.index)})
        write_file(folder / _file_name(part.group, part.index), data, mapped=True)
        total += len(data)
    return total


def save(keys: BootstrappingKeys, plan: BootstrapPlan, key_id: str, folder: str | Path) -> int:
    """Write keys that are in memory or mapped; returns their size in bytes."""
    held = {GALOIS: keys.galois, RAISE: keys.raise_key, LOWER: keys.lower_key}
    parts = (KeyPart(name, i, part.seeds[i].tobytes(), *halves) for name, part in held.items() for i, halves in enumerate(part.halves))
    return write(parts, plan, key_id, folder)


def load(parameters: CKKSParameters, folder: str | Path) -> tuple[BootstrappingKeys, str]:
    """The keys of a folder and their key id. Raises CorruptFileError for a missing or damaged file, ParameterError for other parameters."""
    plan = BootstrapPlan(parameters, _period(parameters, Path(folder) / _file_name(GALOIS, 0)))
    ids: set[str] = set()
    keys = BootstrappingKeys.collect(plan, _parts(plan, Path(folder), ids))
    if len(ids) != 1:
        raise CorruptFileError(f"{folder} mixes the bootstrapping keys of several secret keys: {_AGAIN}")
    return keys, ids.pop()


def _period(parameters: CKKSParameters, path: Path) -> int:
    """The distinct slots a folder's keys are for, as its first key says."""
    _, metadata = unpack_for(_mapped(path), KIND, BACKEND, parameters.fingerprint)
    possible = {str(MIN_PERIOD << i): MIN_PERIOD << i for i in range((parameters.slots // MIN_PERIOD).bit_length())}
    if metadata.get("period") not in possible:
        raise CorruptFileError(f"{path.name} does not say how many slots it is for: {_AGAIN}")
    return possible[metadata["period"]]


def _mapped(path: Path) -> memoryview:
    try:
        return map_file(path, "bootstrapping-key")
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}: {_AGAIN}") from None


def _parts(plan: BootstrapPlan, folder: Path, ids: set[str]) -> Iterator[KeyPart]:
    """The keys of a folder, one at a time; their key ids go into `ids`."""
    for group, (context, limbs, _) in key_groups(plan).items():
        for i, count in enumerate(limbs):
            path = folder / _file_name(group, i)
            arrays, metadata = unpack_for(_mapped(path), KIND, BACKEND, plan.parameters.fingerprint)
            shapes = {"half": (half_bytes(context, count),), "seed": (SEED_BYTES,)}
            shaped = {name: array.shape for name, array in arrays.items()} == shapes and all(array.dtype == np.uint8 for array in arrays.values())
            if not shaped or metadata.get("group") != group or metadata.get("index") != str(i) or metadata.get("period") != str(plan.period):
                raise CorruptFileError(f"{path.name} does not hold the key its name says: {_AGAIN}")
            ids.add(metadata["key_id"])
            seed = arrays["seed"].tobytes()
            b = checked_half(context, arrays["half"], count, KIND)
            yield KeyPart(group, i, seed, b, pack_half(context, expand_half(context, seed, count)))
