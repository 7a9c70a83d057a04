"""The embedding is the evaluation at the roots zeta^(5^j), and compact plaintexts equal their periodic continuation."""

import numpy as np
import pytest
from ckks_reference import compose, toy
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.ckks.encoder import to_coefficients, to_values
from hf_he.ckks.ntt import COLUMNS


def test_slots_are_evaluations():
    n, generator = 64, np.random.default_rng(0)
    values = generator.uniform(-1, 1, n // 2)
    coefficients = to_coefficients(values, 2.0**40)
    roots = np.exp(1j * np.pi * np.array([pow(5, j, 2 * n) for j in range(n // 2)]) / n)
    assert np.allclose(np.polynomial.polynomial.polyval(roots, coefficients) / 2.0**40, values, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_round_trip(log_slots, seed):
    values = np.random.default_rng(seed).uniform(-1e3, 1e3, (2, 1 << log_slots))
    assert np.allclose(to_values(to_coefficients(values, 2.0**40), 2.0**40), values, atol=1e-8)


@pytest.mark.parametrize("period", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_compact_plaintexts_repeat(period):
    engine = toy()
    n, slots = engine.context.ring_degree, engine.parameters.slots
    values = np.random.default_rng(period).uniform(-1, 1, (3, period))
    compact = engine.evaluator.encode(values, 2, 2.0**40)
    full = engine.evaluator.encode(np.tile(values, slots // period), 2, 2.0**40)
    patterns = compact.reshape(3, 3, -1, 1, COLUMNS)
    expanded = np.broadcast_to(patterns, (*patterns.shape[:3], n // patterns[0, 0].size, COLUMNS)).reshape(3, 3, n)
    assert compact.shape[-1] <= max(2 * period, 32)
    q = np.array(engine.context.chain[:3], dtype=np.float64)[:, None]
    assert np.array_equal((expanded - full) % q, np.zeros_like(full))


@pytest.mark.parametrize("scale", [2.0**30, 2.0**40, 2.0**80])
@pytest.mark.parametrize("period", [4, 512])
def test_coefficients_of_any_size_are_exact(scale, period):
    engine = toy()
    values = np.random.default_rng(1).uniform(-1, 1, period)
    n = engine.context.ring_degree
    expected = np.zeros(n, dtype=object)
    expected[:: n // (2 * period)] = [int(c) for c in to_coefficients(values, scale)]
    rows = engine.evaluator.encode(np.tile(values, 512 // period), 3, scale)
    rounded = np.array(engine.coefficients(rows, 4)) - expected
    assert max(abs(rounded)) <= (1 if scale < 2**50 else scale * 2.0**-50)
    compact = engine.evaluator.encode(values, 3, scale)
    if compact.shape == rows.shape:
        assert compose(compact, engine.context.chain[:4]) == compose(rows, engine.context.chain[:4])
