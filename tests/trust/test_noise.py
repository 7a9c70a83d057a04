"""Measured noise of the native engine against the simulator's model: within 2 bits for every operation, and for deep random circuits.

Both backends run the same circuit on the same values. The noise of a ciphertext is the standard deviation of its slots around the exact
result; the model is what the simulator's `noise` reports.
"""

import warnings

import numpy as np
import pytest

from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters, parameter_set

STEPS = (1, 2, 5, 100)
BITS = 2.0


class Pair:
    """A native and a simulated party with the same parameters; `circuit(backend, keys, encrypted)` runs on both."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.backends = [get_backend(name, parameters) for name in ("native", "simulator")]
        self.secrets = [backend.generate_secret_key() for backend in self.backends]
        self.publics = [backend.generate_public_key(secret) for backend, secret in zip(self.backends, self.secrets, strict=True)]
        for backend, secret in zip(self.backends, self.secrets, strict=True):
            backend.load_evaluation_keys(backend.generate_evaluation_keys(secret, STEPS, conjugation=True))

    def bits_off(self, values, circuit, expected, public=False, level=None):
        """log2(measured / modelled) per ciphertext of the result."""
        results = []
        for backend, secret, key in zip(self.backends, self.secrets, self.publics if public else self.secrets, strict=True):
            ct = circuit(backend, backend.encrypt(values, key, level))
            results.append((backend.decrypt(ct, secret), ct, backend))
        (measured, ct, _), (_, simulated, simulator) = results
        assert (ct.level, ct.components) == (simulated.level, simulated.components) and ct.scale == simulated.scale
        noise = (measured - expected).std(axis=-1)
        return np.log2(noise / simulator.noise(simulated))


@pytest.fixture(scope="module", params=["N = 2^11", "n14"])
def pair(request):
    if request.param == "n14":
        return Pair(parameter_set("n14"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Pair(CKKSParameters.from_bits(11, first_bits=50, scale_bits=40, levels=7, special_bits=49, special_count=2, insecure=True))


def values(pair, *batch, seed=0, size=1.0):
    return np.random.default_rng(seed).uniform(-size, size, (*batch, pair.parameters.slots))


def rolled(x, step):
    return np.roll(x, -step, axis=-1)


def check(bits):
    assert (np.abs(bits) < BITS).all(), f"native noise over the simulator's model: {np.round(bits, 2)} bits"


@pytest.mark.parametrize("public", [False, True], ids=["secret key", "public key"])
@pytest.mark.parametrize("level", [0, 3, 7])
def test_fresh_encryption(pair, public, level):
    x = values(pair, 2)
    check(pair.bits_off(x, lambda he, ct: ct, x, public, level))


def test_sums(pair):
    x = values(pair, 8)
    check(pair.bits_off(x, lambda he, ct: he.sum(ct), x.sum(0)))
    check(pair.bits_off(x, lambda he, ct: he.subtract(ct, he.add(ct, ct)), -x))
    check(pair.bits_off(x, lambda he, ct: he.add_scalar(he.negate(ct), 0.25), 0.25 - x))


@pytest.mark.parametrize("size", [1.0, 0.01, 20.0])
@pytest.mark.parametrize("level", [1, 4, 7])
def test_product_of_ciphertexts(pair, level, size):
    x = values(pair, 2, size=size)

    def circuit(he, ct):
        return he.rescale(he.relinearize(he.multiply(he.take(ct, 0), he.take(ct, 1))))

    check(pair.bits_off(x, circuit, x[0] * x[1], level=level))


def test_rescaling_before_relinearising(pair):
    x = values(pair, 2)
    check(pair.bits_off(x, lambda he, ct: he.relinearize(he.rescale(he.multiply(ct, ct))), x * x))
    check(pair.bits_off(x, lambda he, ct: he.rescale(he.multiply(ct, ct)), x * x))


@pytest.mark.parametrize("level", [0, 1, 2, 7])
def test_rotation_and_conjugation(pair, level):
    x = values(pair, 1)
    check(pair.bits_off(x, lambda he, ct: he.rotate(ct, STEPS), np.stack([rolled(x, s) for s in STEPS]), level=level))
    check(pair.bits_off(x, lambda he, ct: he.conjugate(ct), x, level=level))


def test_sum_of_rotations(pair):
    x = values(pair, len(STEPS))
    check(pair.bits_off(x, lambda he, ct: he.sum_rotated(ct, STEPS), sum(rolled(x[g], s) for g, s in enumerate(STEPS))))


@pytest.mark.parametrize("period", [1, 2, 128, None])
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_product_with_a_plaintext(pair, period, size):
    slots = pair.parameters.slots
    period = period or slots
    x, w = values(pair, 1), np.random.default_rng(1).uniform(-size, size, period)

    def circuit(he, ct):
        return he.rescale(he.multiply_plain(ct, he.encode(w, ct.level)))

    check(pair.bits_off(x, circuit, x * np.tile(w, slots // period)))


def test_diagonal_matrix_product(pair):
    x, w = values(pair, 8), np.random.default_rng(1).uniform(-0.3, 0.3, (2, 8, 64))
    expected = np.einsum("gks,ks->gs", np.tile(w, pair.parameters.slots // 64), x)
    check(pair.bits_off(x, lambda he, ct: he.rescale(he.multiply_plain_sum(he.encode(w, ct.level), ct)), expected))


def test_scalars_and_integer_combinations(pair):
    x = values(pair, 3)
    check(pair.bits_off(x, lambda he, ct: he.rescale(he.multiply_scalar(ct, 0.3)), 0.3 * x))
    weights = np.random.default_rng(1).integers(-1000, 1000, (2, 3))
    check(pair.bits_off(x, lambda he, ct: he.linear_combination(weights, ct), weights @ x))


def test_match_level(pair):
    x = values(pair, 1)
    check(pair.bits_off(x, lambda he, ct: he.match_level(ct, 2), x))


@pytest.mark.parametrize("seed", range(6))
def test_deep_random_circuits(pair, seed):
    """Seven levels of products, rotations, sums and plaintexts in random order, the noise compared after each operation."""
    generator = np.random.default_rng(seed)
    slots = pair.parameters.slots
    x = generator.uniform(-1, 1, slots)
    cts = [backend.encrypt(x, key) for backend, key in zip(pair.backends, pair.publics, strict=True)]
    operations = 0
    while cts[0].level:
        name = generator.choice(("square", "product", "plain", "rotate and add", "scalar"))
        other, step, w = generator.uniform(-1, 1, slots), int(generator.choice(STEPS)), generator.uniform(-1, 1, 64)
        for i, he in enumerate(pair.backends):
            ct = cts[i]
            if name == "square":
                ct = he.relinearize(he.rescale(he.multiply(ct, ct)))
            elif name == "product":
                ct = he.rescale(he.relinearize(he.multiply(ct, he.encrypt(other, pair.publics[i], ct.level))))
            elif name == "plain":
                ct = he.rescale(he.multiply_plain(ct, he.encode(w, ct.level)))
            elif name == "rotate and add":
                ct = he.rescale(he.multiply_scalar(he.add(he.take(he.rotate(ct, [step]), 0), ct), 0.5))
            else:
                ct = he.rescale(he.multiply_scalar(he.add_scalar(ct, 0.5), 0.9))
            cts[i] = ct
        x = {
            "square": lambda x: x * x,
            "product": lambda x, other=other: x * other,
            "plain": lambda x, w=w: x * np.tile(w, slots // 64),
            "rotate and add": lambda x, step=step: 0.5 * (x + rolled(x, step)),
            "scalar": lambda x: 0.9 * (x + 0.5),
        }[name](x)
        measured = (pair.backends[0].decrypt(cts[0], pair.secrets[0]) - x).std()
        check(np.log2(measured / pair.backends[1].noise(cts[1])))
        operations += 1
    assert operations == pair.parameters.max_level
