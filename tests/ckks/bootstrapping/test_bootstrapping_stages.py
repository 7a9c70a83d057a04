"""Every stage of bootstrapping on a small ring against numpy, with the coefficients read by the secret key in between."""

import math
import warnings

import numpy as np
import pytest

from hf_he.ckks.bootstrapping.bootstrapper import Bootstrapper
from hf_he.ckks.bootstrapping.cosine import HALF_WIDTH, reduce_plain
from hf_he.ckks.bootstrapping.keys import BootstrappingKeys, sparse_ternary
from hf_he.ckks.bootstrapping.plan import EPHEMERAL_WEIGHT, OVERFLOW_BOUND, BootstrapPlan, overflow_probability
from hf_he.ckks.bootstrapping.series import Scaled
from hf_he.ckks.context import context_for
from hf_he.ckks.encoder import to_complex_values
from hf_he.ckks.evaluator import Evaluator
from hf_he.ckks.keys import SecretKey
from hf_he.ckks.ntt import bit_reversal
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.ckks.random import Stream
from hf_he.errors import BackendUnavailableError, ParameterError

pytestmark = pytest.mark.filterwarnings("ignore:CKKS parameters with N")


class Small:
    """Keys and readers of one ring of degree 2^11."""

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.parameters = CKKSParameters.from_bits(11, 50, 40, 3, 50, 4, insecure=True, bootstrap=True)
            self.bootstrapper = Bootstrapper(BootstrapPlan(self.parameters))
        self.plan = self.bootstrapper.plan
        self.evaluator = Evaluator(context_for(self.parameters))
        self.secret = SecretKey.generate(self.evaluator.context)
        self.keys = BootstrappingKeys.generate(self.plan, self.secret)
        self.full_secret = SecretKey(self.bootstrapper.evaluator.context, self.secret._coefficients, self.secret.key_id)
        self.generator = np.random.default_rng(5)

    def coefficients(self, residues: np.ndarray, limbs: int) -> np.ndarray:
        """[N] decrypted integer coefficients of [2, L, N] residues, from the lowest limbs."""
        evaluator = self.bootstrapper.evaluator
        return evaluator._compose(evaluator._digits(np.ascontiguousarray(residues)[None], self.full_secret, limbs))[0][evaluator.context.inverse_order]

    def slots(self, residues: np.ndarray, scale: float) -> np.ndarray:
        return to_complex_values(self.coefficients(residues, 4), scale)

    def encrypt(self, values: np.ndarray) -> np.ndarray:
        return self.evaluator.encrypt(values, self.secret, 0, self.parameters.scale_at(0))[0]


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


@pytest.fixture(scope="module")
def raised(small):
    """A pair of real vectors in one ciphertext, after ModRaise: (values [2, n], residues [2, top, N])."""
    values = small.generator.uniform(-1, 1, (2, small.parameters.slots))
    pair = small.encrypt(values)
    packed = small.bootstrapper.pack(pair)
    return values, small.bootstrapper.raise_modulus(packed, small.keys)


def integers_and_slots(small, raised):
    """x = coefficients / q_0 as the slots should hold it: (w [n] complex, bit-reversed)."""
    n = small.parameters.slots
    x = small.coefficients(raised[1], 4) / small.parameters.moduli[0]
    return (x[:n] + 1j * x[n:])[bit_reversal(n)]


def test_modraise_adds_small_multiples_of_the_modulus(small, raised):
    q, scale = small.parameters.moduli[0], small.parameters.scale_at(0)
    x = small.coefficients(raised[1], 4)
    multiples = np.rint(x / q)
    assert 1 <= np.abs(multiples).max() <= OVERFLOW_BOUND
    assert abs(multiples.std() - math.sqrt((EPHEMERAL_WEIGHT + 1) / 12)) < 0.15
    message = to_complex_values(x - multiples * q, scale)
    np.testing.assert_allclose(message, raised[0][0] + 1j * raised[0][1], atol=1e-7)


def test_coefficients_to_slots(small, raised):
    expected = integers_and_slots(small, raised) / HALF_WIDTH
    found = small.bootstrapper.to_slots(raised[1], small.keys)
    for half, part in zip(found.values, (expected.real, expected.imag), strict=True):
        np.testing.assert_allclose(small.slots(half, found.scale), part, atol=1e-12)


def test_modular_reduction(small):
    """Arguments all over the interval, close to integers: the sine of the ciphertexts is the polynomial's, and that is x mod 1."""
    multiples = small.generator.integers(-OVERFLOW_BOUND, OVERFLOW_BOUND + 1, (2, small.parameters.slots))
    rest = small.generator.uniform(-(2.0**-10), 2.0**-10, multiples.shape)
    plan, evaluator = small.plan, small.bootstrapper.evaluator
    arguments, _ = evaluator.encrypt((multiples + rest) / HALF_WIDTH, small.full_secret, plan.levels[0] - 1, plan.scale(0))
    found = small.bootstrapper.reduce(Scaled(arguments, 0, plan.scale(0)), small.keys)
    for i in range(2):
        values = small.slots(found.values[i], found.scale).real
        np.testing.assert_allclose(values, reduce_plain(multiples[i] + rest[i], plan.cosine_degree), atol=2e-9)
        np.testing.assert_allclose(values, 2 * np.pi * rest[i], atol=1e-7)


def test_slots_to_coefficients_inverts_coefficients_to_slots(small, raised):
    """Without the modular reduction the two transforms undo each other up to their constants."""
    plan, bootstrapper = small.plan, small.bootstrapper
    values = small.generator.uniform(-1, 1, (2, small.parameters.slots)) / 64
    limbs = plan.levels[-1]
    encrypted, _ = bootstrapper.evaluator.encrypt(values, small.full_secret, limbs - 1, 2.0**50)
    out = bootstrapper.to_coefficients(Scaled(encrypted, len(plan.levels) - 1, 2.0**50), small.keys)
    assert out.shape == (2, plan.bottom, small.parameters.ring_degree)
    found = small.coefficients(out, 3)
    packed = np.concatenate([v[bit_reversal(small.parameters.slots)] for v in values])
    factor = found @ packed / (packed @ packed)
    np.testing.assert_allclose(found / factor, packed, atol=1e-8)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_bootstrap(small, batch):
    values = small.generator.uniform(-1, 1, (batch, small.parameters.slots))
    fresh = small.bootstrapper(small.encrypt(values), small.keys)
    assert fresh.shape == (batch, 2, small.parameters.max_level + 1, small.parameters.ring_degree)
    found = small.evaluator.decrypt(fresh, small.secret, small.parameters.scale_at(small.parameters.max_level))
    assert np.abs(found - values).max() < 2.0**-18


def test_constant_vectors_suffer_the_sine_only(small):
    """The worst case of the sine: all of the message in one coefficient."""
    values = np.ones((1, small.parameters.slots))
    fresh = small.bootstrapper(small.encrypt(values), small.keys)
    found = small.evaluator.decrypt(fresh, small.secret, small.parameters.scale_at(small.parameters.max_level))
    sine = (2 * math.pi / small.plan.ratio) ** 2 / 6
    assert np.abs(found - (1 - sine)).max() < 2.0**-18


def test_overflow_is_negligible():
    assert overflow_probability(1 << 16) < 2.0**-40


def test_ephemeral_secret_has_its_weight():
    secret = sparse_ternary(1 << 12, EPHEMERAL_WEIGHT, Stream())
    assert np.count_nonzero(secret) == EPHEMERAL_WEIGHT and set(np.unique(secret)) == {-1.0, 0.0, 1.0}


def test_parameters_without_bootstrapping_moduli():
    with pytest.raises(BackendUnavailableError, match="n16-bootstrap"):
        BootstrapPlan(parameter_set("n13"))


@pytest.mark.parametrize("count", [1, 5, 12, 17])
def test_parameters_with_other_bootstrapping_moduli(count):
    """As a file could hold them."""
    data = parameter_set("n16-bootstrap").to_dict()
    data["bootstrap_moduli"] = data["bootstrap_moduli"][:count]
    with pytest.raises(ParameterError, match="structure"):
        BootstrapPlan(CKKSParameters.from_dict(data))


@pytest.mark.parametrize("first_bits", [42, 48, 49, 50])
def test_a_first_modulus_too_close_to_the_scale_is_refused(first_bits):
    """Through the sine, 1.0 would come back as 0.64 at 42 bits."""
    parameters = CKKSParameters.from_bits(16, first_bits, 40, 5, 49, 8, bootstrap=True)
    if first_bits >= 49:
        assert BootstrapPlan(parameters).ratio > 2.0**8
        return
    with pytest.raises(ParameterError, match=r"first_bits >= scale_bits \+ 9: q_0 must be at least 256 times the scale"):
        BootstrapPlan(parameters)


def test_named_set_is_secure_and_leaves_levels():
    parameters = parameter_set("n16-bootstrap")
    assert parameters.log2_qp <= 1747 and parameters.security_bits == 128
    assert parameters.max_level >= 10
    assert CKKSParameters.from_dict(parameters.to_dict()) == parameters
