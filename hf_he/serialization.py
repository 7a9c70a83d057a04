"""The byte container of every key, ciphertext and message: a safetensors file with a checked header.

A container is a valid safetensors file. Its metadata holds the format version, a kind ("ciphertext", "evaluation_keys", ...) and a
SHA-256 over the remaining metadata, the tensor table and all tensor bytes, so truncation, a flipped bit, a renamed kind and an
unknown version are all found before anything is used. The hash detects damage, not forgery: the protocol is semi-honest.

Residues modulo a prime of b bits take ceil(b / 8) bytes each (`pack_residues`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hf_he.errors import CorruptFileError, ParameterError

FORMAT_VERSION = "1"
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 65536
MAX_DIMENSIONS = 16

_RESERVED = ("hf_he.format", "hf_he.kind", "hf_he.sha256")
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_SHOWN_CHARACTERS = 60
_AGAIN = "copy or download the file again, or write it again with the command that made it"
_WRITTEN_BY = {
    "secret-key": "keygen", "public-key": "keygen", "evaluation-key": "keygen", "bootstrapping-key": "keygen --bootstrapping", "encrypted-batch": "encrypt",
    "encrypted-result": "infer", "run": "finetune --encrypted", "encrypted-adapter": "finetune --encrypted --task lm",
}  # fmt: skip


def pack(kind: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Bytes of a container of `kind` holding `arrays` (any shape; bool, integer or float dtypes) and string `metadata`."""
    arrays = {name: _plain_array(name, value) for name, value in arrays.items()}
    if len(arrays) > MAX_TENSORS:
        raise ParameterError(f"a container holds at most {MAX_TENSORS} arrays, got {len(arrays)}: split it")
    for key, value in metadata.items():
        if key in _RESERVED or not isinstance(key, str) or not isinstance(value, str):
            raise ParameterError(f"metadata entry {key!r} must be a string under a name other than {', '.join(_RESERVED)}")
    table: dict[str, dict] = {}
    offset = 0
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    for name in order:
        array = arrays[name]
        table[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    header_metadata = {**metadata, "hf_he.format": FORMAT_VERSION, "hf_he.kind": kind}
    chunks = [memoryview(arrays[name].reshape(-1).view(np.uint8)) for name in order if arrays[name].nbytes]
    header_metadata["hf_he.sha256"] = _digest(header_metadata, table, chunks)
    header = json.dumps({"__metadata__": header_metadata, **table}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise ParameterError(f"the header needs {len(header)} bytes, at most {MAX_HEADER_BYTES} are allowed: store large metadata as an array")
    return b"".join([len(header).to_bytes(8, "little"), header, *chunks])


def unpack(data: bytes | bytearray | memoryview, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays (views into `data`, no copies) and metadata of a container that must be of `kind`.

    Raises CorruptFileError when the bytes are truncated, altered, of another kind or of an unknown version.
    """
    metadata, table, start = _read_header(data)
    found = metadata.get("hf_he.kind")
    if found != kind:
        raise CorruptFileError(f"expected a file of kind {kind!r}, this one is of kind {quoted(found)}: pass the right file")
    body = memoryview(data)[start:]
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    try:
        entries = sorted(table.items(), key=lambda item: tuple(item[1]["data_offsets"]))
        for name, entry in entries:
            dtype, shape, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
            if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape) or begin != offset:
                raise ValueError
            count = 1
            for size in shape:
                count *= size
            if end - begin != count * dtype.itemsize or end > len(body):
                raise ValueError
            arrays[name] = np.frombuffer(body[begin:end], dtype=dtype).reshape(shape)
            offset = end
    except (KeyError, OverflowError, TypeError, ValueError):
        raise CorruptFileError(f"the tensor table does not match the data (truncated or altered): {_AGAIN}") from None
    if offset != len(body):
        raise CorruptFileError(f"{len(body) - offset} bytes follow the last tensor (two files joined, or altered): {_AGAIN}")
    expected = metadata.pop("hf_he.sha256", "")
    chunks = [body[entry["data_offsets"][0] : entry["data_offsets"][1]] for _, entry in entries]
    if _digest(metadata, dict(entries), chunks) != expected:
        raise CorruptFileError(f"the SHA-256 checksum does not match (damaged or altered): {_AGAIN}")
    return arrays, {key: value for key, value in metadata.items() if key not in _RESERVED}


def unpack_for(data: bytes | bytearray | memoryview, kind: str, backend: str, fingerprint: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`unpack` for a key or ciphertext that must come from `backend` and the parameters with `fingerprint`, and name its key pair.

    Raises CorruptFileError, or ParameterError for another backend or parameter set.
    """
    arrays, metadata = unpack(data, kind)
    if metadata.get("backend") != backend:
        raise ParameterError(f"this file was written by the backend {quoted(metadata.get('backend'))}, not {backend!r}: load it with that backend")
    if metadata.get("fingerprint") != fingerprint:
        raise ParameterError("this file was made for other CKKS parameters: use the parameter set it names, or make it again")
    if not _KEY_ID.fullmatch(metadata.get("key_id", "")):
        raise CorruptFileError(f"this {kind} file misses or garbles the key id: write it again with this version of hf_he")
    return arrays, metadata


def quoted(text: object) -> str:
    """Something a file or a peer said, fit for an error message: ASCII, escaped, shortened."""
    shown = ascii(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."


def peek(data: bytes | bytearray | memoryview) -> tuple[str, dict[str, str]]:
    """Kind and metadata of a container without reading or checking its tensors."""
    metadata, _, _ = _read_header(data)
    return metadata.get("hf_he.kind", ""), {key: value for key, value in metadata.items() if key not in _RESERVED}


def pack_residues(values: np.ndarray, modulus: int) -> np.ndarray:
    """[*shape] centred float64 residues, integers in [-modulus/2, modulus/2], to [*shape, ceil(bits/8)] uint8 (little endian)."""
    values = np.asarray(values, dtype=np.float64)
    width = _residue_width(modulus)
    if not (np.abs(values) <= modulus // 2).all() or not (values == np.rint(values)).all():
        raise ParameterError(f"residues modulo {modulus} must be integers in [-q/2, q/2]: reduce them before writing")
    whole = values.astype("<i8", order="C")
    np.add(whole, modulus, out=whole, where=whole < 0)
    return np.ascontiguousarray(whole.view(np.uint8).reshape(*values.shape, 8)[..., :width])


def unpack_residues(packed: np.ndarray, modulus: int) -> np.ndarray:
    """The inverse of `pack_residues`: [*shape, ceil(bits/8)] uint8 to centred float64. Raises CorruptFileError on a value >= modulus."""
    width = _residue_width(modulus)
    if packed.dtype != np.uint8 or packed.ndim < 1 or packed.shape[-1] != width:
        raise CorruptFileError(f"residues modulo {modulus} take {width} bytes each, got {packed.dtype} of shape {packed.shape}: {_AGAIN}")
    wide = np.zeros((*packed.shape[:-1], 8), dtype=np.uint8)
    wide[..., :width] = packed
    whole = wide.view("<i8")[..., 0]
    if (whole >= modulus).any():
        raise CorruptFileError(f"a residue is not below its modulus {modulus}: {_AGAIN}")
    np.subtract(whole, modulus, out=whole, where=whole > modulus // 2)
    return whole.astype(np.float64)


def write_file(path: str | Path, data: bytes, *, secret: bool = False, mapped: bool = False, keep: str | Path | None = None) -> None:
    """Write atomically (a temporary file in the same folder, then a rename); a `secret` file has mode 0600 from the first byte on and is on the disk
    before its name is.

    `mapped` marks a file that `map_file` reads as read-only: it can be replaced or deleted while it is mapped, but not truncated.
    With `keep`, the file that was there stays under that name, and bytes and names are on the disk before this returns: whenever the
    process or the machine stops, one of the two is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        if not secret:
            os.fchmod(descriptor, 0o444 if mapped else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if secret or keep is not None:
                file.flush()
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            Path(keep).unlink(missing_ok=True)
            os.link(path, keep)
        os.replace(temporary, path)
        if keep is not None:
            _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> None:
    """Raise the OSError that `write_file` would end with, before the work whose result it is to hold; creates the folder, not the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def read_file(path: str | Path, what: str) -> bytes:
    """The bytes of a file; a missing or unreadable one is a CorruptFileError saying which command writes it."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CorruptFileError(_unreadable(path, what, error)) from None


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Errors about the contents of a file, which know bytes only, begin with its name."""
    try:
        yield
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}") from None


def map_file(path: str | Path, what: str) -> memoryview:
    """The bytes of a file, mapped read-only: pages are read when they are used and shared by all processes that map the file.

    Errors as `read_file`. For files written by `write_file(..., mapped=True)`, which are never changed in place.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")
    except (OSError, ValueError) as error:
        raise CorruptFileError(_unreadable(path, what, error)) from None


def _unreadable(path: str | Path, what: str, error: Exception) -> str:
    command = _WRITTEN_BY.get(what)
    return f"cannot read the {what} file {path}: {getattr(error, 'strerror', None) or error}" + (f"; `hf-he {command}` writes it" if command else "")


def rename(path: str | Path, target: str | Path) -> None:
    """Give a file another name in its folder, in place of what has that name; on the disk when this returns."""
    os.replace(path, target)
    _sync_folder(Path(target).parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain_array(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value)
    array = np.ascontiguousarray(array).reshape(array.shape)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype not in _NAMES or not name or name == "__metadata__":
        raise ParameterError(f"cannot store array {name!r} of dtype {array.dtype}: use a bool, integer or float array under a plain name")
    return array


def _digest(metadata: Mapping[str, str], table: Mapping[str, dict], chunks: list) -> str:
    hashed = hashlib.sha256()
    described = {key: value for key, value in metadata.items() if key != "hf_he.sha256"}
    head = json.dumps([described, table], sort_keys=True, separators=(",", ":")).encode()
    hashed.update(len(head).to_bytes(8, "little"))
    hashed.update(head)
    for chunk in chunks:
        hashed.update(chunk)
    return hashed.hexdigest()


def _read_header(data: bytes | bytearray | memoryview) -> tuple[dict[str, str], dict[str, dict], int]:
    view = memoryview(data)
    if len(view) < 8:
        raise CorruptFileError(f"{len(view)} bytes are too few for an hf_he file: {_AGAIN}")
    length = int.from_bytes(view[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > len(view):
        raise CorruptFileError(f"not an hf_he file, or truncated inside its header: {_AGAIN}")
    try:
        table = json.loads(bytes(view[8 : 8 + length]), object_pairs_hook=_no_duplicates)
        metadata = table.pop("__metadata__")
        if not all(isinstance(value, str) for value in metadata.values()) or not all(isinstance(entry, dict) for entry in table.values()):
            raise ValueError
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise CorruptFileError(f"the header is not readable (altered, or not an hf_he file): {_AGAIN}") from None
    version = metadata.get("hf_he.format")
    if version != FORMAT_VERSION:
        raise CorruptFileError(f"format version {quoted(version)} is unknown, this hf_he reads version {FORMAT_VERSION}: use the hf_he that wrote the file")
    if len(table) > MAX_TENSORS:
        raise CorruptFileError(f"{len(table)} tensors are more than the {MAX_TENSORS} a file may hold: {_AGAIN}")
    return metadata, table, 8 + length


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError
    return out


def _residue_width(modulus: int) -> int:
    if not 2 <= modulus < 2**53:
        raise ParameterError(f"residues are packed for moduli in [2, 2^53), got {modulus}")
    return (int(modulus - 1).bit_length() + 7) // 8
