"""Constants, scratch memory and single-thread kernels of hybrid key switching (Han and Ki, CT-RSA 2020).

A ciphertext at level l has `limbs` = l + 1 rows; rows limbs..limbs+K-1 of the extended basis are the special moduli, at positions
`offset` further on in the chain. Digit j is the limbs j*alpha..(j+1)*alpha-1 that are present at this level.
ModUp of a digit is the exact centred lift of y mod Q_j (up to a tie, which costs one Q_j: harmless); ModDown rounds by P, or by P times the last
limb's modulus: relinearisation and rescaling in one division.

Both halves of a key are stored [modulus][N/8][digit][8], residues packed in 4, 6 or 7 bytes: two sequential streams per modulus, in memory or in
a mapped file. Keys are pulled back through their automorphism, so that the inner product runs on the un-rotated digits and one gather at the end
rotates the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hf_he.ckks.jit import kernel
from hf_he.ckks.ntt import PAD
from hf_he.ckks.number_theory import centred
from hf_he.ckks.vector import WIDTH, add, fma, ld, ld_packed, mm, mul, packed_width, prefetch, red, round_mul, sp, st

AHEAD = 8192
"""Bytes between a key's prefetch and its use. Without it a key from memory takes twice as long."""


class SwitchTables(NamedTuple):
    """Base conversion and division constants, centred; pairs are (w, w/q)."""

    digit_scale: np.ndarray  # [dnum, alpha sizes, alpha, 2]: (Q_j/q_i)^-1 mod q_i
    digit_weight: np.ndarray  # [dnum, alpha sizes, M, alpha]: Q_j/q_i mod m
    digit_modulus: np.ndarray  # [dnum, alpha sizes, M]: Q_j mod m
    special_scale: np.ndarray  # [K, 2]: (P/p_i)^-1 mod p_i
    special_weight: np.ndarray  # [M, K]: P/p_i mod m
    special_modulus: np.ndarray  # [M]: P mod m
    special_factor: np.ndarray  # [L, 2]: P mod q
    special_inverse: np.ndarray  # [L, 2]: P^-1 mod q
    last_inverse: np.ndarray  # [L, L, 2]: q_l^-1 mod q_k
    both_moduli: np.ndarray  # [L, K + 1, 2]: the special moduli and q_l, with inverses
    both_scale: np.ndarray  # [L, K + 1, 2]: as special_scale, for P*q_l
    both_weight: np.ndarray  # [L, M, K + 1]
    both_modulus: np.ndarray  # [L, M]
    both_inverse: np.ndarray  # [L, L, 2]: (P*q_l)^-1 mod q_k
    shifts: np.ndarray  # [M, 4]: 2^50 mod m with quotient, 2^25 mod m with quotient
    widths: np.ndarray  # [M]: bytes per packed residue of a key


class KeyTable(NamedTuple):
    """Packed key-switching keys. Key i covers the first ciphertext moduli only, as many as its level needs, and the special ones."""

    halves: np.ndarray  # [keys, 2]: addresses of the b-half and the a-half
    rows: np.ndarray  # [keys, M]: where in a half the stream of each modulus begins, -1 for a modulus the key does not cover
    digits: np.ndarray  # [keys]


class Scratch(NamedTuple):
    """Working memory of one parameter set; rows are PAD doubles apart."""

    block: np.ndarray  # [threads, largest column block]
    scaled: np.ndarray  # [threads, base conversion of one column block]
    pair: np.ndarray  # [threads, 2 * (N + PAD)]
    coefficients: np.ndarray  # [L, N + PAD]
    extended: np.ndarray  # [dnum * M, N + PAD], half transformed, later transformed
    accumulators: np.ndarray  # [2 * M, N + PAD]
    special: np.ndarray  # [2 * (K + 1), N + PAD]
    lifted: np.ndarray  # [2 * L, N + PAD], half transformed


def make_switch_tables(moduli: tuple[int, ...], special: tuple[int, ...], alpha: int) -> SwitchTables:
    """Constants from exact integers."""
    chain = (*moduli, *special)
    total, count, extra = len(chain), len(moduli), len(special)
    dnum = -(-count // alpha)
    tables = SwitchTables(
        np.zeros((dnum, alpha, alpha, 2)),
        np.zeros((dnum, alpha, total, alpha)),
        np.zeros((dnum, alpha, total)),
        np.zeros((extra, 2)),
        np.zeros((total, extra)),
        np.zeros(total),
        np.zeros((count, 2)),
        np.zeros((count, 2)),
        np.zeros((count, count, 2)),
        np.zeros((count, extra + 1, 2)),
        np.zeros((count, extra + 1, 2)),
        np.zeros((count, total, extra + 1)),
        np.zeros((count, total)),
        np.zeros((count, count, 2)),
        np.zeros((total, 4)),
        np.array([packed_width(m) for m in chain]),
    )

    def pair(value: int, q: int) -> tuple[float, float]:
        value = centred(value, q)
        return float(value), value / q

    for j in range(dnum):
        for size in range(1, min(alpha, count - j * alpha) + 1):
            digit = moduli[j * alpha : j * alpha + size]
            product = math.prod(digit)
            for a, q in enumerate(digit):
                tables.digit_scale[j, size - 1, a] = pair(pow(product // q, -1, q), q)
                for k, m in enumerate(chain):
                    tables.digit_weight[j, size - 1, k, a] = centred(product // q, m)
            tables.digit_modulus[j, size - 1] = [centred(product, m) for m in chain]
    p = math.prod(special)
    for i, m in enumerate(special):
        tables.special_scale[i] = pair(pow(p // m, -1, m), m)
        for k, q in enumerate(chain):
            tables.special_weight[k, i] = centred(p // m, q)
    tables.special_modulus[:] = [centred(p, m) for m in chain]
    for k, q in enumerate(moduli):
        tables.special_factor[k] = pair(p, q)
        tables.special_inverse[k] = pair(pow(p, -1, q), q)
        for last in range(k + 1, count):
            tables.last_inverse[last, k] = pair(pow(moduli[last], -1, q), q)
    for last, q in enumerate(moduli):
        both = (*special, q)
        for i, m in enumerate(both):
            tables.both_moduli[last, i] = m, 1 / m
            tables.both_scale[last, i] = pair(pow(p * q // m, -1, m), m)
            tables.both_weight[last, :, i] = [centred(p * q // m, other) for other in chain]
        tables.both_modulus[last] = [centred(p * q, m) for m in chain]
        for k in range(last):
            tables.both_inverse[last, k] = pair(pow(p * q, -1, moduli[k]), moduli[k])
    for k, m in enumerate(chain):
        tables.shifts[k] = *pair(1 << 50, m), *pair(1 << 25, m)
    return tables


def make_scratch(ring_degree: int, limbs: int, special: int, alpha: int, column_block: int, threads: int) -> Scratch:
    """Zeroed working memory."""
    row = ring_degree + PAD
    dnum, total = -(-limbs // alpha), limbs + special
    return Scratch(
        np.zeros((threads, column_block + PAD)),
        np.zeros((threads, (max(alpha, special + 1) + 1) * column_block + PAD)),
        np.zeros((threads, 2 * row)),
        np.zeros((limbs, row)),
        np.zeros((dnum * total, row)),
        np.zeros((2 * total, row)),
        np.zeros((2 * (special + 1), row)),
        np.zeros((2 * limbs, row)),
    )


@kernel
def scale_block(x, first, scale, moduli, start, size, s):
    """`size` coefficients from `start` of rows x[first..], row i modulo moduli[i]: y_i = x_i * scale_i and, after them, v = rint(sum y_i / q_i), into s."""
    count = scale.shape[0]
    for c in range(0, size, 8):
        v = sp(0.0)
        for i in range(count):
            y = mm(ld(x[first + i], start + c), sp(scale[i, 0]), sp(scale[i, 1]), sp(moduli[i, 0]))
            v = fma(y, sp(moduli[i, 1]), v)
            st(s, i * size + c, y)
        st(s, count * size + c, round_mul(v, sp(1.0)))


@kernel
def convert_block(s, count, weights, modulus, q0, qi0, u, size):
    """u = sum_i y_i * w_i - v * modulus mod q, reduced.

    |y_i| <= 0.6 * 2^50 and |w_i| <= q/2: every product is exact and within 0.6 q; with count <= 9, |v| <= 5 and the sum is below 7.9 q < 2^53.
    """
    q = sp(q0)
    qi = sp(qi0)
    negative = sp(-modulus)
    for c in range(0, size, 16):
        z0 = mul(ld(s, count * size + c), negative)
        z1 = mul(ld(s, count * size + c + 8), negative)
        for i in range(count):
            w = sp(weights[i])
            wi = mul(w, qi)
            z0 = add(z0, mm(ld(s, i * size + c), w, wi, q))
            z1 = add(z1, mm(ld(s, i * size + c + 8), w, wi, q))
        st(u, c, red(z0, q, qi))
        st(u, c + 8, red(z1, q, qi))


@kernel
def inner_product(digits, at, row, dnum, keys, i, k, width, a0, a1, q0, qi0, n):
    """a0, a1 = sum_j digits[at + j*row:] * key i modulo modulus k [:, j, 0 and 1].

    Digits within 2 q, keys within q/2: products within 0.75 q, and at most 10 of them (context.MAX_DIGITS) within 7.5 q < 2^53.
    """
    q = sp(q0)
    qi = sp(qi0)
    b = keys.halves[i, 0] + keys.rows[i, k]
    a = keys.halves[i, 1] + keys.rows[i, k]
    group = WIDTH * width
    skipped = (keys.digits[i] - dnum) * group
    for c in range(0, n, WIDTH):
        s0 = sp(0.0)
        s1 = sp(0.0)
        for j in range(dnum):
            x = ld(digits, at + j * row + c)
            k0 = ld_packed(b, width)
            k1 = ld_packed(a, width)
            prefetch(b + AHEAD)
            prefetch(a + AHEAD)
            s0 = add(s0, mm(x, k0, mul(k0, qi), q))
            s1 = add(s1, mm(x, k1, mul(k1, qi), q))
            b += group
            a += group
        b += skipped
        a += skipped
        st(a0, c, red(s0, q, qi))
        st(a1, c, red(s1, q, qi))
