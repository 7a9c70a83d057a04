"""Exact number theory for tables: primes, roots of unity and their powers, centred residues. Nothing here is on a hot path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n: int) -> bool:
    """Miller-Rabin, deterministic below 3.3e24 (Sorenson and Webster 2015), hence for every modulus here."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    d = n - 1
    twos = (d & -d).bit_length() - 1
    d >>= twos
    for base in _WITNESSES:
        x = pow(base, d, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def primes_below(bound: int, step: int) -> Iterator[int]:
    """Primes = 1 mod `step`, descending from `bound` (exclusive)."""
    candidate = (bound - 2) // step * step + 1
    while candidate > step:
        if is_prime(candidate):
            yield candidate
        candidate -= step


def nearest_prime(target: float, step: int, taken: set[int]) -> int:
    """The prime = 1 mod `step` nearest to `target` that is not in `taken`."""
    centre = round((target - 1) / step)
    for distance in range(1 << 20):
        candidates = [(centre + sign * distance) * step + 1 for sign in (1, -1)]
        for candidate in sorted(candidates, key=lambda c: abs(c - target)):
            if candidate > step and candidate not in taken and is_prime(candidate):
                return candidate
    raise ArithmeticError(f"no prime = 1 mod {step} near {target}")


def primitive_root_of_unity(order: int, prime: int) -> int:
    """A primitive `order`-th root of unity mod `prime`; order a power of two dividing prime - 1. Deterministic."""
    g = 2
    while pow(g, (prime - 1) // 2, prime) != prime - 1:
        g += 1
    return pow(g, (prime - 1) // order, prime)


def centred(value: int, modulus: int) -> int:
    """The representative of value in (-modulus/2, modulus/2]."""
    value %= modulus
    return value - modulus if value > modulus // 2 else value


def powers(base: int, count: int, modulus: int, start: int = 1) -> np.ndarray:
    """[count] float64: start * base^i mod `modulus` in (-modulus/2, modulus/2], modulus below 2^50. The known part is multiplied by the next power."""
    out = np.full(count, start % modulus, dtype=np.uint64)
    known = 1
    while known < count:
        more = min(known, count - known)
        out[known : known + more] = _multiply(out[:more], pow(base, known, modulus), modulus)
        known += more
    values = out.astype(np.int64)
    return np.where(values > modulus // 2, values - modulus, values).astype(np.float64)


def _multiply(x: np.ndarray, factor: int, modulus: int) -> np.ndarray:
    """x * factor mod modulus by Horner's rule in digits of 13 bits: with everything below 2^50, no sum leaves 64 bits."""
    total = np.zeros_like(x)
    for shift in (39, 26, 13, 0):
        total = ((total << np.uint64(13)) + x * np.uint64(factor >> shift & 8191)) % np.uint64(modulus)
    return total
