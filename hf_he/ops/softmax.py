"""Softmax attention between ciphertexts: what Gaussian-kernel attention is compared with.

The exponential is (1 + x / 2^k)^(2^k) and the row sums are inverted by Goldschmidt's iteration, as in NEXUS (Zhang et al., NDSS 2025). Instead of
the row maximum, found there by comparisons, a public constant from calibration is subtracted, as the scores of a trained layer stay in a known
interval: cheaper by far, and exact, since softmax does not change. With c the constant, m the 0/1 mask of the keys and g = 2 / (high - low) of the
reciprocal's interval:

    w_ij = g m_j K(scaling q_i . k_j - c)        r_i = 1 / sum_j w_ij        o_i = r_i sum_j w_ij v_j

Scores lie as in `hf_he.ops.attention`; r is one ciphertext, a value per head and query, and multiplies the weighted sum. The gradient is that of
hf_he.ops.normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_he.approximation import KernelExponential, Reciprocal
from hf_he.backends.base import Ciphertext
from hf_he.ops import attention, attention_gradient
from hf_he.ops.attention_gradient import BlockGradients, Gradients, gradients_by_block
from hf_he.ops.context import OperationContext
from hf_he.ops.goldschmidt import evaluate_reciprocal
from hf_he.ops.normalised import dot_products, row_rotations, row_sums
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import Packing, ScoreLayout

DEFAULT_LEVELS = AttentionLevels(query=2, value=3)
"""The reciprocal multiplies at level 2, so that the result is at 1."""


@dataclass(frozen=True)
class Softmax:
    """`maximum`: the constant in place of the row maximum. `reciprocal`: of the row sums of exp(score - maximum), on an interval whose ends have a ratio
    well below 2 q_0 / scale, since half that ratio is the largest reciprocal."""

    maximum: float
    exponential: KernelExponential
    reciprocal: Reciprocal

    @property
    def gain(self) -> float:
        low, high = self.reciprocal.interval
        return 2.0 / (high - low)


@dataclass(frozen=True)
class Saved:
    """What the backward needs of the forward of one feature block, unbatched but for the mask [1] and the scores (s - c) / 2^k [score ciphertexts]."""

    heads: int
    scaling: float
    form: Softmax
    mask: Ciphertext | None
    q: Ciphertext
    k: Ciphertext
    v: Ciphertext
    scores: Ciphertext
    inverse: Ciphertext
    out: Ciphertext


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float, form: Softmax) -> torch.Tensor:
    """[B, heads, T, head_dim] each, mask [B, 1, T, T] of 0/1 -> [B, T, heads, head_dim]."""
    weights = form.exponential(scaling * (query @ key.transpose(-1, -2)) - form.maximum)
    weights = weights if mask is None else weights * mask
    return (weights * form.reciprocal(weights.sum(-1, keepdim=True)) @ value).transpose(1, 2)


def forward(
    context: OperationContext,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Ciphertext | None,
    heads: int,
    scaling: float,
    form: Softmax,
    levels: AttentionLevels = DEFAULT_LEVELS,
) -> tuple[Ciphertext, tuple[Saved, ...]]:
    """Softmax attention [blocks] at level levels.value - 2, canonical, and what `backward` needs, by feature block.

    Two levels from levels.query to the scores, one per squaring, one for the mask, one for the row sums, the reciprocal's. What has too few left is
    refreshed: the score ciphertexts, the one of the row sums. Rotations: those of Gaussian-kernel attention and about 3 log2(head_dim) + b.
    """
    own = replace(levels, value=levels.value - 1)
    blocks = attention.by_block(query, key, value, own)
    saved = [_forward(context, *attention.project(*operands, own), mask, attention.block_heads(query, heads), scaling, form, levels) for operands in blocks]
    return attention.joined(context, [context.backend.reshape(one.out, (1,)) for one in saved]), tuple(saved)


def _forward(
    context: OperationContext,
    q: Ciphertext,
    k: Ciphertext,
    v: Ciphertext,
    mask: Ciphertext | None,
    heads: int,
    scaling: float,
    form: Softmax,
    levels: AttentionLevels,
) -> Saved:
    backend, layout = context.backend, ScoreLayout(context.packing, heads)
    with backend.log.measure("attention"):
        rotated_k = backend.rotate(k, attention.baby_steps(layout))
        rotated_v = backend.rotate(v, attention.baby_steps(layout))
        degree = form.exponential.degree
        scores = attention.collect(context, layout, dot_products(context, layout, q, rotated_k), scaling / degree)
        scores = backend.add_scalar(scores, -form.maximum / degree)
        weights = attention.kernel(context, scores, form.exponential.squarings, levels.value + 2)
        with backend.log.measure("kernel"):
            weights = _masked(context, layout, weights, mask, form.gain, levels.value + 2)
            inverse = evaluate_reciprocal(context, _mapped_row_sums(context, layout, weights, form), form.reciprocal, levels.value - 1)
        out = backend.take(attention.weighted_sum(context, layout, weights, rotated_v), 0)
        out = context.product(out, backend.match_level(inverse, out.level))
    return Saved(heads, scaling, form, mask, q, k, v, scores, inverse, out)


def backward(
    context: OperationContext, saved: Sequence[Saved], gradient: Operand, needs: tuple[bool, bool, bool] = (True, True, True), output: int = 1
) -> Gradients:
    """Gradients of query, key and value, [blocks] each at level `output`, canonical; None where `needs` says so.

    `gradient`: of the result [blocks], at any level. Refreshed where they fall short: gradient, reciprocal, q, k, v and o together (`output` + 1
    levels of q and k, 2 or more of the others), then scores and errors together. Rotations: as `attention_gradient.backward`.
    """
    return gradients_by_block(context, saved, gradient, lambda one, do: _backward(context, one, do, needs, output))


def _backward(context: OperationContext, saved: Saved, gradient: Operand, needs: tuple[bool, bool, bool], output: int) -> BlockGradients:
    """`backward` of one block, unbatched."""
    backend, layout = context.backend, ScoreLayout(context.packing, saved.heads)
    for_scores, for_values = needs[0] or needs[1], needs[2]
    if not for_scores and not for_values:
        return None, None, None
    depth = max(output + 1 if for_values else 0, attention.SCORE_DEPTH if for_scores else 0)
    level = output + attention_gradient.GRADIENT_DEPTH + 1
    dq = dk = dv = errors = None
    with backend.log.measure("attention"):
        wide = [(backend.take(gradient.at_least(depth + 1), 0), depth + 1), (saved.inverse, depth + 1)]
        if for_scores:
            wide += [(saved.q, output + 1), (saved.k, output + 1), (saved.v, attention.SCORE_DEPTH), (saved.out, attention.SCORE_DEPTH)]
        do, inverse, *others = context.ensure_levels(wide)
        scaled = context.product(backend.match_level(do, depth + 1), backend.match_level(inverse, depth + 1))
        rotated = backend.rotate(scaled, attention.giant_steps(layout, -1))
        if for_scores:
            q, k, v, out = others
            errors = attention_gradient.errors(context, layout, backend.match_level(rotated, attention.SCORE_DEPTH), v, saved.scaling, out)
        weights, slopes = attention_gradient.weights_and_slopes(context, saved.scores, errors, saved.form.exponential.squarings, level)
        if slopes is not None:
            slopes = _masked(context, layout, slopes, saved.mask, saved.form.gain, level)
            dq, dk = attention_gradient.query_and_key(context, layout, q, k, slopes, needs, output, distances=False)
        if for_values:
            weights = _masked(context, layout, weights, saved.mask, saved.form.gain, level)
            dv = attention_gradient.value_gradient(context, layout, weights, backend.match_level(rotated, output + 1))
    return dq, dk, dv


def _masked(context: OperationContext, layout: ScoreLayout, scores: Ciphertext, mask: Ciphertext | None, gain: float, level: int) -> Ciphertext:
    """gain * m_j in the place of each score (i, j), 0 in unused features, times `scores`; at `level` - 1."""
    backend, b = context.backend, layout.babies
    used = np.zeros((b, layout.head_dim))
    for feature in range(min(layout.packing.tokens, layout.head_dim)):
        used[feature % b, feature] = gain
    scores = backend.match_level(scores, level)
    if mask is None:
        return context.multiply_constant(scores, ("used scores", layout, gain), lambda: used.sum(0))
    mask = backend.match_level(context.ensure_level(backend.take(mask, 0), level + 1), level + 1)
    rotated = backend.rotate(mask, attention.baby_steps(layout))
    plain = context.constant(("mask of scores", layout, gain), mask.level, context.canonical_factor(mask.level, mask.scale), lambda: used[None])
    return context.product(scores, backend.rescale(backend.multiply_plain_sum(plain, rotated)))


def _mapped_row_sums(context: OperationContext, layout: ScoreLayout, weights: Ciphertext, form: Softmax) -> Ciphertext:
    """The reciprocal's input in [-1, 1], over every feature of its head in the lane of its query, one level below `weights`; unbatched."""
    total = row_sums(context, layout, context.ensure_level(weights, 1))
    low, high = form.reciprocal.interval
    return context.backend.add_scalar(total, -(high + low) / (high - low))


def rotations(packing: Packing, heads: int) -> set[int]:
    """Rotation steps of `forward` and `backward`, projections not included."""
    layout = ScoreLayout(packing, heads)
    return ({step % packing.slots for step in row_rotations(layout)} | attention_gradient.rotations(packing, heads)) - {0}
