"""Fused sums of products: plaintext diagonals times ciphertexts, and integer matrices times ciphertexts.

Both split residues into x = x1*2^25 + x0 with |x1|, |x0| <= 2^24 (after a reduction to |x| <= q/2 < 2^49), accumulate the partial
products with plain FMAs, exactly, and reduce once per chunk of terms: 4 (plaintexts) or 2 (small integers) FMAs per product.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from hf_he.ckks.jit import kernel
from hf_he.ckks.ntt import COLUMNS
from hf_he.ckks.vector import add, fma, ld, mm, mul, red, round_mul, sp, st

TERMS = 16
"""Plaintext products per exact accumulation: the middle sum reaches 16 * 2 * 2^24 * 2^24 = 2^53."""
TILE = 4
ROWS = 6
PANEL = 16


@kernel
def _split_into(x, position, s, high, low, q0, qi0):
    """s[high:high+8], s[low:low+8] = the 25-bit halves of x[position:position+8]."""
    v = red(ld(x, position), sp(q0), sp(qi0))
    h = round_mul(v, sp(2.0**-25))
    st(s, high, h)
    st(s, low, fma(h, sp(-(2.0**25)), v))


@kernel
def _combine_into(z, position, s, at, more, shifts, q0, qi0):
    """z (+)= s[at]*2^50 + s[at+8]*2^25 + s[at+16] mod q, for sums up to 2^53 in magnitude."""
    q = sp(q0)
    qi = sp(qi0)
    high = mm(red(ld(s, at), q, qi), sp(shifts[0]), sp(shifts[1]), q)
    middle = mm(red(ld(s, at + 8), q, qi), sp(shifts[2]), sp(shifts[3]), q)
    total = red(add(add(high, middle), ld(s, at + 16)), q, qi)
    if more:
        total = red(add(total, ld(z, position)), q, qi)
    st(z, position, total)


@kernel
def _tile_products(x, x_at, x_step, w, w_step, terms, row, s):
    """Sums over k of TILE plaintext vectors times two ciphertext vectors `row` apart: 8 triples (high, middle, low) into s."""
    zero = sp(0.0)
    h00 = h01 = h10 = h11 = h20 = h21 = h30 = h31 = zero
    m00 = m01 = m10 = m11 = m20 = m21 = m30 = m31 = zero
    l00 = l01 = l10 = l11 = l20 = l21 = l30 = l31 = zero
    for k in range(terms):
        at = x_at + k * x_step
        a1 = ld(x, at)
        a0 = ld(x, at + x_step // 2)
        b1 = ld(x, at + row)
        b0 = ld(x, at + x_step // 2 + row)
        o = k * w_step
        u1 = ld(w, o)
        u0 = ld(w, o + 8)
        h00 = fma(a1, u1, h00)
        m00 = fma(a0, u1, fma(a1, u0, m00))
        l00 = fma(a0, u0, l00)
        h01 = fma(b1, u1, h01)
        m01 = fma(b0, u1, fma(b1, u0, m01))
        l01 = fma(b0, u0, l01)
        u1 = ld(w, o + 16)
        u0 = ld(w, o + 24)
        h10 = fma(a1, u1, h10)
        m10 = fma(a0, u1, fma(a1, u0, m10))
        l10 = fma(a0, u0, l10)
        h11 = fma(b1, u1, h11)
        m11 = fma(b0, u1, fma(b1, u0, m11))
        l11 = fma(b0, u0, l11)
        u1 = ld(w, o + 32)
        u0 = ld(w, o + 40)
        h20 = fma(a1, u1, h20)
        m20 = fma(a0, u1, fma(a1, u0, m20))
        l20 = fma(a0, u0, l20)
        h21 = fma(b1, u1, h21)
        m21 = fma(b0, u1, fma(b1, u0, m21))
        l21 = fma(b0, u0, l21)
        u1 = ld(w, o + 48)
        u0 = ld(w, o + 56)
        h30 = fma(a1, u1, h30)
        m30 = fma(a0, u1, fma(a1, u0, m30))
        l30 = fma(a0, u0, l30)
        h31 = fma(b1, u1, h31)
        m31 = fma(b0, u1, fma(b1, u0, m31))
        l31 = fma(b0, u0, l31)
    st(s, 0, h00)
    st(s, 8, m00)
    st(s, 16, l00)
    st(s, 24, h01)
    st(s, 32, m01)
    st(s, 40, l01)
    st(s, 48, h10)
    st(s, 56, m10)
    st(s, 64, l10)
    st(s, 72, h11)
    st(s, 80, m11)
    st(s, 88, l11)
    st(s, 96, h20)
    st(s, 104, m20)
    st(s, 112, l20)
    st(s, 120, h21)
    st(s, 128, m21)
    st(s, 136, l21)
    st(s, 144, h30)
    st(s, 152, m30)
    st(s, 160, l30)
    st(s, 168, h31)
    st(s, 176, m31)
    st(s, 184, l31)


@kernel
def _pattern_products(a, plain, out, pattern, run, k0, k1, moduli, shifts, sx, sw, so):
    """out[g, run of pattern] (+)= sum over k0 <= k < k1 of plain[g, k, pattern] * a[k, run]; a [K, N], plain [G, K, S], out [G, N]."""
    q = moduli[0]
    qi = moduli[1]
    terms = k1 - k0
    start = pattern * run
    for k in range(terms):
        for c in range(0, run, 8):
            _split_into(a[k0 + k], start + c, sx, 2 * k * run + c, (2 * k + 1) * run + c, q, qi)
    groups = out.shape[0]
    for g0 in range(0, groups, TILE):
        tile = min(TILE, groups - g0)
        for half in range(0, COLUMNS, 8):
            for k in range(terms):
                for g in range(tile):
                    _split_into(plain[g0 + g, k0 + k], pattern * COLUMNS + half, sw, (k * TILE + g) * 16, (k * TILE + g) * 16 + 8, q, qi)
            for c in range(half, run, 2 * COLUMNS):
                _tile_products(sx, c, 2 * run, sw, TILE * 16, terms, COLUMNS, so)
                for g in range(tile):
                    _combine_into(out[g0 + g], start + c, so, 48 * g, k0 > 0, shifts, q, qi)
                    _combine_into(out[g0 + g], start + c + COLUMNS, so, 48 * g + 24, k0 > 0, shifts, q, qi)


@kernel
def _dense_products(a, plain, out, start, stop, moduli):
    """The same for plaintexts without two equal rows; products within 0.58 q, reduced every 8 terms."""
    q = sp(moduli[0])
    qi = sp(moduli[1])
    for g in range(out.shape[0]):
        for c in range(start, stop, 8):
            total = sp(0.0)
            for k in range(a.shape[0]):
                w = ld(plain[g, k], c)
                total = add(total, mm(ld(a[k], c), w, mul(w, qi), q))
                if k & 7 == 7:
                    total = red(total, q, qi)
            st(out[g], c, red(total, q, qi))


@kernel(parallel=True)
def multiply_plain_sum(plain, a, out, moduli, shifts, sx, sw, so, threads):
    """out[g, r, k] = sum_j plain[g, j, k] * a[j, r, k]: plain [G, J, L, S], a [J, R, L, N], out [G, R, L, N] with R = batch*components."""
    terms, limbs, size = plain.shape[1:]
    rest, n = a.shape[1], a.shape[3]
    patterns = size // COLUMNS
    run = n // patterns
    tasks = rest * limbs * patterns
    for t in prange(threads):
        for task in range(t * tasks // threads, (t + 1) * tasks // threads):
            k = task // (rest * patterns)
            r = task // patterns % rest
            pattern = task % patterns
            if run < 2 * COLUMNS:
                _dense_products(a[:, r, k], plain[:, :, k], out[:, r, k], pattern * run, (pattern + 1) * run, moduli[k])
            else:
                for k0 in range(0, terms, TERMS):
                    _pattern_products(
                        a[:, r, k], plain[:, :, k], out[:, r, k], pattern, run, k0, min(k0 + TERMS, terms), moduli[k], shifts[k], sx[t], sw[t], so[t]
                    )


@kernel
def _gemm_panel(weights, a, out, c0, chunk, moduli, shifts, s):
    """out[i, c0:c0+PANEL] = sum_k W[i, k] a[k, c0:c0+PANEL] mod q. weights [ceil(R/ROWS), K*ROWS], a [K, N], out [R, N]."""
    q = sp(moduli[0])
    qi = sp(moduli[1])
    f = sp(shifts[2])
    fi = sp(shifts[3])
    terms = a.shape[0]
    for k in range(terms):
        for v in range(0, PANEL, 8):
            _split_into(a[k], c0 + v, s, k * 2 * PANEL + v, k * 2 * PANEL + PANEL + v, moduli[0], moduli[1])
    results = terms * 2 * PANEL
    for block in range(weights.shape[0]):
        w = weights[block]
        for start in range(0, terms, chunk):
            zero = sp(0.0)
            h0 = h1 = h2 = h3 = h4 = h5 = g0 = g1 = g2 = g3 = g4 = g5 = zero
            l0 = l1 = l2 = l3 = l4 = l5 = m0 = m1 = m2 = m3 = m4 = m5 = zero
            for k in range(start, min(start + chunk, terms)):
                a1 = ld(s, k * 32)
                b1 = ld(s, k * 32 + 8)
                a0 = ld(s, k * 32 + 16)
                b0 = ld(s, k * 32 + 24)
                y = sp(w[k * 6])
                h0, g0, l0, m0 = fma(y, a1, h0), fma(y, b1, g0), fma(y, a0, l0), fma(y, b0, m0)
                y = sp(w[k * 6 + 1])
                h1, g1, l1, m1 = fma(y, a1, h1), fma(y, b1, g1), fma(y, a0, l1), fma(y, b0, m1)
                y = sp(w[k * 6 + 2])
                h2, g2, l2, m2 = fma(y, a1, h2), fma(y, b1, g2), fma(y, a0, l2), fma(y, b0, m2)
                y = sp(w[k * 6 + 3])
                h3, g3, l3, m3 = fma(y, a1, h3), fma(y, b1, g3), fma(y, a0, l3), fma(y, b0, m3)
                y = sp(w[k * 6 + 4])
                h4, g4, l4, m4 = fma(y, a1, h4), fma(y, b1, g4), fma(y, a0, l4), fma(y, b0, m4)
                y = sp(w[k * 6 + 5])
                h5, g5, l5, m5 = fma(y, a1, h5), fma(y, b1, g5), fma(y, a0, l5), fma(y, b0, m5)
            st(s, results, h0)
            st(s, results + 8, g0)
            st(s, results + 16, l0)
            st(s, results + 24, m0)
            st(s, results + 32, h1)
            st(s, results + 40, g1)
            st(s, results + 48, l1)
            st(s, results + 56, m1)
            st(s, results + 64, h2)
            st(s, results + 72, g2)
            st(s, results + 80, l2)
            st(s, results + 88, m2)
            st(s, results + 96, h3)
            st(s, results + 104, g3)
            st(s, results + 112, l3)
            st(s, results + 120, m3)
            st(s, results + 128, h4)
            st(s, results + 136, g4)
            st(s, results + 144, l4)
            st(s, results + 152, m4)
            st(s, results + 160, h5)
            st(s, results + 168, g5)
            st(s, results + 176, l5)
            st(s, results + 184, m5)
            for i in range(min(ROWS, out.shape[0] - block * ROWS)):
                z = out[block * ROWS + i]
                for v in range(0, PANEL, 8):
                    high = red(ld(s, results + 32 * i + v), q, qi)
                    low = red(ld(s, results + 32 * i + PANEL + v), q, qi)
                    total = add(mm(high, f, fi, q), low)
                    if start > 0:
                        total = add(total, ld(z, c0 + v))
                    st(z, c0 + v, red(total, q, qi))


@kernel(parallel=True)
def integer_matrix(weights, a, out, chunk, moduli, shifts, scratch, threads):
    """out[i, r, k] = sum_j W[i, j] * a[j, r, k]: a [J, R, L, N], out [I, R, L, N]; `chunk` terms stay below 2^53."""
    rest, limbs, n = a.shape[1], a.shape[2], a.shape[3]
    panels = n // PANEL
    tasks = rest * limbs * panels
    for t in prange(threads):
        for task in range(t * tasks // threads, (t + 1) * tasks // threads):
            k = task // (rest * panels)
            r = task // panels % rest
            _gemm_panel(weights, a[:, r, k], out[:, r, k], task % panels * PANEL, chunk, moduli[k], shifts[k], scratch[t])


def panel_weights(weights: np.ndarray) -> np.ndarray:
    """[R, K] integers to [ceil(R/ROWS), K*ROWS] float64, zero padded."""
    rows, terms = weights.shape
    padded = np.zeros((-(-rows // ROWS) * ROWS, terms))
    padded[:rows] = weights
    return np.ascontiguousarray(padded.reshape(-1, ROWS, terms).transpose(0, 2, 1)).reshape(-1, terms * ROWS)
