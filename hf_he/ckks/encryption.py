"""Pointwise kernels of encryption and decryption."""

from __future__ import annotations

from numba import prange

from hf_he.ckks.jit import kernel
from hf_he.ckks.vector import add, ld, mm, mul, red, sp, st, sub


@kernel(parallel=True)
def encrypt_rows(out, payload, secret, moduli):
    """out[:, 0] = payload - out[:, 1] * s; out [B, 2, L, N], payload [B, L, N]."""
    batch, _, limbs, n = out.shape
    for r in prange(batch * limbs):
        i = r // limbs
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        for c in range(0, n, 8):
            s = ld(secret[k], c)
            st(out[i, 0, k], c, red(sub(ld(payload[i, k], c), mm(ld(out[i, 1, k], c), s, mul(s, qi), q)), q, qi))


@kernel(parallel=True)
def encrypt_public_rows(out, mask, b, a, payload, noise, moduli):
    """out = (b*u + payload, a*u + noise) for the ternary masks u [B, L, N]."""
    batch, _, limbs, n = out.shape
    for r in prange(batch * limbs):
        i = r // limbs
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        for c in range(0, n, 8):
            u = ld(mask[i, k], c)
            ui = mul(u, qi)
            st(out[i, 0, k], c, red(add(mm(ld(b[k], c), u, ui, q), ld(payload[i, k], c)), q, qi))
            st(out[i, 1, k], c, red(add(mm(ld(a[k], c), u, ui, q), ld(noise[i, k], c)), q, qi))


@kernel(parallel=True)
def decrypt_rows(ct, secret, out, moduli):
    """out = c0 + c1*s (+ c2*s^2) on the first out.shape[1] limbs; ct [B, 2 or 3, L, N], out [B, limbs, N]."""
    batch, limbs, n = out.shape
    components = ct.shape[1]
    for r in prange(batch * limbs):
        i = r // limbs
        k = r % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        for c in range(0, n, 8):
            s = ld(secret[k], c)
            si = mul(s, qi)
            total = ld(ct[i, components - 1, k], c)
            for h in range(components - 2, -1, -1):
                total = red(add(ld(ct[i, h, k], c), mm(total, s, si, q)), q, qi)
            st(out[i, k], c, total)


@kernel(parallel=True)
def mixed_radix(residues, digits, inverse, moduli):
    """Centred mixed-radix digits (Garner) of residues [B, limbs, N]; inverse[j, i] = q_j^-1 mod q_i."""
    batch, limbs, n = residues.shape
    for i in prange(batch):
        for k in range(limbs):
            q = sp(moduli[k, 0])
            qi = sp(moduli[k, 1])
            for c in range(0, n, 8):
                z = ld(residues[i, k], c)
                for j in range(k):
                    w = sp(inverse[j, k])
                    z = mm(red(sub(z, red(ld(digits[i, j], c), q, qi)), q, qi), w, mul(w, qi), q)
                st(digits[i, k], c, red(z, q, qi))
