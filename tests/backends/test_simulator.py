"""What only the simulator has: a noise estimate that matches the noise it adds, and overflow detection."""

import numpy as np
import pytest

from hf_he.backends.simulator import SimulatorBackend
from hf_he.ckks.parameters import parameter_set
from hf_he.errors import ScaleMismatchError


@pytest.fixture(scope="module")
def party():
    backend = SimulatorBackend(parameter_set("n14"), seed=1)
    secret = backend.generate_secret_key()
    backend.load_evaluation_keys(backend.generate_evaluation_keys(secret, [1, 2]))
    return backend, secret


def test_the_estimate_is_the_noise(party):
    he, secret = party
    x = np.random.default_rng(0).uniform(-1, 1, (2, he.parameters.slots))
    w = np.random.default_rng(1).uniform(-1, 1, 128)
    public = he.generate_public_key(secret)
    ct = he.encrypt(x, public)
    stages = [(ct, x)]
    ct = he.rescale(he.multiply_plain(ct, he.encode(w, ct.level)))
    x = x * np.tile(w, he.parameters.slots // 128)
    stages.append((ct, x))
    ct = he.add(ct, he.take(he.rotate(ct, [1]), 0))
    x = x + np.roll(x, -1, axis=-1)
    stages.append((ct, x))
    ct = he.relinearize(he.rescale(he.multiply(ct, ct)))
    x = x * x
    stages.append((ct, x))
    for ciphertext, expected in stages:
        measured = (he.decrypt(ciphertext, secret) - expected).std(axis=-1)
        np.testing.assert_allclose(he.noise(ciphertext), measured, rtol=0.1)


def test_fresh_noise_is_far_below_a_thousandth(party):
    he, secret = party
    ct = he.encrypt(np.zeros(he.parameters.slots), he.generate_public_key(secret))
    assert 1e-9 < he.noise(ct) < 1e-6


def test_overflow_names_the_level(party):
    he, secret = party
    ct = he.encrypt(np.full(he.parameters.slots, 400.0), secret, level=0)
    with pytest.raises(ScaleMismatchError, match="level 0"):
        he.add(ct, ct)


def test_a_wrong_scale_gives_wrong_values(party):
    he, secret = party
    ct = he.encrypt(np.ones(he.parameters.slots), secret)
    doubled = he.multiply_scalar(ct, 1.0, scale=2.0)
    np.testing.assert_allclose(he.decrypt(doubled, secret), 1.0, atol=1e-6)
    assert doubled.scale == 2 * ct.scale


def test_rotation_steps_are_recorded():
    backend = SimulatorBackend(parameter_set("n13"), seed=2)
    secret = backend.generate_secret_key()
    backend.load_evaluation_keys(backend.generate_evaluation_keys(secret, [1, -1]))
    ct = backend.encrypt(np.zeros((2, backend.parameters.slots)), secret)
    backend.rotate(ct, [0, 1])
    backend.sum_rotated(ct, [0, -1])
    assert backend.rotations_used == {1: 2, backend.parameters.slots - 1: 1}


def test_a_modulus_beyond_the_largest_double_is_readable():
    backend = SimulatorBackend(parameter_set("n16"))
    secret = backend.generate_secret_key()
    ciphertext = backend.encrypt(np.ones(backend.parameters.slots), secret)
    again = backend.deserialize(backend.serialize(ciphertext), "ciphertext")
    assert backend.parameters.log2_modulus(again.level) > 1024 and again.scale == ciphertext.scale
