"""Sums and products of whole states: residual connections, gates, numbers."""

from __future__ import annotations

import numpy as np

from hf_he.backends.base import Ciphertext
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand


def add(context: OperationContext, a: Operand, b: Operand) -> Ciphertext:
    """a + b at the lower of their levels. No level."""
    level = min(a.level, b.level)
    with context.backend.log.measure("linear"):
        return context.backend.add(a.at(level), b.at(level))


def multiply(context: OperationContext, a: Operand, b: Operand) -> Ciphertext:
    """a * b, one level below the lower of their levels."""
    for operand in (a, b):
        if operand.level < 1:
            operand.ensure(1)
    level = min(a.level, b.level)
    with context.backend.log.measure("activation"):
        return context.product(a.at(level), b.at(level))


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
