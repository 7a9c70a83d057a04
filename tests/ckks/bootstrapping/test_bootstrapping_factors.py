"""The factored embedding against the embedding itself."""

import numpy as np
import pytest

from hf_he.ckks.bootstrapping.factors import coefficients_to_slots, slots_to_coefficients
from hf_he.ckks.encoder import to_coefficients
from hf_he.ckks.ntt import bit_reversal


def apply(factors, values):
    for factor in factors:
        values = factor(values)
    return values


@pytest.mark.parametrize("slots", [64, 512, 1024])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_factors_are_the_embedding(slots, stages):
    generator = np.random.default_rng(slots + stages)
    values = generator.uniform(-1, 1, slots)
    coefficients = to_coefficients(values, 2.0**50) / 2.0**50
    packed = (coefficients[:slots] + 1j * coefficients[slots:])[bit_reversal(slots)]
    np.testing.assert_allclose(apply(slots_to_coefficients(slots, stages), packed), values, atol=1e-11)
    np.testing.assert_allclose(apply(coefficients_to_slots(slots, stages), values), packed, atol=1e-11)


def test_complex_slots_come_back():
    generator = np.random.default_rng(1)
    values = generator.normal(size=(2, 256)) + 1j * generator.normal(size=(2, 256))
    back = apply(slots_to_coefficients(256, 3), apply(coefficients_to_slots(256, 3), values))
    np.testing.assert_allclose(back, values, atol=1e-12)


def test_sizes_at_full_size():
    """Strides and periods of N = 2^16: two of the three factors have short plaintexts, the third wraps around to 32 diagonals."""
    shapes = [(f.stride, f.period, len(f.diagonals)) for f in slots_to_coefficients(1 << 15, 3)]
    assert shapes == [(1, 32, 63), (32, 1024, 63), (1024, 32768, 32)]
    assert [f.stride for f in coefficients_to_slots(1 << 15, 3)] == [1024, 32, 1]
