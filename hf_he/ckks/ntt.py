"""Negacyclic number-theoretic transforms of float64 residues, N = n1 x n2, in L1-resident blocks of COLUMNS columns.

Layouts (any fixed order will do, and with these every pass is contiguous):
- coefficients: [n2/COLUMNS][n1][COLUMNS], i.e. coefficient r*n2 + c of X sits in column c, row r;
- NTT domain: [n1/COLUMNS][n2][COLUMNS]: column c, row r holds the value at psi^(2*rev(c) + 1 + 2*n1*rev(r)), rev = bit reversal.

Ranges in units of q (bounds of `vector.mm` and `vector.red`; tests/ckks/test_ntt.py propagates them pass by pass):
forward: any integers below 2^53, reduced on load -> |out| <= 2.0; inverse: |in| <= 0.75 -> |out| <= 0.75; every product operand < 4.
Payloads are stored with |x| <= 0.6 q.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from hf_he.ckks.jit import kernel
from hf_he.ckks.number_theory import powers, primitive_root_of_unity
from hf_he.ckks.vector import add, ld, mm, mul, red, sp, st, sub, transpose8

COLUMNS = 16
PAD = 64
"""Doubles between scratch rows, so that rows a power of two apart do not fall into the same cache sets."""


class NTTTables(NamedTuple):
    """Per modulus k: q, 1/q; roots of the two column transforms (forward w, w/q, inverse v, v/q); twists (forward, inverse with 1/N).

    The twist of column c, row r is psi^(r * (2*rev(c) + 1)). What the columns of one block share of it is part of that block's roots, the rest is
    the same for every block: N/4 + 32 n2 doubles in all, which stay in cache where a table of N would not.
    """

    moduli: np.ndarray  # [M, 2]
    roots1: np.ndarray  # [M, 4, n1]
    roots2: np.ndarray  # [M, n1/COLUMNS, 4, n2]
    twists: np.ndarray  # [M, 2, n2*COLUMNS]


def split_degree(ring_degree: int) -> tuple[int, int]:
    """(n1, n2), n1 <= n2, both at least 32."""
    log = ring_degree.bit_length() - 1
    return 1 << log // 2, 1 << (log - log // 2)


def bit_reversal(size: int) -> np.ndarray:
    """[size] int64."""
    out = np.zeros(1, dtype=np.int64)
    while len(out) < size:
        out = np.concatenate([2 * out, 2 * out + 1])
    return out


def _to_ntt_layout(grid: np.ndarray) -> np.ndarray:
    """[n2 rows, n1 columns] to the flat NTT-domain layout."""
    n2, n1 = grid.shape
    return np.ascontiguousarray(grid.reshape(n2, n1 // COLUMNS, COLUMNS).transpose(1, 0, 2)).reshape(-1)


def coefficient_order(ring_degree: int) -> np.ndarray:
    """[N]: position i of the coefficient layout holds coefficient order[i]."""
    n1, n2 = split_degree(ring_degree)
    return np.ascontiguousarray(np.arange(ring_degree).reshape(n1, n2 // COLUMNS, COLUMNS).transpose(1, 0, 2)).reshape(-1)


def evaluation_exponents(ring_degree: int) -> np.ndarray:
    """[N]: position i of the NTT domain holds the value at psi^exponent[i]."""
    n1, n2 = split_degree(ring_degree)
    return _to_ntt_layout(2 * bit_reversal(n1)[None, :] + 1 + 2 * n1 * bit_reversal(n2)[:, None])


def automorphism(ring_degree: int, galois: int) -> np.ndarray:
    """[N] int32 p with NTT(a(X^galois))[i] = NTT(a)[p[i]]."""
    exponents = evaluation_exponents(ring_degree)
    position = np.zeros(2 * ring_degree, dtype=np.int32)
    position[exponents] = np.arange(ring_degree, dtype=np.int32)
    return position[exponents * galois % (2 * ring_degree)]


def make_tables(ring_degree: int, moduli: tuple[int, ...]) -> NTTTables:
    """Tables for all `moduli`, from exact integers."""
    n1, n2 = split_degree(ring_degree)
    order, blocks, count = 2 * ring_degree, n1 // COLUMNS, len(moduli)
    rev1, rev2 = bit_reversal(n1), bit_reversal(n2)
    strides = np.array([0] + [n2 >> index.bit_length() for index in range(1, n2)])
    shared = 2 * bit_reversal(blocks)[:, None] + 1
    first, second = n2 * rev1, (n1 * (rev2 - strides) + strides * shared) % order
    twist = (np.arange(n2)[:, None] * bit_reversal(COLUMNS) * (n1 // (COLUMNS // 2)) % order).reshape(-1)
    tables = NTTTables(np.zeros((count, 2)), np.zeros((count, 4, n1)), np.zeros((count, blocks, 4, n2)), np.zeros((count, 2, n2 * COLUMNS)))
    for k, q in enumerate(moduli):
        psi = primitive_root_of_unity(order, q)
        plain = powers(psi, order, q)
        scaled = powers(psi, order, q, start=pow(ring_degree, -1, q))
        tables.moduli[k] = q, 1 / q
        for roots, exponents in ((tables.roots1[k], first), (tables.roots2[k], second)):
            roots[..., 0, :], roots[..., 2, :] = plain[exponents], plain[-exponents % order]
            roots[..., 1, :], roots[..., 3, :] = roots[..., 0, :] / q, roots[..., 2, :] / q
        tables.twists[k] = plain[twist], scaled[-twist % order]
    return tables


@kernel
def forward_columns(u, size, roots, q0, qi0):
    """`size`-point transforms of COLUMNS columns of u [size][COLUMNS], in place, radix 4; a0 is reduced in every second pass."""
    q = sp(q0)
    qi = sp(qi0)
    log = 0
    while (1 << log) < size:
        log += 1
    reduce = ((log + 1) >> 1) & 1
    m = 1
    t = size
    while m < size:
        if m * 4 <= size:
            t >>= 2
            step = t * COLUMNS
            for i in range(m):
                w1 = sp(roots[0, m + i])
                v1 = sp(roots[1, m + i])
                w2 = sp(roots[0, 2 * m + 2 * i])
                v2 = sp(roots[1, 2 * m + 2 * i])
                w3 = sp(roots[0, 2 * m + 2 * i + 1])
                v3 = sp(roots[1, 2 * m + 2 * i + 1])
                for k in range(4 * i * step, 4 * i * step + step, 8):
                    a0 = ld(u, k)
                    if reduce:
                        a0 = red(a0, q, qi)
                    a1 = ld(u, k + step)
                    a2 = mm(ld(u, k + 2 * step), w1, v1, q)
                    a3 = mm(ld(u, k + 3 * step), w1, v1, q)
                    s0 = add(a0, a2)
                    d0 = sub(a0, a2)
                    x = mm(add(a1, a3), w2, v2, q)
                    y = mm(sub(a1, a3), w3, v3, q)
                    st(u, k, add(s0, x))
                    st(u, k + step, sub(s0, x))
                    st(u, k + 2 * step, add(d0, y))
                    st(u, k + 3 * step, sub(d0, y))
            m *= 4
        else:
            for i in range(m):
                w1 = sp(roots[0, m + i])
                v1 = sp(roots[1, m + i])
                for k in range(2 * i * COLUMNS, 2 * i * COLUMNS + COLUMNS, 8):
                    a0 = red(ld(u, k), q, qi)
                    a1 = mm(ld(u, k + COLUMNS), w1, v1, q)
                    st(u, k, add(a0, a1))
                    st(u, k + COLUMNS, sub(a0, a1))
            m *= 2
        reduce = 1 - reduce


@kernel
def inverse_columns(u, size, roots, q0, qi0):
    """The inverse of `forward_columns` times `size`."""
    q = sp(q0)
    qi = sp(qi0)
    m = size
    t = 1
    log = 0
    while (1 << log) < size:
        log += 1
    if log & 1:
        m >>= 1
        for i in range(m):
            w1 = sp(roots[2, m + i])
            v1 = sp(roots[3, m + i])
            for k in range(2 * i * COLUMNS, 2 * i * COLUMNS + COLUMNS, 8):
                a0 = ld(u, k)
                a1 = ld(u, k + COLUMNS)
                st(u, k, red(add(a0, a1), q, qi))
                st(u, k + COLUMNS, mm(sub(a0, a1), w1, v1, q))
        t = 2
    while m > 1:
        m >>= 2
        step = t * COLUMNS
        for i in range(m):
            w1 = sp(roots[2, m + i])
            v1 = sp(roots[3, m + i])
            w2 = sp(roots[2, 2 * m + 2 * i])
            v2 = sp(roots[3, 2 * m + 2 * i])
            w3 = sp(roots[2, 2 * m + 2 * i + 1])
            v3 = sp(roots[3, 2 * m + 2 * i + 1])
            for k in range(4 * i * step, 4 * i * step + step, 8):
                a0 = ld(u, k)
                a1 = ld(u, k + step)
                a2 = ld(u, k + 2 * step)
                a3 = ld(u, k + 3 * step)
                s0 = add(a0, a1)
                s1 = add(a2, a3)
                d0 = mm(sub(a0, a1), w2, v2, q)
                d1 = mm(sub(a2, a3), w3, v3, q)
                st(u, k, red(add(s0, s1), q, qi))
                st(u, k + step, red(add(d0, d1), q, qi))
                st(u, k + 2 * step, mm(sub(s0, s1), w1, v1, q))
                st(u, k + 3 * step, mm(sub(d0, d1), w1, v1, q))
        t *= 4


@kernel
def reduce_row(x, y, q0, qi0):
    """y = x mod q, centred."""
    q = sp(q0)
    qi = sp(qi0)
    for c in range(0, x.size, 8):
        st(y, c, red(ld(x, c), q, qi))


@kernel
def forward_first(u, c, y, roots, q, qi, n1, n2):
    """First half for column block c, coefficients c*n1*COLUMNS and on, |u| <= 0.6 q: column transforms of u in place, transposed into y."""
    forward_columns(u, n1, roots, q, qi)
    for r in range(0, n1, 8):
        o = (r // COLUMNS) * n2 * COLUMNS + c * COLUMNS * COLUMNS + r % COLUMNS
        for k in range(0, COLUMNS, 8):
            transpose8(u, r * COLUMNS + k, COLUMNS, y, o + k * COLUMNS, COLUMNS)


@kernel
def forward_second(x, y, roots, twists, q, qi, n2):
    """Second half of one block x [n2][COLUMNS] of the first half's result, into y (which may be x): twist, column transforms."""
    vq = sp(q)
    vi = sp(qi)
    for k in range(0, n2 * COLUMNS, 8):
        w = ld(twists[0], k)
        st(y, k, mm(ld(x, k), w, mul(w, vi), vq))
    forward_columns(y, n2, roots, q, qi)


@kernel
def forward_rest(x, y, tables, k, centred):
    """The second half of every block of row x into y: |y| <= 2 q, reduced if `centred`."""
    q = tables.moduli[k, 0]
    qi = tables.moduli[k, 1]
    n2 = tables.roots2.shape[3]
    block = n2 * COLUMNS
    for b in range(tables.roots2.shape[1]):
        z = y[b * block : (b + 1) * block]
        forward_second(x[b * block : (b + 1) * block], z, tables.roots2[k, b], tables.twists[k], q, qi, n2)
        if centred:
            reduce_row(z, z, q, qi)


@kernel
def forward(x, y, u, tables, k, centred):
    """NTT modulo modulus k: x (coefficients) -> y; |y| <= 2 q, reduced if `centred`. u is scratch for one block."""
    q = tables.moduli[k, 0]
    qi = tables.moduli[k, 1]
    n1 = tables.roots1.shape[2]
    n2 = tables.roots2.shape[3]
    vq = sp(q)
    vi = sp(qi)
    for c in range(n2 // COLUMNS):
        base = c * n1 * COLUMNS
        for j in range(0, n1 * COLUMNS, 8):
            st(u, j, red(ld(x, base + j), vq, vi))
        forward_first(u, c, y, tables.roots1[k], q, qi, n1, n2)
    forward_rest(y, y, tables, k, centred)


@kernel
def inverse(y, x, u, tables, k):
    """Inverse NTT modulo modulus k: y (NTT domain, |y| <= 0.75 q) -> x (coefficients, |x| <= 0.75 q)."""
    q = tables.moduli[k, 0]
    qi = tables.moduli[k, 1]
    n1 = tables.roots1.shape[2]
    n2 = tables.roots2.shape[3]
    vq = sp(q)
    vi = sp(qi)
    block = n2 * COLUMNS
    twists = tables.twists[k]
    for c in range(n1 // COLUMNS):
        for j in range(0, block, 8):
            st(u, j, ld(y, c * block + j))
        inverse_columns(u, n2, tables.roots2[k, c], q, qi)
        for j in range(0, block, 8):
            w = ld(twists[1], j)
            st(u, j, mm(ld(u, j), w, mul(w, vi), vq))
        for r in range(0, n2, 8):
            o = (r // COLUMNS) * n1 * COLUMNS + c * COLUMNS * COLUMNS + r % COLUMNS
            for j in range(0, COLUMNS, 8):
                transpose8(u, r * COLUMNS + j, COLUMNS, x, o + j * COLUMNS, COLUMNS)
    block = n1 * COLUMNS
    for c in range(n2 // COLUMNS):
        inverse_columns(x[c * block : (c + 1) * block], n1, tables.roots1[k], q, qi)


@kernel(parallel=True)
def forward_rows(x, y, chain, tables, scratch, threads):
    """NTT of rows x [R, N] modulo moduli chain[r] into y [R, N], centred. One source row may serve several moduli: x [R / r, N]."""
    rows = y.shape[0]
    group = rows // x.shape[0]
    for t in prange(threads):
        for r in range(t, rows, threads):
            forward(x[r // group], y[r], scratch[t], tables, chain[r], True)


@kernel(parallel=True)
def inverse_rows(y, x, chain, tables, scratch, threads):
    """Inverse NTT of rows y [R, N] modulo moduli chain[r] into x [R, N], centred."""
    for t in prange(threads):
        for r in range(t, y.shape[0], threads):
            k = chain[r]
            inverse(y[r], x[r], scratch[t], tables, k)
            reduce_row(x[r], x[r], tables.moduli[k, 0], tables.moduli[k, 1])
