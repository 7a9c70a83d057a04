"""Gaussian-kernel attention (Rho et al., ICLR 2025) with one ciphertext per feature (`Packing` with c = 1, slot = token * B + sequence).

Diagonals j = g * b + a of the token-by-token matrix are taken un-aligned, as in hf_he.ops.attention: D_j = rotate(k, a) - rotate(q, -g b), per feature.
Sums over a head's features are sums of ciphertexts, so scores cost no rotation and one relinearisation per diagonal, and each already is a full
ciphertext: T of them per head, whose weights multiply rotate(v, a) without being copied anywhere. One head after another, which bounds the memory by
the rotations of one head's features; ranks of a sharded server take heads of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hf_he.approximation import KernelExponential
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError, UnsupportedEncryptedOperation
from hf_he.ops import attention
from hf_he.ops.attention import DEFAULT_LEVELS
from hf_he.ops.context import OperationContext
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import TOKEN_BABY_STEPS, Packing

reference = attention.reference


def encrypted(
    context: OperationContext,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Ciphertext | None,
    heads: int,
    scaling: float,
    approximation: KernelExponential,
    levels: AttentionLevels = DEFAULT_LEVELS,
    causal: bool = False,
) -> Ciphertext:
    """Un-normalised kernel attention [features], at level `levels.value` - 1, canonical.

    `mask`: [1] from `pack_attention_mask`. The T scores of a head are refreshed together where the kernel needs more levels than they have. Per feature
    b - 1 hoisted rotations at levels.query - 1 and levels.value, and 2 (T / b - 1) others. Raises UnsupportedEncryptedOperation for a causal mask.
    """
    if causal:
        raise UnsupportedEncryptedOperation("causal attention has no form with one feature per ciphertext: pack the hidden size of the model")
    if query.features % heads:
        raise ShapeError(f"{heads} heads do not divide {query.features} features")
    backend, width = context.backend, query.features // heads
    gain = math.sqrt(0.5 * scaling / approximation.degree)
    wanted = ((query, levels.query - 1, gain), (key, levels.query - 1, gain), (value, levels.value + (mask is not None), 1.0))
    _prepare([(operand, level) for operand, level, _ in wanted])
    if mask is not None:
        mask = backend.match_level(context.ensure_level(mask, levels.value + 1), levels.value + 1)

    def computed(own: range) -> Ciphertext:
        outputs = []
        for head in own:
            rows = np.arange(head * width, (head + 1) * width)
            q, k, v = (_projected(_rows(operand, rows), level, factor) for operand, level, factor in wanted)
            with backend.log.measure("attention"):
                v = v if mask is None else context.product(v, mask)
                weights = attention.kernel(context, scores(context, q, k), approximation.squarings, levels.value)
                outputs.append(weighted_sum(context, weights, v))
        return backend.stack(outputs)

    together = context.shards is not None and context.refresh is not None and context.refresh.lanes > 1  # batches in turns must not part here
    return backend.reshape(computed(range(heads)) if together else context.sharded(heads, computed), (query.features,))


def baby_count(packing: Packing) -> int:
    return min(TOKEN_BABY_STEPS, packing.tokens)


def baby_steps(packing: Packing) -> list[int]:
    """Rotations by 0 .. b - 1 tokens."""
    return [a * packing.token_stride for a in range(baby_count(packing))]


def giant_steps(packing: Packing) -> list[int]:
    """Rotations by multiples of b tokens."""
    return [g * packing.token_stride for g in range(0, packing.tokens, baby_count(packing))]


def rotations(packing: Packing) -> set[int]:
    """Rotation steps of `encrypted`."""
    giants = giant_steps(packing)
    return {step % packing.slots for step in (*baby_steps(packing), *giants, *(-step for step in giants))} - {0}


def _prepare(wanted: list[tuple[Operand, int]]) -> None:
    """Refresh what falls short once for all heads: the source of waiting maps, anything else itself, one above where `_projected` ends it."""
    for operand, level in sorted(wanted, key=lambda item: -item[1]):
        target = operand.source if _waits(operand) else operand
        if target.level < level + 1:
            target.ensure(level + 1)


def _waits(operand: Operand) -> bool:
    return isinstance(operand, WaitingLinear) and operand.waiting


def _rows(operand: Operand, rows: np.ndarray) -> Operand:
    if _waits(operand):
        return operand.select(rows)
    part = operand.context.backend.take(operand.ciphertext, slice(int(rows[0]), int(rows[-1]) + 1))
    return Operand(operand.context, len(rows), part)


def _projected(operand: Operand, level: int, gain: float) -> Ciphertext:
    """gain * operand at `level`, the gain folded into a map that waits."""
    context = operand.context
    if _waits(operand):
        return operand.compute(level, gain)
    if gain == 1.0:
        return operand.at(level)
    backend, ct = context.backend, operand.at(level + 1)
    return backend.rescale(backend.multiply_scalar(ct, gain, context.canonical_factor(ct.level, ct.scale)))


def diagonals(packing: Packing) -> Iterator[tuple[int, int]]:
    """Giant and baby step of each diagonal, in the order of the scores."""
    return (divmod(j, baby_count(packing)) for j in range(packing.tokens))


def heads_of(context: OperationContext, ct: Ciphertext, heads: int) -> list[Ciphertext]:
    """[features] as [head_dim] of each head."""
    width = ct.count // heads
    return [context.backend.take(ct, slice(start, start + width)) for start in range(0, ct.count, width)]


def scores(context: OperationContext, q: Ciphertext, k: Ciphertext) -> Ciphertext:
    """[T] holding -||q - k||^2, one level below q [head_dim]."""
    backend, packing = context.backend, context.packing
    rotated_k = backend.rotate(k, baby_steps(packing))
    rotated_q = backend.rotate(q, [-step for step in giant_steps(packing)])
    sums = []
    for g, a in diagonals(packing):
        difference = backend.subtract(backend.take(rotated_k, a), backend.take(rotated_q, g))
        sums.append(backend.sum(backend.multiply(difference, difference)))
    return backend.negate(backend.rescale(backend.relinearize(backend.stack(sums))))


def weighted_sum(context: OperationContext, weights: Ciphertext, v: Ciphertext) -> Ciphertext:
    """sum_j weights_j * v_j [head_dim], one level below v."""
    backend, packing = context.backend, context.packing
    weights = backend.match_level(weights, v.level)
    rotated_v = backend.rotate(v, baby_steps(packing))
    sums: list[Ciphertext] = []
    for j, (g, a) in enumerate(diagonals(packing)):
        term = backend.multiply(backend.take(weights, slice(j, j + 1)), backend.take(rotated_v, a))
        if a:
            sums[g] = backend.add(sums[g], term)
        else:
            sums.append(term)
    products = backend.relinearize(backend.stack(sums))
    return backend.rescale(backend.sum_rotated(products, giant_steps(packing)))
