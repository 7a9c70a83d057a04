"""Bootstrapping of vectors that repeat, and in two iterations: against plain values, with keys of their own."""

import warnings

import numpy as np
import pytest

from hf_he.backends import get_backend
from hf_he.backends.base import HEBackend
from hf_he.ckks.bootstrapping.factors import sparse_coefficients_to_slots, sparse_slots_to_coefficients
from hf_he.ckks.bootstrapping.keys import rotation_limbs
from hf_he.ckks.bootstrapping.plan import BootstrapPlan
from hf_he.ckks.encoder import to_coefficients
from hf_he.ckks.ntt import bit_reversal
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.errors import CorruptFileError, ParameterError
from hf_he.keys import BOOTSTRAPPING_FOLDER, EVALUATION_FILE, Keys, ServerKeys
from hf_he.serialization import write_file

pytestmark = pytest.mark.filterwarnings("ignore:CKKS parameters with N")


class Party:
    def __init__(self, name: str, period: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.backend: HEBackend = get_backend(name, CKKSParameters.from_bits(11, 50, 40, 3, 50, 4, insecure=True, bootstrap=True))
        self.secret = self.backend.generate_secret_key()
        self.keys = self.backend.generate_evaluation_keys(self.secret, [], bootstrapping=True, bootstrapping_slots=period)
        self.backend.load_evaluation_keys(self.keys)
        self.repeats = self.backend.parameters.slots // period

    def bootstrap(self, values: np.ndarray, iterations: int = 1) -> np.ndarray:
        return self.backend.decrypt(self.backend.bootstrap(self.backend.encrypt(values, self.secret, 0), iterations), self.secret)


@pytest.mark.parametrize("slots", [8, 64, 512])
def test_factors_on_repeated_vectors(slots):
    """CoeffsToSlots gives the parts of the coefficients side by side, SlotsToCoeffs takes them back: the embedding of the small ring."""
    generator = np.random.default_rng(slots)
    values = generator.normal(size=slots) + 1j * generator.normal(size=slots)
    parts = [to_coefficients(part, 2.0**45) / 2.0**45 for part in (values.real, values.imag)]
    w = sum(unit * (c[:slots] + 1j * c[slots:])[bit_reversal(slots)] for unit, c in zip((1, 1j), parts, strict=True))
    x = np.tile(values, 2)
    for factor in sparse_coefficients_to_slots(slots, 3):
        x = factor(x)
    np.testing.assert_allclose(x.real, np.concatenate([w.real, w.imag]), atol=1e-10)
    x = x.real.astype(complex)
    for factor in sparse_slots_to_coefficients(slots, 3):
        x = factor(x)
    np.testing.assert_allclose(x + np.roll(x, -slots), np.tile(values, 2), atol=1e-10)


@pytest.mark.parametrize("name", ["native", "simulator"])
@pytest.mark.parametrize("period", [8, 64, 512])
def test_repeated_vectors_come_back(name, period):
    party = Party(name, period)
    values = np.tile(np.random.default_rng(period).uniform(-1, 1, (3, period)), party.repeats)
    np.testing.assert_allclose(party.bootstrap(values), values, atol=2.0**-16)


@pytest.mark.parametrize("name", ["native", "simulator"])
def test_other_vectors_are_averaged_over_the_repetitions(name):
    party = Party(name, 64)
    values = np.random.default_rng(0).uniform(-1, 1, party.backend.parameters.slots)
    expected = np.tile(values.reshape(-1, 64).mean(0), party.repeats)
    np.testing.assert_allclose(party.bootstrap(values), expected, atol=2.0**-16)


@pytest.mark.parametrize("name", ["native", "simulator"])
def test_a_second_iteration_removes_the_error_of_the_first(name):
    party = Party(name, 64)
    values = np.tile(np.random.default_rng(1).uniform(-1, 1, (2, 64)), party.repeats)
    once, twice = (np.abs(party.bootstrap(values, iterations) - values).max() for iterations in (1, 2))
    assert twice < min(2.0**-24, once / 4)


def test_all_slots_in_two_iterations():
    """The worst case of the sine, and random values: no level is lost."""
    party = Party("native", 1024)
    values = np.stack([np.ones(1024), np.random.default_rng(2).uniform(-1, 1, 1024)])
    out = party.backend.bootstrap(party.backend.encrypt(values, party.secret, 0), 2)
    assert out.level == party.backend.parameters.max_level and out.scale == party.backend.parameters.scale_at(out.level)
    np.testing.assert_allclose(party.backend.decrypt(out, party.secret), values, atol=2.0**-24)
    with pytest.raises(ParameterError, match="at least one"):
        party.backend.bootstrap(out, 0)


@pytest.mark.parametrize("name", ["native", "simulator"])
def test_key_folder(name, tmp_path):
    party = Party(name, 64)
    party.backend.save_bootstrapping_keys(party.keys, tmp_path)
    bare = party.backend.generate_evaluation_keys(party.secret, [])
    party.backend.load_evaluation_keys(party.backend.load_bootstrapping_keys(bare, tmp_path))
    values = np.tile(np.linspace(-1, 1, 64), party.repeats)
    np.testing.assert_allclose(party.bootstrap(values), values, atol=2.0**-16)
    other = party.backend.generate_evaluation_keys(party.secret, [], bootstrapping=True)
    party.backend.save_bootstrapping_keys(other, tmp_path / "other")
    if name == "native":
        write_file(tmp_path / "galois-001.key", (tmp_path / "other" / "galois-001.key").read_bytes())
        with pytest.raises(CorruptFileError, match="galois-001"):
            party.backend.load_bootstrapping_keys(bare, tmp_path)


def test_servers_of_models_refuse_them(tmp_path):
    backend = get_backend("simulator", parameter_set("n16-bootstrap"))
    keys = Keys.generate(backend, [])
    keys.save(tmp_path)
    sparse = backend.generate_evaluation_keys(keys.secret, [], bootstrapping=True, bootstrapping_slots=64)
    backend.save_bootstrapping_keys(sparse, tmp_path / BOOTSTRAPPING_FOLDER)
    with pytest.raises(ParameterError, match="repeat every 64 slots"):
        ServerKeys.load(tmp_path / EVALUATION_FILE, bootstrapping=True)


@pytest.mark.parametrize("period", [1, 4, 48, 2048])
@pytest.mark.parametrize("name", ["native", "simulator"])
def test_periods_that_do_not_fit(name, period):
    with pytest.raises(ParameterError, match="power of two"):
        Party(name, period)


def test_keys_at_full_size():
    """Fewer diagonals, as many keys or a few more for the sums: all steps within the slots, every plan of N = 2^16."""
    for log in range(3, 16):
        plan = BootstrapPlan(parameter_set("n16-bootstrap"), 1 << log)
        limbs = rotation_limbs(plan)
        assert all(0 < step < plan.parameters.slots for step in limbs) and max(limbs.values()) == plan.top
        assert len(limbs) <= 40
