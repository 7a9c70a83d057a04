"""Sums and products of whole states: residual connections, gates, numbers."""

from __future__ import annotations

import numpy as np

from hf_he.backends.base import Ciphertext
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand


class WaitingSum(Operand):
    """a + b at the lower of their levels, computed when first read, no higher than its consumer asks. No level.

    A residual sum is what a state is needed for last, so the rotations kept for its linear maps are let go of.
    """

    def __init__(self, a: Operand, b: Operand) -> None:
        super().__init__(a.context, a.features, pooled=a.pooled)
        self._summands: tuple[Operand, Operand] | None = (a, b)

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    @property
    def level(self) -> int:
        if self._summands is None:
            return super().ciphertext.level
        return min(summand.level for summand in self._summands)

    def select(self, rows: np.ndarray) -> Operand:
        if self._summands is None:
            return super().select(rows)
        a, b = self._summands
        return type(self)(a.select(rows), b.select(rows))

    def at_least(self, level: int) -> Ciphertext:
        if self._summands is not None:
            level = min(level, self.level)
            with self.context.backend.log.measure("linear"):
                a, b = (summand.at(level) for summand in self._summands)
                self._ciphertext = self.context.backend.add(a, b)
            for summand in self._summands:
                summand.forget_babies()
            self._summands = None
        return super().ciphertext


def multiply(a: Operand, b: Operand) -> Operand:
    """a * b, one level below the lower of their levels."""
    for operand in (a, b):
        if operand.level < 1:
            operand.ensure(1)
    level = min(a.level, b.level)
    with a.context.backend.log.measure("activation"):
        return Operand(a.context, a.features, a.context.product(a.at(level), b.at(level)), a.pooled)


def scaled(gradient: Operand, factor: Operand, output: int = 1) -> Operand:
    """gradient * factor at level `output`, or as high as the parameters allow: what meets the gradient of a product, as low as it can be."""
    context = gradient.context
    level = min(output + 1, context.top)
    gradient.prepare(level)
    factor.prepare(level)
    with context.backend.log.measure("activation"):
        return Operand(context, gradient.features, context.product(gradient.at(level), factor.at(level)), gradient.pooled)


def add_number(context: OperationContext, operand: Operand, number: float) -> Ciphertext:
    """operand + number in every feature it holds; padding features, and other tokens of a pooled operand, stay 0. No level."""
    packing, ct = context.packing, operand.ciphertext

    def build() -> np.ndarray:
        row = np.zeros(packing.blocks(operand.features) * packing.features)
        row[: operand.features] = number
        row = row.reshape(-1, packing.features)
        return np.tile(row, packing.slots // packing.features) * packing.first_token if operand.pooled else row

    with context.backend.log.measure("linear"):
        plain = context.constant(("number", number, operand.features, operand.pooled), ct.level, ct.scale, build)
        return context.backend.add_plain(ct, plain)


def multiply_number(context: OperationContext, operand: Operand, number: float) -> Ciphertext:
    """operand * number: one level."""
    backend, ct = context.backend, operand.ensure(1)
    with backend.log.measure("linear"):
        return backend.rescale(backend.multiply_scalar(ct, number, context.canonical_factor(ct.level, ct.scale)))
