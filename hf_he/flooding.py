"""Noise for decrypted values that others may see.

A CKKS decryption is the exact result plus an error that depends on the secret key, so whoever computed on the ciphertext and sees the decryption learns about
the key (IND-CPA^D; Li and Micciancio, Eurocrypt 2021). Gaussian noise hides it: what is shown of `count` values with errors of at most `error` has a
Kullback-Leibler divergence of at most count * error^2 / (2 * deviation^2) from what would be shown had there been no errors (Li, Micciancio, Schultz and
Sorrell, Crypto 2022). That bounds the information about the errors, hence about the key, and adds up over everything that is ever shown.
"""

from __future__ import annotations

import math

import numpy as np

from hf_he.ckks.random import Stream
from hf_he.errors import ParameterError

GRID_BITS = 10
"""Shown values are multiples of the deviation over 2^10, which leaves nothing of the pattern that floating point gives a sum."""


def flood(values: np.ndarray, deviation: float) -> np.ndarray:
    """`values` [...] plus Gaussian noise of this standard deviation, or up to twice as much, from operating-system randomness.

    The deviation is rounded up to a power of two. Raises ParameterError unless it is positive and finite.
    """
    if not (math.isfinite(deviation) and deviation > 0):
        raise ParameterError(f"the deviation of flooding noise must be positive, got {deviation}")
    grid = 2.0 ** (math.ceil(math.log2(deviation)) - GRID_BITS)
    values = np.asarray(values, dtype=np.float64)
    return np.rint(values / grid + 2.0**GRID_BITS * _normals(values.size).reshape(values.shape)) * grid


def leaked_bits(error: float, count: int, deviation: float) -> float:
    """Bits of information about errors of at most `error` that `count` values show through flooding of `deviation`, at most."""
    return count * (error / deviation) ** 2 / (2 * math.log(2))


def _normals(count: int) -> np.ndarray:
    """[count] standard normals by Box and Muller from 53-bit uniforms: exact but for a tail beyond 8.5, of probability 2^-53."""
    uniform = (Stream().words(2 * count) >> np.uint64(11)).astype(np.float64).reshape(2, count)
    return np.sqrt(-2 * np.log((uniform[0] + 1) * 2.0**-53)) * np.cos(2 * np.pi * 2.0**-53 * uniform[1])
