"""The polynomial behind the approximate modular reduction (Han and Ki, CT-RSA 2020).

x mod 1 is sin(2 pi x) / (2 pi) near the integers. sin(2 pi x) = cos(2 pi (x - 1/4)) is `DOUBLE_ANGLES` double angles of the slow cosine
cos(2 pi (x - 1/4) / 2^r), an even function of t = (x - 1/4) / HALF_WIDTH: a Chebyshev series of degree 15 in u = 2 t^2 - 1, on the whole interval.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hf_he.ckks.bootstrapping.plan import DOUBLE_ANGLES, OVERFLOW_BOUND

SHIFT = 0.25
HALF_WIDTH = OVERFLOW_BOUND + SHIFT + 1.0 / 16.0
"""The argument t = (x - SHIFT) / HALF_WIDTH stays in [-1, 1] for messages up to 1/16 of the modulus."""


@lru_cache(maxsize=4)
def cosine_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients of the slow cosine on the Chebyshev polynomials in u."""

    def slow(t):
        return np.cos(2 * np.pi * HALF_WIDTH / 2**DOUBLE_ANGLES * t)

    return tuple(np.polynomial.chebyshev.chebinterpolate(slow, 8 * degree)[: 2 * degree + 1 : 2])


def reduce_plain(x: np.ndarray, degree: int) -> np.ndarray:
    """sin(2 pi x) as the ciphertexts compute it, in floating point: the reference of the encrypted evaluation."""
    t = (x - SHIFT) / HALF_WIDTH
    y = np.polynomial.chebyshev.chebval(2 * t * t - 1, cosine_coefficients(degree))
    for _ in range(DOUBLE_ANGLES):
        y = 2 * y * y - 1
    return y


def certified_error(degree: int) -> float:
    """Bound on |reduce_plain(x) - sin(2 pi x)| over the interval: dropped coefficients, amplified by 4 per double angle, plus rounding."""
    dropped = float(np.abs(cosine_coefficients(3 * degree)[degree + 1 :]).sum())
    return (dropped + 64 * np.finfo(float).eps) * 4**DOUBLE_ANGLES


def divide_chebyshev(coefficients: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """p = quotient * T_m + remainder in the Chebyshev basis, deg p < 2m, by T_m T_j = (T_(m+j) + T_(m-j)) / 2."""
    quotient, remainder = 2 * coefficients[m:], coefficients[:m].copy()
    quotient[0] /= 2
    for j in range(1, len(quotient)):
        remainder[m - j] -= coefficients[m + j]
    return quotient, remainder
