"""`bootstrap` behind the contract: the same levels, scales and errors from the native engine and the simulator."""

import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest

from hf_he.backends import available_backends, get_backend
from hf_he.backends.base import HEBackend
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.errors import BackendUnavailableError, CorruptFileError, MissingKeyError, ShapeError, WrongKeyError
from hf_he.keys import BOOTSTRAPPING_FOLDER, EVALUATION_FILE, Keys, ServerKeys
from hf_he.refresh import BootstrapRefresh

pytestmark = pytest.mark.filterwarnings("ignore:CKKS parameters with N")


def toy_parameters() -> CKKSParameters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CKKSParameters.from_bits(11, 50, 40, 3, 50, 4, insecure=True, bootstrap=True)


class Party:
    def __init__(self, name: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.backend: HEBackend = get_backend(name, toy_parameters())
            self.secret = self.backend.generate_secret_key()
            self.keys = self.backend.generate_evaluation_keys(self.secret, [1], bootstrapping=True)
        self.generator = np.random.default_rng(3)

    def values(self, *batch: int) -> np.ndarray:
        return self.generator.uniform(-1, 1, (*batch, self.backend.parameters.slots))


@pytest.fixture(scope="module", params=[name for name in ("native", "simulator", "fhelium") if available_backends()[name][0]])
def party(request) -> Party:
    return Party(request.param)


@pytest.fixture(autouse=True)
def fresh(party):
    party.backend.load_evaluation_keys(party.keys)
    party.backend.log.reset()


@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize("batch", [(), (2,), (3,), (2, 2)])
def test_values_come_back_at_the_top(party, level, batch):
    backend = party.backend
    values = party.values(*batch)
    out = backend.bootstrap(backend.encrypt(values, party.secret, level))
    top = backend.parameters.max_level
    assert (out.level, out.scale, out.batch_shape) == (top, backend.parameters.scale_at(top), batch)
    np.testing.assert_allclose(backend.decrypt(out, party.secret), values, atol=2.0**-17)


def test_the_result_computes(party):
    """All levels of a bootstrapped ciphertext can be spent, and the next bootstrap follows."""
    backend = party.backend
    values = party.values(2)
    ct, expected = backend.bootstrap(backend.encrypt(values, party.secret, 0)), values
    while ct.level:
        ct, expected = backend.rescale(backend.relinearize(backend.multiply(ct, ct))), expected * expected
    again = backend.bootstrap(ct)
    np.testing.assert_allclose(backend.decrypt(again, party.secret), expected, atol=2.0**-13)


def test_values_out_of_range_suffer_the_sine(party):
    """A constant vector has all of its message in one coefficient, the worst case: x becomes sin(a x) / a with a = 2 pi scale / q_0."""
    backend = party.backend
    values = np.array([[1.0], [4.0], [100.0]]).repeat(backend.parameters.slots, axis=1)
    factor = 2 * np.pi * backend.parameters.scale_at(0) / backend.parameters.moduli[0]
    for row in values:
        out = backend.bootstrap(backend.encrypt(row, party.secret, 0))
        np.testing.assert_allclose(backend.decrypt(out, party.secret), np.sin(factor * row) / factor, atol=2.0**-12)


def test_it_is_logged(party):
    backend = party.backend
    with backend.log.measure("refresh"):
        backend.bootstrap(backend.encrypt(party.values(3), party.secret, 0))
    assert backend.log.counts["refresh", "bootstrap"] == 3
    assert any(entry.primitive == "bootstrap" and entry.level == 0 for entry in backend.log.trace)


def test_refresh_policy(party):
    backend = party.backend
    policy = BootstrapRefresh(backend)
    values = party.values(2)
    out = policy.refresh(backend, backend.encrypt(values, party.secret, 0), 2)
    assert out.level >= 2 and policy.count == 1
    np.testing.assert_allclose(backend.decrypt(out, party.secret), values, atol=2.0**-17)


def test_mistakes(party):
    backend = party.backend
    ct = backend.encrypt(party.values(), party.secret, 1)
    with pytest.raises(ShapeError, match="relinearize"):
        backend.bootstrap(backend.multiply(ct, ct))
    backend.load_evaluation_keys(backend.generate_evaluation_keys(party.secret, [1]))
    with pytest.raises(MissingKeyError, match="bootstrapping=True"):
        backend.bootstrap(ct)


def test_parameters_that_cannot(party):
    backend = get_backend(party.backend.name, parameter_set("n13"))
    assert not backend.capabilities()["bootstrap"]
    secret = backend.generate_secret_key()
    with pytest.raises(BackendUnavailableError, match="n16-bootstrap"):
        backend.generate_evaluation_keys(secret, [], bootstrapping=True)
    with pytest.raises(BackendUnavailableError, match="n16-bootstrap"):
        backend.bootstrap(backend.encrypt(np.zeros(backend.parameters.slots), secret, 0))
    with pytest.raises(BackendUnavailableError):
        BootstrapRefresh(backend)


def test_keys_come_back_from_a_folder(party, tmp_path):
    backend, values = party.backend, party.values()
    written = backend.save_bootstrapping_keys(party.keys, tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert written == sum(path.stat().st_size for path in files)
    without = replace(party.keys, bootstrapping=None)
    backend.load_evaluation_keys(backend.load_bootstrapping_keys(without, tmp_path))
    out = backend.bootstrap(backend.encrypt(values, party.secret, 0))
    np.testing.assert_allclose(backend.decrypt(out, party.secret), values, atol=2.0**-17)
    with pytest.raises(WrongKeyError):
        backend.load_bootstrapping_keys(replace(without, key_id="0" * 16), tmp_path)
    damaged = bytearray(files[-1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[-1].write_bytes(damaged)
    with pytest.raises(CorruptFileError):
        backend.load_bootstrapping_keys(without, tmp_path)


def test_a_second_iteration_is_more_precise(party):
    backend, values = party.backend, party.values()
    out = backend.bootstrap(backend.encrypt(values, party.secret, 0), iterations=2)
    assert out.level == backend.parameters.max_level
    np.testing.assert_allclose(backend.decrypt(out, party.secret), values, atol=2.0**-20)


def test_key_folder(tmp_path):
    """Bootstrapping keys are a folder next to the evaluation keys; a server reads it when it is to bootstrap."""
    backend = get_backend("simulator", parameter_set("n16-bootstrap"))
    keys = Keys.generate(backend, {1}, bootstrapping=True)
    sizes = keys.save(tmp_path)
    assert sizes[BOOTSTRAPPING_FOLDER] > 0
    assert ServerKeys.load(tmp_path / EVALUATION_FILE).evaluation.bootstrapping is None
    assert ServerKeys.load(tmp_path / EVALUATION_FILE, bootstrapping=True).evaluation.bootstrapping is not None
    other = Keys.generate(backend, {1})
    other.save(tmp_path)
    with pytest.raises(WrongKeyError):
        ServerKeys.load(tmp_path / EVALUATION_FILE, bootstrapping=True)
    shutil.rmtree(tmp_path / BOOTSTRAPPING_FOLDER)
    with pytest.raises(CorruptFileError):
        ServerKeys.load(tmp_path / EVALUATION_FILE, bootstrapping=True)
