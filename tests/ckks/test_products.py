"""Fused products are exact modulo every prime, for extreme residues too."""

import numpy as np
import pytest
from ckks_reference import random_residues, toy
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.ckks.ntt import COLUMNS


def extreme(engine, shape, limbs, seed):
    """Residues near +-q/2, where sums of products grow fastest: [*shape, limbs, N]."""
    generator = np.random.default_rng(seed)
    half = np.array([q // 2 for q in engine.context.chain[:limbs]], dtype=np.float64)[:, None]
    signs = generator.choice([-1.0, 1.0], (*shape, limbs, engine.context.ring_degree))
    return signs * (half - generator.integers(0, 3, signs.shape))


def expand(plain, n):
    """Compact plaintexts [..., S] to [..., N]."""
    patterns = plain.reshape(*plain.shape[:-1], -1, 1, COLUMNS)
    return np.broadcast_to(patterns, (*patterns.shape[:-2], n // plain.shape[-1], COLUMNS)).reshape(*plain.shape[:-1], n)


def assert_congruent(got, wanted, moduli):
    """got [..., L, N] float64 equals the integer array `wanted` modulo each prime, and is stored in range."""
    for k, q in enumerate(moduli):
        difference = got[..., k, :].astype(np.int64).astype(object) - wanted[..., k, :]
        assert not (difference % q).any()
        assert np.abs(got[..., k, :]).max() <= 0.6 * q


def integers(x):
    return np.asarray(x).astype(np.int64).astype(object)


@pytest.mark.parametrize("size", [32, 64, 256, 512, 1024])
@pytest.mark.parametrize("groups, terms", [(1, 1), (4, 16), (5, 19), (3, 33)])
def test_multiply_plain_sum_is_exact(size, groups, terms):
    engine, limbs = toy(), 2
    n = engine.context.ring_degree
    a = extreme(engine, (terms, 2), limbs, terms)
    plain = extreme(engine, (groups, terms), limbs, groups)[..., :size]
    out = engine.evaluator.multiply_plain_sum(np.ascontiguousarray(plain), a)
    wanted = np.zeros(out.shape, dtype=object)
    for g in range(groups):
        for k in range(terms):
            wanted[g] += integers(expand(plain[g, k], n))[None] * integers(a[k])
    assert_congruent(out, wanted, engine.context.chain[:limbs])


@pytest.mark.parametrize("size", [32, 128, 1024])
def test_plain_products_and_sums_are_exact(size):
    engine, limbs = toy(), 3
    a = extreme(engine, (2, 2), limbs, 1)
    plain = np.ascontiguousarray(extreme(engine, (2,), limbs, 2)[..., :size])
    full = integers(expand(plain, engine.context.ring_degree))
    assert_congruent(engine.evaluator.multiply_plain(a, plain), integers(a) * full[:, None], engine.context.chain[:limbs])
    added = integers(a)
    added[:, 0] += full
    assert_congruent(engine.evaluator.add_plain(a, plain), added, engine.context.chain[:limbs])


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 14), st.integers(1, 40), st.sampled_from([1, 2**10, 2**24, 2**25 - 1]), st.integers(0, 2**32 - 1))
def test_linear_combination_is_exact(rows, columns, largest, seed):
    engine, limbs = toy(), 2
    weights = np.random.default_rng(seed).choice([-largest, largest, largest // 2, 0], (rows, columns))
    a = extreme(engine, (columns, 2), limbs, seed % 1000)
    out = engine.evaluator.linear_combination(weights, a)
    wanted = np.tensordot(weights.astype(object), integers(a), axes=1)
    assert_congruent(out, wanted, engine.context.chain[:limbs])


def test_tensor_product_and_broadcasting_are_exact():
    engine, limbs = toy(), 3
    a, b = extreme(engine, (2, 1, 2), limbs, 1), extreme(engine, (3, 2), limbs, 2)
    out = engine.evaluator.multiply(a, b)
    x, y = integers(a), integers(b)
    wanted = np.stack(
        [x[..., 0, :, :] * y[..., 0, :, :], x[..., 0, :, :] * y[..., 1, :, :] + x[..., 1, :, :] * y[..., 0, :, :], x[..., 1, :, :] * y[..., 1, :, :]], axis=-3
    )
    assert out.shape == (2, 3, 3, limbs, engine.context.ring_degree)
    assert_congruent(out, wanted, engine.context.chain[:limbs])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_sums_are_exact(count):
    engine, limbs = toy(), 2
    a = extreme(engine, (count, 2), limbs, count)
    a[:] = np.abs(a)
    assert_congruent(engine.evaluator.sum(a), integers(a).sum(0), engine.context.chain[:limbs])


@settings(max_examples=20, deadline=None)
@given(st.integers(-(2**200), 2**200))
def test_integers_of_any_size(value):
    engine, limbs = toy(), 2
    a = random_residues(np.random.default_rng(0), engine.context.chain[:limbs], engine.context.ring_degree)[None].repeat(2, axis=0)
    assert_congruent(engine.evaluator.multiply_integer(a, value), integers(a) * value, engine.context.chain[:limbs])
    added = integers(a)
    added[0] += value
    assert_congruent(engine.evaluator.add_integer(a, value), added, engine.context.chain[:limbs])
