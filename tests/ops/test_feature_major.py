"""Linear layers with one ciphertext per feature: integer weights, exact scales, no rotation; on both backends against numpy and torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_he.errors import LevelError, ShapeError
from hf_he.ops import feature_major, linear
from hf_he.ops.feature_major import WEIGHT_BITS, quantise
from hf_he.packing import Packing


@pytest.fixture(params=["simulator", "native"])
def wide(request, make_lab):
    """1,024 slots as 8 tokens x 128 sequences, one feature per ciphertext; no rotation key."""
    return make_lab(rotations=(), features=1, backend=request.param)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(2.0**10, 2.0**45), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_integers_and_factor_give_the_weights_back(rows, columns, factor, size, seed):
    weight = size * np.random.default_rng(seed).uniform(-1, 1, (rows, columns))
    integers, scale, multiplier = quantise(weight, factor)
    assert scale * multiplier == pytest.approx(factor, rel=1e-15)
    assert np.abs(integers).max() <= 2**WEIGHT_BITS
    bound = 0.5 / scale * (1 + 1e-9)
    assert np.abs(integers / scale - weight).max() <= bound
    if multiplier > 1:
        assert bound <= np.abs(weight).max() * 2.0**-WEIGHT_BITS


def test_zero_weights_stay_zero():
    integers, scale, multiplier = quantise(np.zeros((2, 3)), 2.0**40)
    assert not integers.any() and (scale, multiplier) == (2.0**40, 1)


def test_nan_weights_are_refused():
    with pytest.raises(ShapeError, match="NaN"):
        quantise(np.array([[np.nan]]), 2.0**40)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 7), (16, 4), (40, 40), (200, 5)])
@pytest.mark.parametrize("level", [7, 1])
def test_matrix_product_against_numpy(wide, inputs, outputs, level):
    generator = np.random.default_rng(inputs)
    states, weight = generator.uniform(-1, 1, (inputs, wide.packing.slots)), generator.normal(size=(outputs, inputs))
    out = feature_major.encrypted(wide.session, wide.backend.encrypt(states, wide.secret, level), weight)
    assert (out.batch_shape, out.level) == ((outputs,), level - 1)
    assert out.scale == pytest.approx(wide.backend.parameters.scale_at(level - 1), rel=1e-12)
    np.testing.assert_allclose(wide.backend.decrypt(out, wide.secret), feature_major.reference(states, weight), atol=2e-5, rtol=0)


def test_linear_layers_of_encrypted_tensors_take_it(wide):
    x, weight, bias = wide.states(12), wide.random(20, 12) / 4, wide.random(20)
    narrow = wide.random(6, 20) / 4
    wide.backend.log.reset()
    y = F.linear(F.linear(wide.encrypt(x), weight, bias), narrow)
    assert y.shape == (128, 8, 6)
    wide.check(y.ciphertext, F.linear(F.linear(x, weight, bias), narrow), tolerance=2e-5)
    assert y.ciphertext.level == wide.session.top - 2
    done = wide.backend.log.operations()
    assert done["linear_combination"] == 12 * 20 + 20 * 6
    assert done["encode"] == 20
    assert not {"rotate", "multiply_plain", "relinearize"} & set(done)


def test_products_follow(wide):
    x, weight = wide.states(6), wide.random(6, 6) / 8
    y = F.linear(wide.encrypt(x), weight)
    wide.check((y * y).ciphertext, F.linear(x, weight) ** 2, tolerance=2e-5)


def test_no_rotation_key_is_asked_for():
    assert linear.rotations(Packing.fit(1024, 1, 8), 48, 96) == set()


def test_errors_say_what_to_do(wide):
    state = wide.backend.encrypt(np.zeros((3, wide.packing.slots)), wide.secret, 0)
    with pytest.raises(LevelError, match="refresh"):
        feature_major.encrypted(wide.session, state, np.ones((2, 3)))
    with pytest.raises(ShapeError, match="feature ciphertexts"):
        feature_major.encrypted(wide.session, state, np.ones((2, 4)))
