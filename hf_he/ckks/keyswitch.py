"""Parallel key switching, hoisted (one ModUp for many rotations) and double-hoisted (one ModDown for many rotations; Bossuat et al.,
Eurocrypt 2021), and rescaling. Ciphertexts go through one after another, the limbs of each in parallel: its lifted digits stay in cache."""

from __future__ import annotations

from numba import prange

from hf_he.ckks.arithmetic import SUM_CHUNK
from hf_he.ckks.conversion import convert_block, inner_product, scale_block
from hf_he.ckks.jit import kernel
from hf_he.ckks.ntt import COLUMNS, PAD, forward, forward_first, forward_rest, forward_second, inverse, reduce_row
from hf_he.ckks.vector import add, gather, ld, mm, red, sp, st, sub


@kernel(parallel=True)
def mod_up(source, alpha, offset, tables, switch, scratch, threads):
    """source [limbs, N] (NTT domain) to its lifted digits: row r of digit j is scratch.extended[j*rows + r], half transformed."""
    limbs = source.shape[0]
    rows = tables.moduli.shape[0] - offset
    n1 = tables.roots1.shape[2]
    n2 = tables.roots2.shape[3]
    size = n1 * COLUMNS
    dnum = (limbs + alpha - 1) // alpha
    tasks = dnum * (n2 // COLUMNS)
    for t in prange(threads):
        for k in range(t, limbs, threads):
            inverse(source[k], scratch.coefficients[k], scratch.block[t], tables, k)
    for t in prange(threads):
        s = scratch.scaled[t]
        u = scratch.block[t]
        for task in range(t * tasks // threads, (t + 1) * tasks // threads):
            c = task // dnum
            j = task % dnum
            first = j * alpha
            count = min(alpha, limbs - first)
            scale_block(scratch.coefficients, first, switch.digit_scale[j, count - 1, :count], tables.moduli[first:], c * size, size, s)
            for r in range(rows):
                if first <= r < first + count:
                    continue
                k = r if r < limbs else r + offset
                q = tables.moduli[k, 0]
                qi = tables.moduli[k, 1]
                convert_block(s, count, switch.digit_weight[j, count - 1, k], switch.digit_modulus[j, count - 1, k], q, qi, u, size)
                forward_first(u, c, scratch.extended[j * rows + r], tables.roots1[k], q, qi, n1, n2)


@kernel
def _digit_rows(source, r, alpha, offset, tables, scratch):
    """Finish row r of every lifted digit, in place in scratch.extended; the digit's own limbs are the source itself. Returns the digit count."""
    limbs, n = source.shape
    rows = tables.moduli.shape[0] - offset
    k = r if r < limbs else r + offset
    dnum = (limbs + alpha - 1) // alpha
    for j in range(dnum):
        target = scratch.extended[j * rows + r]
        if j * alpha <= r < min((j + 1) * alpha, limbs):
            own = source[r]
            for c in range(0, n, 8):
                st(target, c, ld(own, c))
        else:
            forward_rest(target, target, tables, k, False)
    return dnum


@kernel(parallel=True)
def _lift(limbs, dropped, moduli, scale, weight, modulus, tables, scratch, threads):
    """Both components' rows to divide by (coefficients, scratch.special) to the limbs that are kept: scratch.lifted[h*kept + k], half transformed."""
    extra = moduli.shape[0]
    kept = limbs - dropped
    n1 = tables.roots1.shape[2]
    n2 = tables.roots2.shape[3]
    size = n1 * COLUMNS
    blocks = n2 // COLUMNS
    for t in prange(threads):
        s = scratch.scaled[t]
        u = scratch.block[t]
        for task in range(t * 2 * blocks // threads, (t + 1) * 2 * blocks // threads):
            h = task // blocks
            c = task % blocks
            scale_block(scratch.special, h * extra, scale, moduli, c * size, size, s)
            for k in range(kept):
                q = tables.moduli[k, 0]
                qi = tables.moduli[k, 1]
                convert_block(s, extra, weight[k], modulus[k], q, qi, u, size)
                forward_first(u, c, scratch.lifted[h * kept + k], tables.roots1[k], q, qi, n1, n2)


@kernel
def _divide_row(accumulator, lifted, k, tables, inverse, u, addend, use_addend, factor, permutation, out):
    """out = automorphism((accumulator - NTT(lifted)) * inverse + addend * factor), a factor of 0 standing for 1. The difference is within 2.5 q.

    An automorphism takes whole blocks of COLUMNS columns to whole blocks, so that every gather reads a block in L1.
    """
    n = out.size
    n2 = tables.roots2.shape[3]
    block = n2 * COLUMNS
    q0 = tables.moduli[k, 0]
    qi0 = tables.moduli[k, 1]
    q = sp(q0)
    qi = sp(qi0)
    w = sp(inverse[0])
    wi = sp(inverse[1])
    f = sp(factor[0])
    fi = sp(factor[1])
    scaling = factor[0] != 0.0
    moving = permutation.size > 0
    for o in range(0, n, block):
        source = o
        if moving:
            source = permutation[o] // block * block
        forward_second(lifted[source : source + block], u, tables.roots2[k, source // block], tables.twists[k], q0, qi0, n2)
        for c in range(0, block, 8):
            z = mm(sub(ld(accumulator, source + c), ld(u, c)), w, wi, q)
            if use_addend:
                a = ld(addend, source + c)
                if scaling:
                    a = mm(a, f, fi, q)
                z = add(z, a)
            z = red(z, q, qi)
            if moving:
                st(u, c, z)
            else:
                st(out, o + c, z)
        if moving:
            for c in range(0, block, 8):
                st(out, o + c, gather(u, permutation, o + c, source))


@kernel
def _add_scaled(x, w0, wi0, y, q0, qi0, out, n):
    """out = y + x * w, reduced."""
    q = sp(q0)
    qi = sp(qi0)
    w = sp(w0)
    wi = sp(wi0)
    for c in range(0, n, 8):
        st(out, c, red(add(ld(y, c), mm(ld(x, c), w, wi, q)), q, qi))


@kernel
def _special_rows(c, source, first, dropped, t, keys, key, alpha, offset, tables, switch, scratch, threads):
    """Thread t's share of the special rows, and the last limb's if `dropped`: digits (on the first step), inner product with the key, inverse transform."""
    limbs, n = c.shape[1], c.shape[2]
    row = n + PAD
    rows = tables.moduli.shape[0] - offset
    digits = scratch.extended.reshape(scratch.extended.size)
    x0 = scratch.pair[t, 0:row]
    x1 = scratch.pair[t, row : 2 * row]
    extra = rows - limbs + dropped
    for i in range(t, extra, threads):
        r = limbs + i if i < rows - limbs else limbs - 1
        k = r if r < limbs else r + offset
        q = tables.moduli[k, 0]
        qi = tables.moduli[k, 1]
        if first:
            _digit_rows(c[source], r, alpha, offset, tables, scratch)
        dnum = (limbs + alpha - 1) // alpha
        inner_product(digits, r * row, rows * row, dnum, keys, key, k, switch.widths[k], x0, x1, q, qi, n)
        if r < limbs:
            _add_scaled(c[0, r], switch.special_factor[r, 0], switch.special_factor[r, 1], x0, q, qi, x0, n)
            _add_scaled(c[1, r], switch.special_factor[r, 0], switch.special_factor[r, 1], x1, q, qi, x1, n)
        inverse(x0, scratch.special[i], scratch.block[t], tables, k)
        inverse(x1, scratch.special[extra + i], scratch.block[t], tables, k)


@kernel
def _ciphertext_rows(c, source, addends, first, dropped, t, keys, key, permutation, out, alpha, offset, tables, switch, scratch, threads):
    """Thread t's share of the rows that are kept: digits (on the first step), inner product, division, addends, rotation."""
    limbs, n = c.shape[1], c.shape[2]
    row = n + PAD
    rows = tables.moduli.shape[0] - offset
    digits = scratch.extended.reshape(scratch.extended.size)
    y0 = scratch.pair[t, 0:row]
    y1 = scratch.pair[t, row : 2 * row]
    u = scratch.block[t]
    kept = limbs - dropped
    inverses = switch.both_inverse[kept] if dropped else switch.special_inverse
    factors = switch.last_inverse[kept] if dropped else switch.last_inverse[0]
    for k in range(t, kept, threads):
        if first:
            _digit_rows(c[source], k, alpha, offset, tables, scratch)
        dnum = (limbs + alpha - 1) // alpha
        inner_product(digits, k * row, rows * row, dnum, keys, key, k, switch.widths[k], y0, y1, tables.moduli[k, 0], tables.moduli[k, 1], n)
        _divide_row(y0, scratch.lifted[k], k, tables, inverses[k], u, c[0, k], addends > 0, factors[k], permutation, out[0, k])
        _divide_row(y1, scratch.lifted[kept + k], k, tables, inverses[k], u, c[1, k], addends > 1, factors[k], permutation, out[1, k])


@kernel(parallel=True)
def switch_hoisted(c, source, addends, dropped, keys, key_index, permutations, out, alpha, offset, tables, switch, scratch, threads):
    """Switch component `source` of c [B, C, limbs, N] with several keys: out [S, B, 2, limbs - dropped, N].

    Component h < addends of c is added to component h of the result, then permutations [S, N] ([S, 0]: none) rotate it. `dropped` = 1, with both
    addends, divides by the last limb's modulus as well: a rescaling for 2 * limbs transforms less. The special rows come first,
    so that a ciphertext row goes from its inner product through division and rotation to its place while it is in cache.
    """
    limbs = c.shape[2]
    for b in range(c.shape[0]):
        mod_up(c[b, source], alpha, offset, tables, switch, scratch, threads)
        for step in range(key_index.size):
            key, permutation, first = key_index[step], permutations[step], step == 0
            for t in prange(threads):
                _special_rows(c[b], source, first, dropped, t, keys, key, alpha, offset, tables, switch, scratch, threads)
            if dropped:
                last = limbs - 1
                _lift(
                    limbs, 1, switch.both_moduli[last], switch.both_scale[last], switch.both_weight[last], switch.both_modulus[last], tables, scratch, threads
                )
            else:
                special = tables.moduli[limbs + offset :]
                _lift(limbs, 0, special, switch.special_scale, switch.special_weight, switch.special_modulus, tables, scratch, threads)
            for t in prange(threads):
                _ciphertext_rows(
                    c[b], source, addends, first, dropped, t, keys, key, permutation, out[step, b], alpha, offset, tables, switch, scratch, threads
                )


@kernel
def _accumulate(x, permutation, out, first):
    """out (+)= x[permutation]."""
    for c in range(0, out.size, 8):
        z = gather(x, permutation, c, 0)
        if not first:
            z = add(z, ld(out, c))
        st(out, c, z)


@kernel(parallel=True)
def switch_sum(c, keys, key_index, permutations, out, alpha, offset, tables, switch, scratch, threads):
    """sum_g automorphism_g(c[g]) for c [G, B, 2, limbs, N] -> out [B, 2, limbs, N], summed in the extended basis and divided by P once.

    key_index[g] < 0 means no automorphism. Accumulators stay below (SUM_CHUNK + 1) * 0.6 q between reductions.
    """
    groups, limbs, n = c.shape[0], c.shape[3], c.shape[4]
    rows = tables.moduli.shape[0] - offset
    row = n + PAD
    extra = rows - limbs
    digits = scratch.extended.reshape(scratch.extended.size)
    for b in range(c.shape[1]):
        for g in range(groups):
            if key_index[g] >= 0:
                mod_up(c[g, b, 1], alpha, offset, tables, switch, scratch, threads)
            for t in prange(threads):
                pair0 = scratch.pair[t, 0:row]
                pair1 = scratch.pair[t, row : 2 * row]
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
                        dnum = _digit_rows(c[g, b, 1], r, alpha, offset, tables, scratch)
                        inner_product(digits, r * row, rows * row, dnum, keys, key_index[g], k, switch.widths[k], pair0, pair1, q, qi, n)
                        if r < limbs:
                            _add_scaled(c[g, b, 0, r], switch.special_factor[r, 0], switch.special_factor[r, 1], pair0, q, qi, pair0, n)
                        _accumulate(pair0, permutations[g], a0, g == 0)
                        _accumulate(pair1, permutations[g], a1, g == 0)
                    if g % SUM_CHUNK == SUM_CHUNK - 1 or g == groups - 1:
                        reduce_row(a0, a0, q, qi)
                        reduce_row(a1, a1, q, qi)
                        if g == groups - 1 and r >= limbs:
                            inverse(a0, scratch.special[r - limbs], scratch.block[t], tables, k)
                            inverse(a1, scratch.special[extra + r - limbs], scratch.block[t], tables, k)
        _lift(limbs, 0, tables.moduli[limbs + offset :], switch.special_scale, switch.special_weight, switch.special_modulus, tables, scratch, threads)
        for t in prange(threads):
            for i in range(t, 2 * limbs, threads):
                h = i // limbs
                k = i % limbs
                _divide_row(
                    scratch.accumulators[h * rows + k], scratch.lifted[i], k, tables, switch.special_inverse[k], scratch.block[t],
                    out[b, h, k], False, switch.special_inverse[k], permutations[0, :0], out[b, h, k],
                )  # fmt: skip


@kernel(parallel=True)
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
            forward(last[r], temporary, scratch.block[t], tables, k, False)
            x = c[r, k]
            z = out[r, k]
            for j in range(0, n, 8):
                st(z, j, red(mm(sub(ld(x, j), ld(temporary, j)), w, wi, q), q, qi))
