"""The embedding as a product of sparse matrices: slots = U w with w_k = c_k + i c_(k + n) for the coefficients c, n = N/2 slots.

U is n^(1/2) times a unitary matrix. Up to the bit reversal of w it is a product of log2(n) butterfly levels of three diagonals; groups of
levels make factors of up to 2^(levels + 1) - 1 diagonals, all at multiples of one stride. The diagonals of a factor repeat with the period
of its longest butterfly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Factor:
    """out[j] = sum_s diagonals[s][j mod period] * in[j + s*stride], cyclic over `slots`."""

    slots: int
    stride: int
    period: int
    diagonals: dict[int, np.ndarray]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """[*batch, slots] to [*batch, slots]: the plain reference."""
        repeat = self.slots // self.period
        return sum(np.tile(d, repeat) * np.roll(values, -s * self.stride, axis=-1) for s, d in self.diagonals.items())

    def scaled(self, factor: float) -> Factor:
        """The same matrix times a number."""
        return Factor(self.slots, self.stride, self.period, {s: d * factor for s, d in self.diagonals.items()})


def _butterfly(slots: int, length: int, inverse: bool) -> dict[int, np.ndarray]:
    """Diagonals (keyed by offset in slots, each [slots]) of one level of the embedding, or of its inverse."""
    half = length // 2
    powers = np.empty(half, dtype=np.int64)
    power = 1
    for j in range(half):
        powers[j] = power
        power = power * 5 % (4 * length)
    root = np.exp(2j * np.pi * powers / (4 * length))
    ones, zeros = np.ones(half, dtype=complex), np.zeros(half, dtype=complex)
    if inverse:
        parts = {0: (ones, -root.conj()), half: (ones, zeros), -half: (zeros, root.conj())}
    else:
        parts = {0: (ones, -root), half: (root, zeros), -half: (zeros, ones)}
    out: dict[int, np.ndarray] = {}
    for offset, (lower, upper) in parts.items():
        vector = np.tile(np.concatenate([lower, upper]), slots // length)
        out[offset % slots] = out.get(offset % slots, 0) + vector * (0.5 if inverse else 1.0)
    return out


def _compose(outer: dict[int, np.ndarray], inner: dict[int, np.ndarray], slots: int) -> dict[int, np.ndarray]:
    out: dict[int, np.ndarray] = {}
    for a, x in outer.items():
        for b, y in inner.items():
            offset = (a + b) % slots
            out[offset] = out.get(offset, 0) + x * np.roll(y, -a)
    return out


def _groups(slots: int, stages: int) -> list[list[int]]:
    """Butterfly lengths per factor, shortest first, as even as possible."""
    log = slots.bit_length() - 1
    bounds = [log * i // stages for i in range(stages + 1)]
    return [[1 << (level + 1) for level in range(low, high)] for low, high in pairwise(bounds)]


def _factor(slots: int, lengths: list[int], inverse: bool) -> Factor:
    product: dict[int, np.ndarray] = {0: np.ones(slots, dtype=complex)}
    for length in sorted(lengths, reverse=inverse):
        product = _compose(_butterfly(slots, length, inverse), product, slots)
    stride, period = min(lengths) // 2, max(lengths)
    width = slots // stride
    signed = {(s // stride + width // 2) % width - width // 2 if period < slots else s // stride: d[:period] for s, d in product.items()}
    return Factor(slots, stride, period, dict(sorted(signed.items())))


def slots_to_coefficients(slots: int, stages: int) -> list[Factor]:
    """Factors in order of application: bit-reversed w to slots."""
    return [_factor(slots, lengths, inverse=False) for lengths in _groups(slots, stages)]


def coefficients_to_slots(slots: int, stages: int) -> list[Factor]:
    """Factors of the inverse, in order of application: slots to bit-reversed w."""
    return [_factor(slots, lengths, inverse=True) for lengths in reversed(_groups(slots, stages))]


def _widened(factor: Factor) -> Factor:
    """The same map of vectors with period `factor.slots`, on twice as many slots."""
    return Factor(2 * factor.slots, factor.stride, factor.period, factor.diagonals)


def _masked(factor: Factor, lower: complex, upper: complex, inputs: bool) -> Factor:
    """`_widened`, its outputs (or its inputs) times `lower` in the lower half of the slots and `upper` in the upper half."""
    wide = 2 * factor.slots
    mask = np.repeat(np.array([lower, upper]), factor.slots)
    tiled = {s: np.tile(d, wide // factor.period) for s, d in factor.diagonals.items()}
    return Factor(wide, factor.stride, wide, {s: d * (np.roll(mask, -s * factor.stride) if inputs else mask) for s, d in tiled.items()})


def sparse_coefficients_to_slots(slots: int, stages: int) -> list[Factor]:
    """On vectors of period `slots`: the result's real part holds that of w in the lower, the imaginary part of w in the upper half of 2*slots."""
    *factors, last = coefficients_to_slots(slots, stages)
    return [*map(_widened, factors), _masked(last, 1, -1j, inputs=False)]


def sparse_slots_to_coefficients(slots: int, stages: int) -> list[Factor]:
    """The inverse, from those two real halves. The result is complete once it is added to itself, rotated by `slots`."""
    first, *factors = slots_to_coefficients(slots, stages)
    return [_masked(first, 1, 1j, inputs=True), *map(_widened, factors)]
