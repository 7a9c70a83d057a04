"""The canonical embedding: slot vectors (real, inside bootstrapping complex) to integer polynomials and back, and their residues in NTT domain.

Slot j is the value at zeta^(5^j), zeta = exp(i*pi/N), so X -> X^(5^s) rotates the slots left by s. A vector of period p is a polynomial in
X^(N/2p): it is encoded in the ring of degree 2p, at 2p values per limb, whatever N is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import prange

from hf_he.ckks.jit import kernel
from hf_he.ckks.ntt import COLUMNS, bit_reversal, evaluation_exponents, split_degree
from hf_he.ckks.number_theory import powers, primitive_root_of_unity
from hf_he.ckks.vector import WIDTH, add, ld, mm, mul, red, sp, st, sub

EXACT_INTEGERS = 2.0**52


@lru_cache(maxsize=32)
def _slot_positions(ring_degree: int) -> np.ndarray:
    """[slots]: slot j is the value at zeta^(2*position[j] + 1)."""
    exponents = np.empty(ring_degree // 2, dtype=np.int64)
    power = 1
    for j in range(ring_degree // 2):
        exponents[j] = power
        power = power * 5 % (2 * ring_degree)
    return (exponents - 1) // 2


@lru_cache(maxsize=32)
def _half_roots(ring_degree: int) -> np.ndarray:
    """[N] zeta^k."""
    return np.exp(1j * np.pi * np.arange(ring_degree) / ring_degree)


def to_coefficients(values: np.ndarray, scale: float) -> np.ndarray:
    """[*batch, p] real or complex values to the rounded coefficients [*batch, 2p] of scale * embedding^-1, integers in float64, natural order."""
    period = values.shape[-1]
    degree = 2 * period
    evaluations = np.empty((*values.shape[:-1], degree), dtype=values.dtype)
    positions = _slot_positions(degree)
    evaluations[..., positions] = values
    evaluations[..., degree - 1 - positions] = values.conj()
    transformed = np.fft.fft(evaluations, axis=-1)
    return np.rint((transformed * _half_roots(degree).conj()).real * (scale / degree))


def to_complex_values(coefficients: np.ndarray, scale: float) -> np.ndarray:
    """[*batch, N] coefficients to [*batch, N/2] complex slot values."""
    degree = coefficients.shape[-1]
    evaluations = np.fft.ifft(coefficients * _half_roots(degree), axis=-1)
    return evaluations[..., _slot_positions(degree)] * (degree / scale)


def to_values(coefficients: np.ndarray, scale: float) -> np.ndarray:
    """[*batch, N] coefficients to [*batch, N/2] slot values (real parts)."""
    return to_complex_values(coefficients, scale).real


class CompactTransform:
    """NTTs of polynomials in X^(N/d) for d < N, in the compact plaintext layout of `arithmetic`."""

    def __init__(self, ring_degree: int, moduli: tuple[int, ...]) -> None:
        self.ring_degree = ring_degree
        half = ring_degree // 2
        reversal = bit_reversal(ring_degree)[:half]
        self.roots = np.empty((len(moduli), half))
        for k, q in enumerate(moduli):
            psi = primitive_root_of_unity(2 * ring_degree, q)
            self.roots[k] = powers(psi, ring_degree, q)[reversal]
        self.moduli = np.array([[q, 1 / q] for q in moduli])
        self._patterns: dict[int, np.ndarray] = {}

    def pattern(self, degree: int) -> np.ndarray:
        """[S]: entry s of the compact layout is output s of the degree-`degree` transform."""
        if degree not in self._patterns:
            n1, n2 = split_degree(self.ring_degree)
            rows = max(1, degree // n1)
            exponents = evaluation_exponents(self.ring_degree).reshape(n1 // COLUMNS, rows, n2 // rows, COLUMNS)[:, :, 0].reshape(-1)
            self._patterns[degree] = bit_reversal(degree)[(exponents % (2 * degree) - 1) // 2]
        return self._patterns[degree]

    def __call__(self, coefficients: np.ndarray, limbs: int) -> np.ndarray:
        """[B, d] integer coefficients below 2^53 to [B, limbs, S] centred residues."""
        batch, degree = coefficients.shape
        pattern = self.pattern(degree)
        lanes = np.zeros((-(-batch // WIDTH) * WIDTH, degree))
        lanes[:batch] = coefficients
        lanes = np.ascontiguousarray(lanes.reshape(-1, WIDTH, degree).transpose(0, 2, 1)).reshape(-1, degree * WIDTH)
        out = np.empty((batch, limbs, pattern.size))
        _compact_transforms(lanes, self.roots, self.moduli, pattern, out)
        return out


@kernel(parallel=True)
def _compact_transforms(lanes, roots, moduli, pattern, out):
    """Radix-2 transforms of eight polynomials at a time, lanes [G, d*8]; both operands stay within 1.1 q."""
    batch, limbs, size = out.shape
    degree = lanes.shape[1] // 8
    for task in prange(lanes.shape[0] * limbs):
        g = task // limbs
        k = task % limbs
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        u = np.empty(degree * 8)
        for c in range(0, degree * 8, 8):
            st(u, c, red(ld(lanes[g], c), q, qi))
        m = 1
        t = degree // 2
        while m < degree:
            for i in range(m):
                w = sp(roots[k, m + i])
                wi = mul(w, qi)
                for c in range(2 * i * t * 8, (2 * i * t + t) * 8, 8):
                    x = red(ld(u, c), q, qi)
                    y = mm(ld(u, c + t * 8), w, wi, q)
                    st(u, c, add(x, y))
                    st(u, c + t * 8, sub(x, y))
            m *= 2
            t //= 2
        for c in range(0, degree * 8, 8):
            st(u, c, red(ld(u, c), q, qi))
        for lane in range(min(8, batch - 8 * g)):
            for s in range(size):
                out[8 * g + lane, k, s] = u[pattern[s] * 8 + lane]
