"""Parallel key switching, hoisted (one ModUp for many rotations) and double-hoisted (one ModDown for many rotations; Bossuat et al.,
Eurocrypt 2021), and rescaling. Ciphertexts go through one after another, the limbs of each in parallel: its lifted digits stay in cache."""

from __future__ import annotations

from numba import njit, prange

from hf_he.ckks.arithmetic import SUM_CHUNK
from hf_he.ckks.conversion import BLOCK, HOISTED, convert_block, inner_product, split_block
from hf_he.ckks.ntt import PAD, forward, inverse, reduce_row
from hf_he.ckks.vector import JIT, add, ld, mm, red, sp, st, sub


@njit(parallel=True, **JIT)
def mod_up(source, alpha, offset, tables, switch, scratch, threads):
    """source [limbs, N] (NTT domain) to its lifted digits in coefficient domain: row r of digit j is scratch.extended[j*rows + r]."""
    limbs, n = source.shape
    rows = tables.moduli.shape[0] - offset
    blocks = n // BLOCK
    for t in prange(threads):
        for k in range(t, limbs, threads):
            inverse(source[k], scratch.coefficients[k], scratch.block[t], tables, k)
    for t in prange(threads):
        s = scratch.split[t]
        for b in range(t * blocks // threads, (t + 1) * blocks // threads):
            for j in range((limbs + alpha - 1) // alpha):
                first = j * alpha
                size = min(alpha, limbs - first)
                split_block(scratch.coefficients, first, switch.digit_scale[j, size - 1, :size], tables.moduli, first, b * BLOCK, s)
                for r in range(rows):
                    if first <= r < first + size:
                        continue
                    k = r if r < limbs else r + offset
                    convert_block(
                        s, size, switch.digit_high[j, size - 1, k], switch.digit_low[j, size - 1, k], switch.digit_modulus[j, size - 1, k],
                        switch.shifts[k], tables.moduli[k, 0], tables.moduli[k, 1], scratch.extended[j * rows + r], b * BLOCK,
                    )  # fmt: skip


@njit(**JIT)
def _digit_rows(source, r, alpha, offset, tables, scratch, t):
    """Row r of every lifted digit in NTT domain into scratch.digits[t]; the digit's own limbs are the source itself. Returns the digit count."""
    limbs, n = source.shape
    rows = tables.moduli.shape[0] - offset
    row = n + PAD
    k = r if r < limbs else r + offset
    dnum = (limbs + alpha - 1) // alpha
    for j in range(dnum):
        target = scratch.digits[t, j * row : (j + 1) * row]
        if j * alpha <= r < min((j + 1) * alpha, limbs):
            own = source[r]
            for c in range(0, n, 8):
                st(target, c, ld(own, c))
        else:
            forward(scratch.extended[j * rows + r], target, scratch.block[t], tables, k)
    return dnum


@njit(parallel=True, **JIT)
def _mod_down(pairs, limbs, offset, tables, switch, scratch, threads):
    """The special rows of `pairs` accumulators, lifted to the ciphertext moduli in coefficient domain: scratch.lifted[p*limbs + k]."""
    rows = tables.moduli.shape[0] - offset
    extra = rows - limbs
    first = limbs + offset
    n = tables.twists.shape[2]
    blocks = n // BLOCK
    for t in prange(threads):
        for i in range(t, pairs * extra, threads):
            p = i // extra
            inverse(scratch.accumulators[p * rows + limbs + i % extra], scratch.special[i], scratch.block[t], tables, first + i % extra)
    for t in prange(threads):
        s = scratch.split[t]
        for i in range(t * pairs * blocks // threads, (t + 1) * pairs * blocks // threads):
            p = i // blocks
            start = i % blocks * BLOCK
            split_block(scratch.special, p * extra, switch.special_scale, tables.moduli, first, start, s)
            for k in range(limbs):
                convert_block(
                    s, extra, switch.special_high[k], switch.special_low[k], switch.special_modulus[k], switch.shifts[k],
                    tables.moduli[k, 0], tables.moduli[k, 1], scratch.lifted[p * limbs + k], start,
                )  # fmt: skip


@njit(**JIT)
def _divide_row(accumulator, lifted, k, tables, switch, scratch, t, addend, use_addend, permutation, out):
    """out = automorphism((accumulator - NTT(lifted)) / P + addend). The difference is within 2.5 q."""
    n = out.size
    q = sp(tables.moduli[k, 0])
    qi = sp(tables.moduli[k, 1])
    w = sp(switch.special_inverse[k, 0])
    wi = sp(switch.special_inverse[k, 1])
    temporary = scratch.pair[t]
    forward(lifted, temporary, scratch.block[t], tables, k)
    target = temporary if permutation.size > 0 else out
    for c in range(0, n, 8):
        z = mm(sub(ld(accumulator, c), ld(temporary, c)), w, wi, q)
        if use_addend:
            z = add(z, ld(addend, c))
        st(target, c, red(z, q, qi))
    for c in range(permutation.size):
        out[c] = temporary[permutation[c]]


@njit(parallel=True, **JIT)
def switch_hoisted(c, source, addends, keys, key_index, permutations, out, alpha, offset, tables, switch, scratch, threads):
    """Switch component `source` of c [B, C, limbs, N] with several keys: out [S, B, 2, limbs, N].

    Component h < addends of c is added to component h of the result, then permutations [S, N] ([S, 0]: none) rotate it.
    """
    limbs, n = c.shape[2], c.shape[3]
    rows = tables.moduli.shape[0] - offset
    row = n + PAD
    steps = key_index.size
    for b in range(c.shape[0]):
        mod_up(c[b, source], alpha, offset, tables, switch, scratch, threads)
        for s0 in range(0, steps, HOISTED):
            count = min(HOISTED, steps - s0)
            for t in prange(threads):
                for r in range(t, rows, threads):
                    k = r if r < limbs else r + offset
                    dnum = _digit_rows(c[b, source], r, alpha, offset, tables, scratch, t)
                    for s in range(count):
                        key = keys[key_index[s0 + s], k]
                        a0 = scratch.accumulators[2 * s * rows + r]
                        a1 = scratch.accumulators[(2 * s + 1) * rows + r]
                        inner_product(scratch.digits[t], row, dnum, key, a0, a1, tables.moduli[k, 0], tables.moduli[k, 1], n)
            _mod_down(2 * count, limbs, offset, tables, switch, scratch, threads)
            for t in prange(threads):
                for i in range(t, 2 * count * limbs, threads):
                    p = i // limbs
                    k = i % limbs
                    h = p % 2
                    _divide_row(
                        scratch.accumulators[p * rows + k], scratch.lifted[i], k, tables, switch, scratch, t,
                        c[b, h, k], h < addends, permutations[s0 + p // 2], out[s0 + p // 2, b, h, k],
                    )  # fmt: skip


@njit(**JIT)
def _accumulate(x, permutation, out, first):
    """out (+)= x[permutation]."""
    if first:
        for c in range(out.size):
            out[c] = x[permutation[c]]
    else:
        for c in range(out.size):
            out[c] += x[permutation[c]]


@njit(**JIT)
def _add_scaled(x, w0, wi0, y, q0, qi0, out, n):
    """out = y + x * w, reduced."""
    q = sp(q0)
    qi = sp(qi0)
    w = sp(w0)
    wi = sp(wi0)
    for c in range(0, n, 8):
        st(out, c, red(add(ld(y, c), mm(ld(x, c), w, wi, q)), q, qi))


@njit(parallel=True, **JIT)
def switch_sum(c, keys, key_index, permutations, out, alpha, offset, tables, switch, scratch, threads):
    """sum_g automorphism_g(c[g]) for c [G, B, 2, limbs, N] -> out [B, 2, limbs, N], summed in the extended basis and divided by P once.

    key_index[g] < 0 means no automorphism. Accumulators stay below (SUM_CHUNK + 1) * 0.6 q between reductions.
    """
    groups, limbs, n = c.shape[0], c.shape[3], c.shape[4]
    rows = tables.moduli.shape[0] - offset
    row = n + PAD
    for b in range(c.shape[1]):
        for g in range(groups):
            if key_index[g] >= 0:
                mod_up(c[g, b, 1], alpha, offset, tables, switch, scratch, threads)
            for t in prange(threads):
                pair0 = scratch.pair[t, :row]
                pair1 = scratch.pair[t, row:]
                for r in range(t, rows, threads):
                    k = r if r < limbs else r + offset
                    q = tables.moduli[k, 0]
                    qi = tables.moduli[k, 1]
                    a0 = scratch.accumulators[r, :n]
                    a1 = scratch.accumulators[rows + r, :n]
                    if g == 0:
                        a0[:] = 0.0
                        a1[:] = 0.0
                    if key_index[g] < 0:
                        if r < limbs:
                            _add_scaled(c[g, b, 0, r], switch.special_factor[r, 0], switch.special_factor[r, 1], a0, q, qi, a0, n)
                            _add_scaled(c[g, b, 1, r], switch.special_factor[r, 0], switch.special_factor[r, 1], a1, q, qi, a1, n)
                    else:
                        dnum = _digit_rows(c[g, b, 1], r, alpha, offset, tables, scratch, t)
                        inner_product(scratch.digits[t], row, dnum, keys[key_index[g], k], pair0, pair1, q, qi, n)
                        if r < limbs:
                            _add_scaled(c[g, b, 0, r], switch.special_factor[r, 0], switch.special_factor[r, 1], pair0, q, qi, pair0, n)
                        _accumulate(pair0, permutations[g], a0, g == 0)
                        _accumulate(pair1, permutations[g], a1, g == 0)
                    if g % SUM_CHUNK == SUM_CHUNK - 1 or g == groups - 1:
                        reduce_row(a0, a0, q, qi)
                        reduce_row(a1, a1, q, qi)
        _mod_down(2, limbs, offset, tables, switch, scratch, threads)
        for t in prange(threads):
            for i in range(t, 2 * limbs, threads):
                h = i // limbs
                k = i % limbs
                _divide_row(
                    scratch.accumulators[h * rows + k], scratch.lifted[i], k, tables, switch, scratch, t,
                    out[b, h, k], False, permutations[0, :0], out[b, h, k],
                )  # fmt: skip


@njit(parallel=True, **JIT)
def rescale_rows(c, out, last, tables, switch, scratch, threads):
    """c [R, limbs, N] to out [R, limbs-1, N]: division by the last modulus, rounded. `last` [R, N] is working memory."""
    count, limbs, n = c.shape
    top = limbs - 1
    for t in prange(threads):
        for r in range(t, count, threads):
            inverse(c[r, top], last[r], scratch.block[t], tables, top)
            reduce_row(last[r], last[r], tables.moduli[top, 0], tables.moduli[top, 1])
    for t in prange(threads):
        temporary = scratch.pair[t]
        for i in range(t, count * top, threads):
            r = i // top
            k = i % top
            q = sp(tables.moduli[k, 0])
            qi = sp(tables.moduli[k, 1])
            w = sp(switch.last_inverse[top, k, 0])
            wi = sp(switch.last_inverse[top, k, 1])
            forward(last[r], temporary, scratch.block[t], tables, k)
            x = c[r, k]
            z = out[r, k]
            for j in range(0, n, 8):
                st(z, j, red(mm(sub(ld(x, j), ld(temporary, j)), w, wi, q), q, qi))
