"""Bootstrapping keys on disk: they work after a round trip, and damage is a typed error."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from hf_he.backends.native import NativeBackend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import CorruptFileError, ParameterError, WrongKeyError
from hf_he.serialization import write_file

pytestmark = pytest.mark.filterwarnings("ignore:CKKS parameters with N")


@pytest.fixture(scope="module")
def party():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = NativeBackend(CKKSParameters.from_bits(11, 50, 40, 3, 50, 4, insecure=True, bootstrap=True))
        secret = backend.generate_secret_key()
        return backend, secret, backend.generate_evaluation_keys(secret, [1], bootstrapping=True)


@pytest.fixture(scope="module")
def saved(party, tmp_path_factory):
    backend, _, keys = party
    folder = tmp_path_factory.mktemp("keys")
    written = backend.save_bootstrapping_keys(keys, folder)
    assert written == sum(file.stat().st_size for file in folder.iterdir())
    assert written < 0.6 * keys.bootstrapping.nbytes
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_round_trip(party, saved):
    backend, secret, keys = party
    plain = backend.generate_evaluation_keys(secret, [1])
    loaded = backend.load_bootstrapping_keys(plain, saved)
    for name in ("galois", "raise_key", "lower_key"):
        for mine, theirs in zip(getattr(loaded.bootstrapping, name).halves, getattr(keys.bootstrapping, name).halves, strict=True):
            assert all(map(np.array_equal, mine, theirs))
    backend.load_evaluation_keys(loaded)
    values = np.linspace(-1, 1, backend.parameters.slots)
    np.testing.assert_allclose(backend.decrypt(backend.bootstrap(backend.encrypt(values, secret, 0)), secret), values, atol=2.0**-16)


def test_written_one_by_one(party, tmp_path):
    """Keys that were never in memory together have the files and sizes of those that were, and work."""
    backend, secret, _ = party
    seen = []
    written = backend.write_bootstrapping_keys(secret, tmp_path, lambda done, total: seen.append((done, total)))
    files = list(tmp_path.iterdir())
    assert written == sum(file.stat().st_size for file in files) and seen == [(i + 1, len(files)) for i in range(len(files))]
    backend.load_evaluation_keys(backend.load_bootstrapping_keys(backend.generate_evaluation_keys(secret, []), tmp_path))
    values = np.linspace(-1, 1, backend.parameters.slots)
    np.testing.assert_allclose(backend.decrypt(backend.bootstrap(backend.encrypt(values, secret, 0)), secret), values, atol=2.0**-16)


def test_keys_stay_mapped_and_whole(party, folder, tmp_path):
    """One half of the keys lies in the files; replacing or deleting them, which is all this package does, leaves a running server its keys."""
    backend, secret, keys = party
    loaded = backend.load_bootstrapping_keys(keys, folder)
    assert all(not b.flags.writeable for b, _ in loaded.bootstrapping.galois.halves)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or maps.read_text().count(str(folder)) == len(list(folder.iterdir()))
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o444}
    again = backend.generate_evaluation_keys(secret, [1], bootstrapping=True)
    values = np.linspace(-1, 1, backend.parameters.slots)
    for change in (lambda: backend.save_bootstrapping_keys(again, folder), lambda: shutil.rmtree(folder)):
        change()
        backend.load_evaluation_keys(loaded)
        np.testing.assert_allclose(backend.decrypt(backend.bootstrap(backend.encrypt(values, secret, 0)), secret), values, atol=2.0**-16)


def test_evaluation_keys_do_not_swallow_them(party):
    backend, _, keys = party
    with pytest.raises(ParameterError, match="save_bootstrapping_keys"):
        backend.serialize(keys)


def test_damage_is_found(party, folder):
    backend, _, keys = party
    target = folder / "galois-003.key"
    data = bytearray(target.read_bytes())
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(data), 40):
        broken = data.copy()
        broken[position] ^= 1 << generator.integers(8)
        write_file(target, broken)
        with pytest.raises(CorruptFileError):
            backend.load_bootstrapping_keys(keys, folder)
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        write_file(target, data[:size])
        with pytest.raises(CorruptFileError):
            backend.load_bootstrapping_keys(keys, folder)


def test_swapped_and_missing_files(party, folder):
    backend, _, keys = party
    write_file(folder / "galois-002.key", (folder / "galois-001.key").read_bytes())
    with pytest.raises(CorruptFileError, match="galois-002"):
        backend.load_bootstrapping_keys(keys, folder)
    (folder / "galois-002.key").unlink()
    with pytest.raises(CorruptFileError, match="keygen"):
        backend.load_bootstrapping_keys(keys, folder)


def test_keys_of_another_secret(party, saved):
    backend, _, _ = party
    other = backend.generate_evaluation_keys(backend.generate_secret_key(), [1])
    with pytest.raises(WrongKeyError):
        backend.load_bootstrapping_keys(other, saved)
