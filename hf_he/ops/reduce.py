"""Sums over the features of each lane, and selecting the first token."""

from __future__ import annotations

import numpy as np
import torch

from hf_he.backends.base import Ciphertext
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.packing import Packing


def power_steps(low: int, high: int) -> list[int]:
    """low, 2 low, 4 low, ... below high."""
    steps = []
    while low < high:
        steps.append(low)
        low *= 2
    return steps


def rotate_and_add(context: OperationContext, ct: Ciphertext, step: int) -> Ciphertext:
    """ct + rotate(ct, step). No level."""
    backend = context.backend
    return backend.add(ct, backend.take(backend.rotate(ct, [step]), 0))


def sum_features(context: OperationContext, ct: Ciphertext, width: int) -> Ciphertext:
    """Sums over `width` consecutive features, right in every feature divisible by `width`; the others hold sums that cross lanes.

    log2(width) rotations, no level.
    """
    for step in reversed(power_steps(1, width)):
        ct = rotate_and_add(context, ct, step)
    return ct


def replicate_features(context: OperationContext, ct: Ciphertext, width: int) -> Ciphertext:
    """Copy features divisible by `width` over the `width - 1` that follow, which must be zero. log2(width) rotations, no level."""
    for step in power_steps(1, width):
        ct = rotate_and_add(context, ct, -step)
    return ct


def lane_steps(packing: Packing) -> list[int]:
    """Rotations that, added one after another, sum over all token lanes."""
    return power_steps(packing.token_stride, packing.slots)


def sum_lanes(context: OperationContext, ct: Ciphertext) -> Ciphertext:
    """Sums over the token lanes, in every lane, which are cyclic. log2(T) rotations, no level."""
    for step in lane_steps(context.packing):
        ct = rotate_and_add(context, ct, step)
    return ct


def first_of(width: int, value: float = 1.0) -> np.ndarray:
    """[width] holding `value` in its first place: a periodic mask that selects features divisible by `width`."""
    mask = np.zeros(width)
    mask[0] = value
    return mask


def rotations(packing: Packing) -> set[int]:
    """Steps of `sum_features` and `replicate_features` over all features."""
    steps = power_steps(1, packing.features)
    return {*steps, *(packing.slots - step for step in steps)}


def reference(hidden_states: torch.Tensor) -> torch.Tensor:
    """[B, T, F] -> [B, F]: the first token."""
    return hidden_states[:, 0]


class WaitingToken(Operand):
    """The first token of `source`, selected when its consumer has said how many levels it needs."""

    def __init__(self, source: Operand) -> None:
        super().__init__(source.context, source.features, pooled=True)
        self._source: Operand | None = source

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    @property
    def level(self) -> int:
        if self._source is None:
            return super().ciphertext.level
        return (self._source.level or self.context.top) - 1

    def ensure(self, depth: int) -> Ciphertext:
        if self._source is not None and depth < self.context.top:
            self._source.ensure(depth + 1)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self._source is not None:
            self._ciphertext = encrypted(self.context, self._source.ensure(1))
            self._source = None
        return super().ciphertext


class Unpooled(Operand):
    """A pooled operand as a hidden state whose other tokens are zero: the gradient of the first token. No level."""

    def __init__(self, source: Operand) -> None:
        super().__init__(source.context, source.features)
        self._source = source

    @property
    def ciphertext(self) -> Ciphertext:
        return self._source.ciphertext

    @property
    def level(self) -> int:
        return self._source.level

    def ensure(self, depth: int) -> Ciphertext:
        return self._source.ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        return self._source.at_least(level)


def encrypted(context: OperationContext, ct: Ciphertext) -> Ciphertext:
    """The first token; every other token becomes zero and so stays inside the interval of the activation that follows. One level."""
    with context.backend.log.measure("linear"):
        return context.multiply_constant(ct, "first_token", lambda: context.packing.first_token)
