"""Bootstrapping keys on disk: they work after a round trip, and damage is a typed error."""

import contextlib
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from hf_he.backends.native import NativeBackend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import CorruptFileError, ParameterError, WrongKeyError

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
        np.testing.assert_array_equal(getattr(loaded.bootstrapping, name).table.data, getattr(keys.bootstrapping, name).table.data)
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


def test_files_that_shrink_after_loading_do_no_harm(party, folder):
    """Keys are copies: nothing stays mapped, so that no file can take memory away from a running server."""
    backend, secret, keys = party
    loaded = backend.load_bootstrapping_keys(keys, folder)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()
    for file in folder.iterdir():
        os.truncate(file, 100)
    backend.load_evaluation_keys(loaded)
    values = np.linspace(-1, 1, backend.parameters.slots)
    np.testing.assert_allclose(backend.decrypt(backend.bootstrap(backend.encrypt(values, secret, 0)), secret), values, atol=2.0**-16)


def test_files_that_shrink_while_they_are_read(party, saved, tmp_path):
    """Whenever the truncation comes: the keys as they were, or a typed error."""
    backend, _, keys = party
    names = sorted(file.name for file in saved.iterdir())
    for attempt in range(12):
        copy = shutil.copytree(saved, tmp_path / str(attempt))
        target = copy / names[attempt % len(names)]
        thread = threading.Thread(target=lambda target=target, wait=0.002 * attempt: (time.sleep(wait), os.truncate(target, target.stat().st_size // 2)))
        thread.start()
        with contextlib.suppress(CorruptFileError):
            assert backend.load_bootstrapping_keys(keys, copy).bootstrapping.nbytes == keys.bootstrapping.nbytes
        thread.join()


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
        target.write_bytes(broken)
        with pytest.raises(CorruptFileError):
            backend.load_bootstrapping_keys(keys, folder)
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        target.write_bytes(data[:size])
        with pytest.raises(CorruptFileError):
            backend.load_bootstrapping_keys(keys, folder)


def test_swapped_and_missing_files(party, folder):
    backend, _, keys = party
    shutil.copy(folder / "galois-001.key", folder / "galois-002.key")
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
