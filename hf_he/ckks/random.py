"""Randomness: ChaCha20 streams seeded by the operating system, and exact samplers on top. Never numpy's or torch's generators.

Public uniform polynomials (the a-halves of keys and fresh ciphertexts) are expanded from a 32-byte seed of their own, so that files
store the seed instead. Secret randomness (ternary, Gaussian) comes from separate, fresh seeds that are never stored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal, getcontext

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from hf_he.ckks.jit import kernel
from hf_he.ckks.parameters import ERROR_STANDARD_DEVIATION

SEED_BYTES = 32
_TAIL = 42
_SLACK = 64


class Stream:
    """The ChaCha20 key stream of (seed, index); a fresh operating-system seed by default."""

    def __init__(self, seed: bytes | None = None, index: int = 0) -> None:
        nonce = (0).to_bytes(4, "little") + index.to_bytes(12, "little")
        self._encryptor = Cipher(algorithms.ChaCha20(os.urandom(SEED_BYTES) if seed is None else seed, nonce), mode=None).encryptor()

    def bytes(self, count: int) -> np.ndarray:
        """[count] uint8."""
        return np.frombuffer(self._encryptor.update(bytes(count)), dtype=np.uint8)

    def words(self, count: int) -> np.ndarray:
        """[count] uint64."""
        return self.bytes(8 * count).view("<u8")


@kernel
def _reject_into(words, modulus, out):
    """Fill out with uniform centred residues from 64-bit words, rejecting the incomplete last interval; returns how many were filled."""
    limit = np.uint64(0xFFFFFFFFFFFFFFFF) // modulus * modulus
    half = modulus // np.uint64(2)
    filled = 0
    for word in words:
        if filled == out.size:
            break
        if word < limit:
            value = word % modulus
            out[filled] = np.float64(np.int64(value) - np.int64(modulus)) if value > half else np.float64(value)
            filled += 1
    return filled


def uniform_into(seed: bytes, index: int, modulus: int, out: np.ndarray) -> None:
    """Fill `out` [N] with the uniform residues modulo `modulus` that (seed, index) stand for: deterministic, centred, unbiased."""
    count = out.size + _SLACK
    while _reject_into(Stream(seed, index).words(count), np.uint64(modulus), out) < out.size:
        count *= 2


def uniform(seed: bytes, moduli: Sequence[int], ring_degree: int, first_index: int = 0) -> np.ndarray:
    """[len(moduli), N] uniform residues expanded from `seed`."""
    out = np.empty((len(moduli), ring_degree))
    for k, modulus in enumerate(moduli):
        uniform_into(seed, first_index + k, modulus, out[k])
    return out


def ternary(shape: tuple[int, ...], stream: Stream) -> np.ndarray:
    """Uniform over {-1, 0, 1}, float64, by rejection on bytes (255 = 3 * 85)."""
    size = int(np.prod(shape))
    out = np.empty(0, dtype=np.uint8)
    while out.size < size:
        drawn = stream.bytes(size - out.size + _SLACK)
        out = np.concatenate([out, drawn[drawn < 255]])
    return (out[:size] % 3).astype(np.float64).reshape(shape) - 1.0


def _magnitude_thresholds() -> np.ndarray:
    """threshold[m] = floor(2^63 * P(|x| <= m)) of the discrete Gaussian with ERROR_STANDARD_DEVIATION, to 50 digits."""
    getcontext().prec = 50
    variance = Decimal(str(ERROR_STANDARD_DEVIATION)) ** 2
    weights = [Decimal(1 if m == 0 else 2) * (-Decimal(m * m) / (2 * variance)).exp() for m in range(_TAIL)]
    total, running, thresholds = sum(weights), Decimal(0), []
    for weight in weights:
        running += weight
        thresholds.append(min(int(Decimal(2**63) * running / total), 2**63 - 1))
    return np.array(thresholds, dtype=np.uint64)


_THRESHOLDS = _magnitude_thresholds()


@kernel
def _gaussian_into(words, thresholds, out):
    """Cumulative-table inversion; every sample scans the whole table, so the time does not depend on the value."""
    for i in range(out.size):
        uniform63 = words[i] >> np.uint64(1)
        magnitude = 0
        for threshold in thresholds:
            magnitude += uniform63 >= threshold
        out[i] = np.float64(magnitude) if words[i] & np.uint64(1) else -np.float64(magnitude)


def gaussian(shape: tuple[int, ...], stream: Stream) -> np.ndarray:
    """Discrete Gaussian of standard deviation 3.19 over the integers, float64; the table is exact to 2^-63 and cut at 13 sigma."""
    out = np.empty(int(np.prod(shape)))
    _gaussian_into(stream.words(out.size), _THRESHOLDS, out)
    return out.reshape(shape)
