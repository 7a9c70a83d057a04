"""Gradients of Gaussian-kernel attention with one ciphertext per feature (the forward is `hf_he.ops.feature_major_attention`).

The formulas are those of hf_he.ops.attention_gradient. Here sums over a head's features are sums of ciphertexts and every score is a ciphertext of its
own, so nothing is collected or copied: do . v, the slopes' and the weights' products cost no rotation but those of q, k, v and do themselves, and one
relinearisation per diagonal or per rotated sum. One head after another, which bounds the memory by the rotations of one head's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_he.approximation import KernelExponential
from hf_he.backends.base import Ciphertext
from hf_he.errors import UnsupportedEncryptedOperation
from hf_he.ops import attention
from hf_he.ops.attention_gradient import (
    TRAINING_LEVELS,
    GaussianKernel,
    Gradients,
    Policy,
    Saved,
    aligned,
    kernel_and_derivative,
    kernel_levels,
    narrow,
    output_level,
    product_level,
    training_levels,
)
from hf_he.ops.context import OperationContext
from hf_he.ops.feature_major_attention import baby_count, baby_steps, diagonals, giant_steps, heads_of, scores, weighted_sum
from hf_he.ops.feature_major_attention import rotations as forward_rotations
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import Packing

PRODUCT_DEPTH = 1
"""Levels from the kernel or its slopes to the gradients: the product."""


class FeatureMajorKernel(GaussianKernel):
    """Forward and backward of one attention module with one feature per ciphertext. Raises UnsupportedEncryptedOperation for a causal mask."""

    def forward(self, context: OperationContext, query: Operand, key: Operand, value: Operand, mask: Ciphertext | None) -> tuple[Operand, Saved]:
        if self.causal:
            raise UnsupportedEncryptedOperation("causal attention has no form with one feature per ciphertext: pack the hidden size of the model")
        levels = self.levels or training_levels(context, self.approximation.squarings)
        return forward(context, query, key, value, mask, self.heads, self.scaling, self.approximation, levels, context.activations)

    def backward(self, context: OperationContext, saved: Saved, gradient: Operand, needs: tuple[bool, bool, bool]) -> Gradients:
        return backward(context, saved, gradient, needs, output_level(context, self.approximation.squarings))


def forward(
    context: OperationContext,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Ciphertext | None,
    heads: int,
    scaling: float,
    approximation: KernelExponential,
    levels: AttentionLevels = TRAINING_LEVELS,
    policy: Policy = "recompute",
) -> tuple[Operand, Saved]:
    """Attention [features] at levels.value - 1, and what `backward` needs: q and k at levels.query, the masked v at levels.value, [features] each, and
    the scores [heads, T] or, by policy "keep", kernel and derivative [heads, 2, T]."""
    backend, squarings = context.backend, approximation.squarings
    value_level = levels.value + (mask is not None)
    for operand, level in sorted(((query, levels.query), (key, levels.query), (value, value_level)), key=lambda item: -item[1]):
        operand.ensure(level)
    q, k, v = query.at(levels.query), key.at(levels.query), value.at(value_level)
    kept, outputs = [], []
    with backend.log.measure("attention"):
        if mask is not None:
            mask = backend.match_level(context.ensure_level(mask, value_level), value_level)
            v = context.product(v, mask)
        for q_head, k_head, v_head in zip(*(heads_of(context, ct, heads) for ct in (q, k, v)), strict=True):
            narrow_scores = _scaled(context, scores(context, q_head, k_head), 0.5 * scaling / approximation.degree)
            if policy == "keep":
                kept.append(kernel_and_derivative(context, narrow_scores, squarings, levels.value))
                weights = backend.take(kept[-1], 0)
            else:
                kept.append(narrow_scores)
                weights = attention.kernel(context, narrow_scores, squarings, levels.value)
            outputs.append(weighted_sum(context, weights, v_head))
    out = Operand(context, query.features, _joined(context, outputs))
    return out, Saved(heads, scaling, approximation, policy, mask, q, k, v, backend.stack(kept))


def backward(context: OperationContext, saved: Saved, gradient: Operand, needs: tuple[bool, bool, bool] = (True, True, True), output: int = 1) -> Gradients:
    """Gradients of query, key and value, [features] each at level `output`, canonical; None where `needs` says so.

    `gradient`: of the attention's result [features], at any level. What falls short is refreshed: whole states together, then the scores and errors of
    each head. Per feature b - 1 rotations of v and of k, T / b - 1 of do and of q, and as many of the sums as of all of these.
    """
    backend, masked = context.backend, saved.mask is not None
    for_scores, for_values = needs[0] or needs[1], needs[2]
    if not for_scores and not for_values:
        return None, None, None
    value_level = output + PRODUCT_DEPTH + masked if for_values else 0
    depth = max(value_level, attention.SCORE_DEPTH if for_scores else 0)
    q, k, v = saved.q, saved.k, saved.v
    found: tuple[list[Ciphertext], ...] = ([], [], [])
    with backend.log.measure("attention"):
        do = gradient.at_least(depth)
        if for_scores:
            do, q, k, v = context.ensure_levels([(do, depth), (q, output + 1), (k, output + 1), (v, attention.SCORE_DEPTH)])
        else:
            do = context.ensure_level(do, depth)
        levels = kernel_levels(saved, output + PRODUCT_DEPTH, for_values)
        at = product_level(saved, levels.slopes, min(do.level, v.level))
        do = backend.match_level(do, max(value_level, at if for_scores else 0))
        for head, parts in enumerate(zip(*(heads_of(context, ct, saved.heads) for ct in (q, k, v, do)), strict=True)):
            q_head, k_head, v_head, do_head = parts
            rotated = backend.rotate(do_head, [-step for step in giant_steps(context.packing)])
            errors = _errors(context, backend.drop_level(rotated, at), v_head, saved.scaling) if for_scores else None
            weights, slopes = narrow(context, replace(saved, scores=backend.take(saved.scores, head)), errors, levels)
            if slopes is not None:
                dq, dk = _query_and_key(context, q_head, k_head, slopes, needs, output)
                found[0].append(dq)
                found[1].append(dk)
            if for_values:
                found[2].append(_value(context, weights, backend.match_level(rotated, value_level)))
        dq, dk, dv = (_joined(context, parts) if needed else None for parts, needed in zip(found, needs, strict=True))
        if dv is not None and masked:
            dv = context.product(dv, backend.match_level(context.ensure_level(saved.mask, dv.level), dv.level))
    return tuple(None if ct is None else Operand(context, gradient.features, ct) for ct in (dq, dk, dv))


def _joined(context: OperationContext, parts: Sequence[Ciphertext]) -> Ciphertext:
    """[head_dim] of each head as [features]."""
    return context.backend.reshape(context.backend.stack(parts), (sum(part.count for part in parts),))


def _scaled(context: OperationContext, ct: Ciphertext, factor: float) -> Ciphertext:
    """`ct` * factor: one level."""
    return context.backend.rescale(context.backend.multiply_scalar(ct, factor, context.canonical_factor(ct.level, ct.scale)))


def _errors(context: OperationContext, rotated_do: Ciphertext, v: Ciphertext, scaling: float) -> Ciphertext:
    """[T]: scaling * do_i . v_j in the place of score (i, j), two levels below `rotated_do` [giants, head_dim]."""
    backend, packing = context.backend, context.packing
    rotated_v = backend.rotate(backend.match_level(v, rotated_do.level), baby_steps(packing))
    products = [backend.sum(backend.multiply(backend.take(rotated_v, a), backend.take(rotated_do, g))) for g, a in diagonals(packing)]
    return _scaled(context, backend.rescale(backend.relinearize(backend.stack(products))), scaling)


def _query_and_key(
    context: OperationContext, q: Ciphertext, k: Ciphertext, slopes: Ciphertext, needs: tuple[bool, bool, bool], output: int
) -> tuple[Ciphertext | None, Ciphertext | None]:
    """sum_j slope_ij (k_j - q_i), and minus the same sum over i, [head_dim] at `output`."""
    backend, packing = context.backend, context.packing
    rotated_k = backend.rotate(backend.match_level(k, output + 1), baby_steps(packing))
    rotated_q = backend.rotate(backend.match_level(q, output + 1), [-step for step in giant_steps(packing)])
    slopes = backend.match_level(slopes, output + 1)
    queries, keys = _Sums(context, len(giant_steps(packing))), _Sums(context, baby_count(packing))
    for j, (g, a) in enumerate(diagonals(packing)):
        difference = backend.subtract(backend.take(rotated_k, a), backend.take(rotated_q, g))
        product = backend.multiply(backend.take(slopes, slice(j, j + 1)), difference)
        if needs[0]:
            queries.add(g, product)
        if needs[1]:
            keys.add(a, product)
    dq = queries.aligned(giant_steps(packing)) if needs[0] else None
    dk = backend.negate(keys.aligned([-step for step in baby_steps(packing)])) if needs[1] else None
    return dq, dk


def _value(context: OperationContext, weights: Ciphertext, rotated_do: Ciphertext) -> Ciphertext:
    """sum_i w_ij do_i [head_dim], one level below `rotated_do` [giants, head_dim]."""
    backend, packing = context.backend, context.packing
    weights = backend.match_level(weights, rotated_do.level)
    sums = _Sums(context, baby_count(packing))
    for j, (g, a) in enumerate(diagonals(packing)):
        sums.add(a, backend.multiply(backend.take(weights, slice(j, j + 1)), backend.take(rotated_do, g)))
    return sums.aligned([-step for step in baby_steps(packing)])


class _Sums:
    """Sums of products [head_dim] of 3 components, by the rotation they need."""

    def __init__(self, context: OperationContext, count: int) -> None:
        self._context = context
        self._sums: list[Ciphertext | None] = [None] * count

    def add(self, index: int, product: Ciphertext) -> None:
        known = self._sums[index]
        self._sums[index] = product if known is None else self._context.backend.add(known, product)

    def aligned(self, steps: Sequence[int]) -> Ciphertext:
        return aligned(self._context, self._context.backend.stack(self._sums), steps)


def rotations(packing: Packing) -> set[int]:
    """Rotation steps of `forward` and `backward`."""
    return forward_rotations(packing) | {-step % packing.slots for step in baby_steps(packing)} - {0}
