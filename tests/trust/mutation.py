"""Seeded mutations of hf_he containers, and the rule every reader is held to.

`damaged` spoils bytes, so that the checksum must find it. `sealed` spoils arrays, metadata or the tensor table and writes the checksum
anew, as somebody who knows the format would, so that the checks behind the checksum are exercised.
"""

import hashlib
import json
import os
import random
from collections import Counter
from contextlib import contextmanager

import numpy as np

from hf_he.errors import HEError
from hf_he.serialization import unpack

SEED = int(os.environ.get("HF_HE_FUZZ_SEED", "20260722"))

STRINGS = (
    "", "0", "1", "2", "3", "-1", "99", "1000000", "9" * 5000, "1e400", "nan", "inf", "-inf", "0x1p+40", "0x1p-1000", "0x1p+2000000", "0x" + "f" * 4000, "1_0",
    " 1 ", "٣", "²", "\x00", "\ud800", "native", "simulator", "auto", "0" * 16, "g" * 16, "0123456789abcdef\n", "../../../../etc/passwd",
    "null", "[]", "{}", "7", '"x"', "[" * 100_000, '{"a":' * 50_000, '{"ring_degree": NaN}', "A" * 100_000,
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 1024, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 2**200, -(2**63), 1.0, 0.5, -0.0, float("nan"), float("inf"), True, None, "8", [], {})


def generator(*names: object) -> random.Random:
    """Deterministic per test: derived from SEED and `names`."""
    return random.Random(f"{SEED} {names}")


class Outcomes(Counter):
    """How many inputs of each kind were tried, accepted and refused (by class)."""

    @contextmanager
    def expect(self, description: str, must_fail: bool = False):
        """Only an hf_he error may leave the block; with `must_fail` one has to."""
        self["inputs"] += 1
        try:
            yield
        except HEError as error:
            self[type(error).__name__] += 1
            assert len(str(error)) < 2000 and str(error).isprintable(), f"{description}: message repeats its input: {str(error)[:200]!r}"
            return
        except BaseException as error:
            raise AssertionError(f"{description} (HF_HE_FUZZ_SEED={SEED}): {type(error).__name__}: {str(error)[:300]}") from error
        assert not must_fail, f"{description} (HF_HE_FUZZ_SEED={SEED}): was accepted"
        self["accepted"] += 1


def damaged(data: bytes, rng: random.Random, others: tuple[bytes, ...] = ()) -> tuple[str, bytes]:
    """Bytes that differ from `data` and from every valid container."""
    how = rng.choice(("flip", "flip header", "byte", "truncate", "extend", "cut out", "double", "length", "swap header", "noise"))
    header = 8 + int.from_bytes(data[:8], "little")
    out = bytearray(data)
    if how in ("flip", "flip header"):
        for _ in range(rng.choice((1, 1, 2, 8))):
            out[rng.randrange(len(out) if how == "flip" else min(header, len(out)))] ^= 1 << rng.randrange(8)
    elif how == "byte":
        out[rng.randrange(len(out))] ^= rng.randrange(1, 256)
    elif how == "truncate":
        del out[rng.randrange(len(out)) :]
    elif how == "extend":
        out += rng.randbytes(rng.choice((1, 8, 1000)))
    elif how == "cut out":
        start = rng.randrange(len(out) - 1)
        del out[start : start + rng.randrange(1, 100)]
    elif how == "double":
        out += data
    elif how == "length":
        out[:8] = rng.choice((0, 1, header - 9, header - 7, len(data), 2**24, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    elif how == "swap header" and others:
        other = rng.choice(others)
        out = bytearray(other[: 8 + int.from_bytes(other[:8], "little")] + data[header:])
    else:
        out = bytearray(rng.randbytes(rng.randrange(0, 300)))
    if out == data or bytes(out) in others:
        out.append(0)
    return how, bytes(out)


def sealed(data: bytes, kind: str, rng: random.Random) -> tuple[str, bytes]:
    """A container of `kind` with a right checksum and one to three wrong entries."""
    arrays, metadata = unpack(data, kind)
    arrays = {name: np.array(value) for name, value in arrays.items()}
    steps = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if metadata and rng.random() < 0.5:
            steps.append(_change_metadata(metadata, rng))
        elif arrays:
            steps.append(_change_array(arrays, rng))
    if rng.random() < 0.2:
        how, forged = _change_table(arrays, metadata, kind, rng)
        return f"sealed {steps} {how}", forged
    table, body = table_of(arrays)
    return f"sealed {steps}", seal(kind, table, body, metadata)


def table_of(arrays: dict[str, np.ndarray]) -> tuple[dict, bytes]:
    """Tensor table and body of a container, written independently of hf_he.serialization."""
    names = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "float16": "F16", "float32": "F32", "float64": "F64"}
    names |= {f"{sign}int{bits}": f"{sign.upper() or 'I'}{bits}" for sign in ("u", "") for bits in (16, 32, 64)}
    table, body = {}, b""
    for name, array in arrays.items():
        table[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    return table, body


def seal(kind: str, table: dict, body: bytes, metadata: dict) -> bytes:
    """Header and checksum around a tensor table, true or not."""
    described = metadata | {"hf_he.format": "1", "hf_he.kind": kind}
    head = json.dumps([described, table], sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(len(head).to_bytes(8, "little") + head + body).hexdigest()
    header = json.dumps({"__metadata__": described | {"hf_he.sha256": digest}, **table}).encode()
    return len(header).to_bytes(8, "little") + header + body


def json_value(value: object, rng: random.Random, depth: int = 0) -> object:
    """A JSON document like `value` with one entry, at any depth, replaced, removed or added."""
    if isinstance(value, dict) and value and depth < 3:
        key, what = rng.choice(sorted(value)), rng.randrange(4)
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return value | {rng.choice(("x", "__class__", "insecure")): rng.choice(NUMBERS)}
        return value | {key: json_value(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and depth < 3 and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return rng.choice((value[:index], value + value, [*value[:index], json_value(value[index], rng, depth + 1), *value[index + 1 :]], value[::-1]))
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-2, -1, 1, 2, value, 2**20))
    return rng.choice((*NUMBERS, *(s for s in STRINGS if len(s) < 10_000), [[[[]]]] * 3, {"a": {"b": []}}))


def _change_metadata(metadata: dict[str, str], rng: random.Random) -> str:
    key = rng.choice(sorted(metadata))
    what = rng.randrange(6)
    if what == 0:
        del metadata[key]
    elif what == 1:
        metadata[key] = metadata[rng.choice(sorted(metadata))]
    elif what == 2 and metadata[key]:
        text = list(metadata[key])
        text[rng.randrange(len(text))] = chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x10FFFF))))
        metadata[key] = "".join(text)
    elif what == 3 and "parameters" in metadata:
        key = "parameters"
        try:
            metadata[key] = json.dumps(json_value(json.loads(metadata[key]), rng))
        except (ValueError, RecursionError):
            metadata[key] = ""
    else:
        metadata[key] = rng.choice(STRINGS)
    return f"metadata {key} {what}"


def _change_array(arrays: dict[str, np.ndarray], rng: random.Random) -> str:
    name = rng.choice(sorted(arrays))
    array, how = arrays[name], rng.choice(("drop", "rename", "dtype", "axis", "cut", "extend", "fill", "entry", "empty", "swap", "reinterpret", "transpose"))
    if how == "drop":
        del arrays[name]
    elif how == "rename":
        arrays[rng.choice(("x", "residues.99", "seeds", "residues.0", "rotations", name + " "))] = arrays.pop(name)
    elif how == "dtype":
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(rng.choice((bool, np.uint8, np.int8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64)))
    elif how == "axis":
        arrays[name] = rng.choice((array.reshape(-1), array[None], array[..., None], array[None, None, None]))
    elif how == "cut" and array.ndim and array.size:
        axis = rng.randrange(array.ndim)
        arrays[name] = np.take(array, range(rng.randrange(array.shape[axis])), axis)
    elif how == "extend" and array.ndim and array.size:
        arrays[name] = np.repeat(array, 2, rng.randrange(array.ndim))
    elif how == "fill":
        arrays[name] = _filled(array, rng)
    elif how == "entry" and array.size:
        array.reshape(-1)[rng.randrange(array.size)] = _extreme(array.dtype, rng)
    elif how == "empty":
        arrays[name] = np.zeros(rng.choice(((0,), (), (0, *array.shape), (3, 0), (0, 2**40), (2**20, 0, 2**20))), array.dtype)
    elif how == "swap":
        other = rng.choice(sorted(arrays))
        arrays[name], arrays[other] = arrays[other], array
    elif how == "reinterpret" and array.nbytes % 8 == 0 and array.ndim:
        arrays[name] = array.reshape(-1).view(rng.choice((np.float64, np.int64, np.uint16, np.int8)))
    else:
        arrays[name] = np.ascontiguousarray(array.T)
    return f"array {name} {how}"


def _extreme(dtype: np.dtype, rng: random.Random) -> object:
    if dtype.kind == "f":
        return rng.choice((np.nan, np.inf, -np.inf, 0.5, 1e300, -1e-300)) if dtype.itemsize == 8 else np.nan
    if dtype.kind == "b":
        return True
    limits = np.iinfo(dtype)
    return rng.choice((limits.min, limits.max, limits.max // 2, 0, 1))


def _filled(array: np.ndarray, rng: random.Random) -> np.ndarray:
    return np.full_like(array, _extreme(array.dtype, rng))


def _change_table(arrays: dict[str, np.ndarray], metadata: dict[str, str], kind: str, rng: random.Random) -> tuple[str, bytes]:
    """One wrong value in the tensor table itself: offsets, shapes (huge declared sizes) or dtypes."""
    table, body = table_of(arrays)
    if not table:
        return "empty table", seal(kind, {"x": rng.choice(NUMBERS)}, body, metadata)
    name, part = rng.choice(sorted(table)), rng.choice(("shape", "data_offsets", "dtype", "entry", "metadata"))
    entry = dict(table[name])
    if part == "metadata":
        metadata = metadata | {rng.choice(("x", "key_id", "level")): rng.choice(NUMBERS)}
    elif part == "entry":
        table[name] = rng.choice((*NUMBERS, {k: v for k, v in entry.items() if k != rng.choice(sorted(entry))}))
    elif part == "dtype":
        table[name] = entry | {part: rng.choice(("F64", "U8", "O", "f8", "BF16", "", 7, None, [], "\ud800"))}
    else:
        numbers = [*entry[part], rng.choice(NUMBERS)]
        rng.shuffle(numbers)
        table[name] = entry | {
            part: rng.choice((numbers, numbers[: len(entry[part])], [2**62, 0], [2**70, 0], [2**40] * 3, [0] * 40, [1] * 17, {}, "ab", None))
        }
    return f"table {name} {part}", seal(kind, table, body, metadata)
