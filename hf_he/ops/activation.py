"""Elementwise polynomial activations."""

from __future__ import annotations

import math

import torch

from hf_he.approximation import Polynomial
from hf_he.backends.base import Ciphertext
from hf_he.ops import arithmetic, polynomial
from hf_he.ops.context import OperationContext
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand
from hf_he.ops.placement import ActivationLevels

DEFAULT_LEVELS = ActivationLevels()

LARGEST_BATCH = 64
"""Ciphertexts that are evaluated at once."""

SLOPE_LEVEL = 2
"""Level of the derivative where it meets the gradient: the product has one level for a linear map."""


def reference(hidden_states: torch.Tensor, approximation: Polynomial) -> torch.Tensor:
    return approximation(hidden_states)


def encrypted(context: OperationContext, operand: Operand, approximation: Polynomial, levels: ActivationLevels = DEFAULT_LEVELS) -> Ciphertext:
    """The polynomial of every feature: `approximation.depth` levels, plus one for mapping its interval to [-1, 1] unless the linear map
    that feeds it does that.

    A waiting linear map is computed so that the result is at levels.output: by default 1, so that the next linear map, which usually
    narrows the state again, runs before a refresh. Padding features, and other tokens of a pooled operand, enter as 0.
    """
    return evaluated(context, mapped(context, operand, approximation, levels.output), approximation)


def mapped(context: OperationContext, operand: Operand, approximation: Polynomial, output: int) -> Ciphertext:
    """The input on [-1, 1], `output` levels above the depth of the polynomial if the parameters have that many, never below it."""
    low, high = approximation.interval
    gain, shift = 2.0 / (high - low), -(high + low) / (high - low)
    depth = polynomial.depth(approximation.coefficients)
    if isinstance(operand, WaitingLinear) and operand.waiting:
        level = min(depth + output, context.top - 1)
        operand.source.ensure(level + 1)
        ct = operand.compute(level, gain, shift)
    else:
        ct = _mapped(context, operand, gain, shift, min(depth + output, context.top))
    return context.ensure_level(ct, depth)


def evaluated(context: OperationContext, ct: Ciphertext, approximation: Polynomial) -> Ciphertext:
    """The polynomial of a mapped input."""
    backend = context.backend
    flat = backend.reshape(ct, (ct.count,))

    def part(own: range) -> Ciphertext:
        return _in_pieces(context, backend.take(flat, slice(own.start, own.stop)), approximation.coefficients)

    with backend.log.measure("activation"):
        return backend.reshape(context.sharded(ct.count, part), ct.batch_shape)


def _in_pieces(context: OperationContext, ct: Ciphertext, coefficients: tuple[float, ...]) -> Ciphertext:
    """The series of a batch [n]; wide batches, of one feature per ciphertext, in pieces: powers are several times the input's size."""
    backend, piece = context.backend, math.gcd(ct.count, LARGEST_BATCH)
    if ct.count <= LARGEST_BATCH:
        return polynomial.evaluate(backend, ct, coefficients)
    pieces = (backend.take(ct, slice(start, start + piece)) for start in range(0, ct.count, piece))
    return backend.reshape(backend.stack([polynomial.evaluate(backend, piece, coefficients) for piece in pieces]), (ct.count,))


def gradient(context: OperationContext, ct: Ciphertext, approximation: Polynomial, upstream: Operand) -> Operand:
    """upstream * p'(x) for a mapped input `ct` at SLOPE_LEVEL + depth or higher: the derivative of the very polynomial.

    The product is at level 1, so that the linear map before the activation can be passed before a refresh.
    """
    coefficients = approximation.derivative_coefficients
    depth = polynomial.depth(coefficients)
    level = min(SLOPE_LEVEL, context.top - depth)
    ct = context.backend.drop_level(context.ensure_level(ct, depth + level), depth + level)
    with context.backend.log.measure("activation"):
        slope = _in_pieces(context, ct, coefficients)
    return arithmetic.scaled(upstream, Operand(context, upstream.features, slope))


def _mapped(context: OperationContext, operand: Operand, gain: float, shift: float, depth: int) -> Ciphertext:
    backend = context.backend
    ct = operand.ensure(depth)
    with backend.log.measure("activation"):
        ct = backend.rescale(backend.multiply_scalar(ct, gain, context.canonical_factor(ct.level, ct.scale)))
        if not operand.pooled:
            return backend.add_scalar(ct, shift) if shift else ct
        return backend.add_plain(ct, context.constant(("shift", shift), ct.level, ct.scale, lambda: shift * context.packing.first_token))
