"""Pointwise kernels on residue tensors [batch, component, limb, N] in NTT domain.

Every stored residue satisfies |x| <= 0.6 q ("payload range"): a product of two of them is exact and within 0.5 + 0.6*0.6/4 < 0.6 q,
a sum is reduced before it is stored. Limb l of a ciphertext is modulus l of the chain. `ia`, `ib` map output batch entries to operand
entries, so that broadcasting copies nothing.

Plaintexts are compact: a slot vector of period p takes max(2p, n1) values per limb, [n1/COLUMNS][m][COLUMNS] with m = max(1, 2p/n1),
because its values in the NTT domain depend on the exponent modulo 4p only: in the layout of `ntt` row block i of m repeats pattern i.
"""

from __future__ import annotations

from numba import prange

from hf_he.ckks.jit import kernel
from hf_he.ckks.ntt import COLUMNS
from hf_he.ckks.vector import add, fma, ld, mm, mul, red, sp, st

SUM_CHUNK = 8


@kernel(parallel=True)
def add_rows(a, ia, b, ib, out, sign, moduli):
    """out[t] = a[ia[t]] + sign * b[ib[t]]; the operand with fewer components counts as zero there."""
    batch, components, limbs, n = out.shape
    for r in prange(batch * components * limbs):
        t = r // (components * limbs)
        h = r // limbs % components
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        z = out[t, h, k]
        s = sp(sign)
        if h >= a.shape[1]:
            y = b[ib[t], h, k]
            for c in range(0, n, 8):
                st(z, c, mul(s, ld(y, c)))
        elif h >= b.shape[1]:
            x = a[ia[t], h, k]
            for c in range(0, n, 8):
                st(z, c, ld(x, c))
        else:
            x = a[ia[t], h, k]
            y = b[ib[t], h, k]
            for c in range(0, n, 8):
                st(z, c, red(fma(s, ld(y, c), ld(x, c)), q, qi))


@kernel(parallel=True)
def sum_rows(a, out, moduli):
    """out[b] = sum_g a[g, b]; a [G, B, C, L, N]. SUM_CHUNK payload residues stay below 5 q."""
    groups = a.shape[0]
    batch, components, limbs, n = out.shape
    for r in prange(batch * components * limbs):
        t = r // (components * limbs)
        h = r // limbs % components
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        z = out[t, h, k]
        for c in range(0, n, 8):
            total = sp(0.0)
            for g in range(groups):
                total = add(total, ld(a[g, t, h, k], c))
                if g % SUM_CHUNK == SUM_CHUNK - 1:
                    total = red(total, q, qi)
            st(z, c, red(total, q, qi))


@kernel(parallel=True)
def multiply_rows(a, ia, b, ib, out, moduli):
    """Tensor product of 2-component ciphertexts: out [B, 3, L, N]."""
    batch, _, limbs, n = out.shape
    for r in prange(batch * limbs):
        t = r // limbs
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        a0 = a[ia[t], 0, k]
        a1 = a[ia[t], 1, k]
        b0 = b[ib[t], 0, k]
        b1 = b[ib[t], 1, k]
        for c in range(0, n, 8):
            x0 = ld(a0, c)
            x1 = ld(a1, c)
            y0 = ld(b0, c)
            y1 = ld(b1, c)
            v0 = mul(y0, qi)
            v1 = mul(y1, qi)
            st(out[t, 0, k], c, mm(x0, y0, v0, q))
            st(out[t, 1, k], c, red(add(mm(x0, y1, v1, q), mm(x1, y0, v0, q)), q, qi))
            st(out[t, 2, k], c, mm(x1, y1, v1, q))


@kernel(parallel=True)
def scale_rows(a, factors, out, moduli):
    """out = a * factors[k] for limb k; factors centred."""
    batch, components, limbs, n = out.shape
    for r in prange(batch * components * limbs):
        t = r // (components * limbs)
        h = r // limbs % components
        k = r % limbs
        q = sp(moduli[k, 0])
        w = sp(factors[k])
        wi = sp(factors[k] / moduli[k, 0])
        x = a[t, h, k]
        for c in range(0, n, 8):
            st(out[t, h, k], c, mm(ld(x, c), w, wi, q))


@kernel(parallel=True)
def add_plain_rows(a, ia, plain, ip, out, moduli):
    """Component 0 of a plus a compact plaintext [P, L, S]; the other components are copied."""
    batch, components, limbs, n = out.shape
    size = plain.shape[2]
    for r in prange(batch * components * limbs):
        t = r // (components * limbs)
        h = r // limbs % components
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        x = a[ia[t], h, k]
        z = out[t, h, k]
        if h > 0:
            for c in range(0, n, 8):
                st(z, c, ld(x, c))
        else:
            w = plain[ip[t], k]
            run = n // (size // COLUMNS)
            for pattern in range(size // COLUMNS):
                for half in range(0, COLUMNS, 8):
                    y = ld(w, pattern * COLUMNS + half)
                    for c in range(pattern * run + half, (pattern + 1) * run, COLUMNS):
                        st(z, c, red(add(ld(x, c), y), q, qi))


@kernel(parallel=True)
def multiply_plain_rows(a, ia, plain, ip, out, moduli):
    """a times a compact plaintext [P, L, S]."""
    batch, components, limbs, n = out.shape
    size = plain.shape[2]
    run = n // (size // COLUMNS)
    for r in prange(batch * components * limbs):
        t = r // (components * limbs)
        h = r // limbs % components
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        x = a[ia[t], h, k]
        z = out[t, h, k]
        w = plain[ip[t], k]
        for pattern in range(size // COLUMNS):
            for half in range(0, COLUMNS, 8):
                y = ld(w, pattern * COLUMNS + half)
                yi = mul(y, qi)
                for c in range(pattern * run + half, (pattern + 1) * run, COLUMNS):
                    st(z, c, mm(ld(x, c), y, yi, q))


@kernel(parallel=True)
def weighted_sum(a, weights, constants, out, moduli):
    """out[b, h, i] = sum_k weights[k, i] * a[k, b, h, i], plus constants[i] on component 0: a [K, B, C, L, N], centred weights.

    Products within 0.6 q and a constant within 0.5 q: K <= 12 terms stay below 2^53.
    """
    terms = a.shape[0]
    batch, components, limbs, n = out.shape
    for r in prange(batch * components * limbs):
        b = r // (components * limbs)
        h = r // limbs % components
        i = r % limbs
        q = sp(moduli[i, 0])
        qi = sp(moduli[i, 1])
        constant = sp(constants[i] if h == 0 else 0.0)
        for c in range(0, n, 8):
            total = constant
            for k in range(terms):
                w = sp(weights[k, i])
                total = add(total, mm(ld(a[k, b, h, i], c), w, mul(w, qi), q))
            st(out[b, h, i], c, red(total, q, qi))
