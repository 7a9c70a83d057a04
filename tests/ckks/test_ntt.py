"""The float64 transforms against evaluation in Python integers, and the proof of their ranges."""

import numpy as np
import pytest
from ckks_reference import apply_automorphism, evaluate, random_residues, toy_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.ckks import ntt
from hf_he.ckks.jit import KERNEL_LOCK
from hf_he.ckks.number_theory import primitive_root_of_unity


def transform(ring_degree, moduli, rows, chain=None, inverse=False):
    """Through the parallel kernels, coefficient layout on the coefficient side."""
    tables = ntt.make_tables(ring_degree, moduli)
    scratch = np.zeros((2, max(ntt.split_degree(ring_degree)) * ntt.COLUMNS + ntt.PAD))
    out = np.empty_like(rows)
    chain = np.arange(len(rows)) if chain is None else chain
    with KERNEL_LOCK:
        (ntt.inverse_rows if inverse else ntt.forward_rows)(rows, out, chain, tables, scratch, 2)
    return out


def chain_of(log2_degree):
    p = toy_parameters(log2_degree, levels=1)
    return (*p.moduli, *p.special_moduli)


@pytest.mark.parametrize("log2_degree", range(10, 17))
def test_every_size_inverts_and_evaluates(log2_degree):
    n, moduli = 1 << log2_degree, chain_of(log2_degree)
    rows = random_residues(np.random.default_rng(log2_degree), moduli, n)
    values = transform(n, moduli, rows)
    assert np.array_equal(transform(n, moduli, values, inverse=True), rows)
    natural = np.empty(n)
    exponents, order = ntt.evaluation_exponents(n), ntt.coefficient_order(n)
    for k in (0, 1):
        natural[order] = rows[k]
        for position in (0, 1, n // 3, n - 1):
            assert (evaluate(natural, exponents[position], n, moduli[k]) - int(values[k, position])) % moduli[k] == 0


@pytest.mark.parametrize("log2_degree", [10, 13, 16])
def test_tables_are_the_powers_of_psi(log2_degree):
    """roots2 and twists, from their definition: twist times the path of roots evaluates column c at psi^(2*rev(c) + 1)."""
    n, moduli = 1 << log2_degree, chain_of(log2_degree)[:1]
    tables, (n1, n2), q = ntt.make_tables(n, moduli), ntt.split_degree(n), moduli[0]
    psi, reverse = primitive_root_of_unity(2 * n, q), ntt.bit_reversal(n1)
    for c, r in ((0, 0), (1, 1), (17, n2 - 1), (n1 - 1, n2 // 2 + 3)):
        block, lane = divmod(c, ntt.COLUMNS)
        shared = (2 * reverse[c] + 1) - (2 * reverse[lane])
        twist = int(tables.twists[0, 0, r * ntt.COLUMNS + lane])
        assert (twist - pow(psi, int(2 * reverse[lane] * r), q)) % q == 0
        assert (int(tables.twists[0, 1, r * ntt.COLUMNS + lane]) * twist * n - 1) % q == 0
        for m in (1, 2, n2 // 2):
            for i in {0, m // 2, m - 1}:
                root = int(tables.roots2[0, block, 0, m + i])
                angle = int(shared) * (n2 // (2 * m)) + 2 * n1 * (n2 // (2 * m)) * int(ntt.bit_reversal(m)[i])
                assert (root - pow(psi, angle, q)) % q == 0
                assert (int(tables.roots2[0, block, 2, m + i]) * root - 1) % q == 0
    for table in (tables.roots1[:, :, 1:], tables.roots2[..., 1:]):
        values = np.moveaxis(table, -2, 0)
        assert np.array_equal(values[1::2], values[::2] / q) and np.abs(values[::2]).max() <= q // 2
    assert np.abs(tables.twists).max() <= q // 2


@pytest.mark.parametrize("fill", ["largest", "smallest", "alternating"])
def test_extreme_residues(fill):
    n, moduli = 1024, chain_of(10)
    half = np.array([q // 2 for q in moduli], dtype=np.float64)[:, None]
    pattern = {"largest": np.ones(n), "smallest": -np.ones(n), "alternating": (-1.0) ** np.arange(n)}[fill]
    rows = half * pattern
    assert np.array_equal(transform(n, moduli, transform(n, moduli, rows), inverse=True), rows)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1023))
def test_automorphisms_are_permutations(seed, half_exponent):
    n, moduli, galois = 1024, chain_of(10)[:1], 2 * half_exponent + 1
    order = ntt.coefficient_order(n)
    natural = random_residues(np.random.default_rng(seed), moduli, n)[0]
    rotated = np.array(apply_automorphism(natural, galois))
    before, after = transform(n, moduli, natural[order][None]), transform(n, moduli, rotated[order][None])
    assert np.array_equal(before[0][ntt.automorphism(n, galois)], after[0])


def product_range(a, w_error=1 / 16):
    """|a*w mod q| / q for |w| <= q/2 (see vector.mm); the operand must stay below 4 q."""
    assert a < 4
    return 0.5 + a * w_error


COMPUTED_QUOTIENT, REDUCED = 1 / 8, 0.5 + 2.0**-20


def forward_range(log_size, start):
    """Bounds pass by pass through `forward_columns`, as the kernel alternates reductions."""
    x, m, reduce = start, 0, ((log_size + 1) >> 1) & 1
    while m < log_size:
        inner = product_range(x)
        if m + 2 <= log_size:
            x = (REDUCED if reduce else x) + inner + product_range(x + inner)
            m += 2
        else:
            x = REDUCED + inner
            m += 1
        reduce = 1 - reduce
    return x


def inverse_range(log_size, start):
    x = start
    if log_size & 1:
        x = max(REDUCED, product_range(2 * x))
    for _ in range(log_size // 2):
        difference = product_range(2 * x)
        x = max(REDUCED, product_range(4 * x), product_range(2 * difference))
    return x


@pytest.mark.parametrize("log2_degree", range(10, 17))
def test_ranges_are_proved(log2_degree):
    """The documented bounds, for every modulus below 2^50: forward ends within 2 q, inverse within 0.75 q, all operands below 4 q."""
    n1, n2 = (size.bit_length() - 1 for size in ntt.split_degree(1 << log2_degree))
    middle = product_range(forward_range(n1, REDUCED), COMPUTED_QUOTIENT)
    assert forward_range(n2, middle) <= 2.0
    middle = product_range(inverse_range(n2, 0.75), COMPUTED_QUOTIENT)
    assert inverse_range(n1, middle) <= 0.75
