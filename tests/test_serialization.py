"""The byte container: round trips, and every way a file can be damaged."""

import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_safetensors

from hf_he.errors import CorruptFileError, ParameterError
from hf_he.serialization import check_writable, named, pack, pack_residues, peek, read_file, unpack, unpack_residues, write_file

ARRAYS = {
    "bytes": np.arange(7, dtype=np.uint8),
    "values": np.linspace(-1, 1, 12).reshape(3, 4),
    "scalar": np.array(3.5, dtype=np.float32),
    "empty": np.zeros((0, 5), dtype=np.int64),
}
DATA = pack("ciphertext", ARRAYS, {"key_id": "0123456789abcdef"})


def test_round_trip_keeps_arrays_and_metadata():
    arrays, metadata = unpack(DATA, "ciphertext")
    assert metadata == {"key_id": "0123456789abcdef"}
    assert arrays.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == value.dtype and arrays[name].shape == value.shape
        assert np.array_equal(arrays[name], value)
        assert arrays[name].flags.aligned


def test_non_contiguous_and_big_endian_arrays_are_normalised():
    value = np.arange(24, dtype=">f8").reshape(4, 6).T[::2]
    arrays, _ = unpack(pack("x", {"a": value}, {}), "x")
    assert np.array_equal(arrays["a"], value)


def test_a_container_is_a_safetensors_file():
    assert np.array_equal(load_safetensors(DATA)["values"], ARRAYS["values"])


def test_packing_is_deterministic_and_peek_reads_the_header_only():
    assert pack("ciphertext", dict(reversed(ARRAYS.items())), {"key_id": "0123456789abcdef"}) == DATA
    assert peek(DATA[:-8]) == ("ciphertext", {"key_id": "0123456789abcdef"})


def test_every_truncation_is_found():
    for length in range(len(DATA)):
        with pytest.raises(CorruptFileError):
            unpack(DATA[:length], "ciphertext")


def test_every_flipped_bit_is_found():
    for position in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(CorruptFileError):
            unpack(bytes(damaged), "ciphertext")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_typed_error(data):
    with pytest.raises(CorruptFileError):
        unpack(data, "ciphertext")


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b'{"__metadata__":{"hf_he.format":"1","hf_he.kind":"ciphertext"},"a":{"dtype":"F64","shape":[-1],"data_offsets":[0,-8]}}',
        b'{"__metadata__":{"hf_he.format":"1","hf_he.kind":"ciphertext"},"a":{"dtype":"O","shape":[1],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"hf_he.format":"1","hf_he.kind":"ciphertext"},"a":{"dtype":"F64","shape":[1e9],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"hf_he.format":"1","hf_he.kind":"ciphertext"},"a":7}',
        b'{"__metadata__":7}',
        b"[" * 100_000,
    ],
    ids=["list", "negative-shape", "object-dtype", "float-shape", "entry-not-a-table", "metadata-not-a-table", "deep-nesting"],
)
def test_hostile_headers_give_a_typed_error(header):
    with pytest.raises(CorruptFileError):
        unpack(len(header).to_bytes(8, "little") + header + bytes(8), "ciphertext")


def test_wrong_kind_wrong_version_and_trailing_bytes():
    with pytest.raises(CorruptFileError, match="kind 'public_key', this one is of kind 'ciphertext'"):
        unpack(DATA, "public_key")
    with pytest.raises(CorruptFileError, match="version '9'"):
        unpack(DATA.replace(b'"hf_he.format":"1"', b'"hf_he.format":"9"'), "ciphertext")
    with pytest.raises(CorruptFileError, match="follow the last tensor"):
        unpack(DATA + b"x", "ciphertext")


def test_only_numeric_arrays_and_string_metadata_are_accepted():
    with pytest.raises(ParameterError):
        pack("x", {"a": np.array([object()])}, {})
    with pytest.raises(ParameterError):
        pack("x", {}, {"n": 3})
    with pytest.raises(ParameterError):
        pack("x", {}, {"hf_he.kind": "y"})


@settings(deadline=None)
@given(st.integers(3, 2**50 - 1).map(lambda q: q | 1), st.integers(0, 2**32 - 1))
def test_residues_round_trip_in_the_fewest_whole_bytes(modulus, seed):
    half = modulus // 2
    values = np.random.default_rng(seed).integers(-half, half, size=(2, 5), endpoint=True).astype(np.float64)
    values[0, 0], values[0, 1] = half, -half
    packed = pack_residues(values, modulus)
    assert packed.shape == (2, 5, -(-modulus.bit_length() // 8)) and packed.dtype == np.uint8
    expected = [int(v) % modulus for v in values.ravel()]
    assert [int.from_bytes(bytes(row), "little") for row in packed.reshape(10, -1)] == expected
    assert np.array_equal(unpack_residues(packed, modulus), values)


@pytest.mark.parametrize("value", [0.5, 9.0, -9.0, np.nan, np.inf], ids=str)
def test_residues_outside_the_range_are_refused(value):
    with pytest.raises(ParameterError):
        pack_residues(np.array([value]), 17)


def test_packed_residues_are_checked_on_reading():
    with pytest.raises(CorruptFileError, match="not below its modulus"):
        unpack_residues(np.array([[17]], dtype=np.uint8), 17)
    with pytest.raises(CorruptFileError, match="bytes each"):
        unpack_residues(np.zeros((3, 2), dtype=np.uint8), 17)


def test_files_are_written_atomically_and_secrets_are_private(tmp_path):
    write_file(tmp_path / "a" / "secret.key", b"1", secret=True)
    write_file(tmp_path / "public.key", b"2")
    assert stat.S_IMODE(os.stat(tmp_path / "a" / "secret.key").st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["a", "public.key"]
    assert read_file(tmp_path / "public.key", "public key") == b"2"
    with pytest.raises(CorruptFileError, match="cannot read the public key file"):
        read_file(tmp_path / "none", "public key")


def test_messages_name_the_file_and_the_command_that_writes_it(tmp_path):
    with pytest.raises(CorruptFileError, match=r"nowhere/secret\.key: No such file or directory; `hf-he keygen` writes it"):
        read_file("nowhere/secret.key", "secret-key")
    with pytest.raises(CorruptFileError, match=r"a\.enc: 3 bytes are too few"), named(tmp_path / "a.enc"):
        peek(b"abc")


def test_a_place_that_cannot_be_written_is_known_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "a.enc")
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new" / "a.enc").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.enc", tmp_path):
        with pytest.raises(OSError):
            check_writable(path)
