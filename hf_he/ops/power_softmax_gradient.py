"""Gradients of power-softmax attention between ciphertexts (the forward is `hf_he.ops.power_softmax`).

With x_ij = f_ij (scaling q_i . k_j + shift), f_ij = m_ij (g / n_i)^(1 / p), r_i the reciprocal that the forward took of row i (1 where the divisor is
constant) and the gradient do of the output o (which then counts as 0), as in hf_he.ops.normalised:

    dv_j = sum_i r_i x_ij^p do_i                                ds_ij = p r_i x_ij^(p - 1) f_ij do_i . (v_j - o_i)
    dq_i = scaling sum_j ds_ij k_j                              dk_j = scaling sum_i ds_ij q_i

or, where scores are -scaling / (2 p) |q_i - k_j|^2,

    dq_i = scaling / p sum_j ds_ij (k_j - q_i)                  dk_j = -scaling / p sum_i ds_ij (k_j - q_i)

The derivative of the reciprocal is -r^2, as `Reciprocal` has it in plaintext: neither its polynomial nor its Goldschmidt steps are differentiated. r_i may be
in the thousands where x_ij^p is small. So it does not multiply do: it is moved beside the scores (a plaintext product and a rotation per giant
step), where r x^p and r x^(p - 1) f are of moderate size, and kept below LARGEST for the refresh before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_he.approximation import Polynomial, Reciprocal
from hf_he.backends.base import Ciphertext
from hf_he.ops import attention, attention_gradient, power_softmax
from hf_he.ops.attention_gradient import GRADIENT_DEPTH, BlockGradients, Gradients, gradients_by_block, output_level
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.ops.power_softmax import Factors, PowerSoftmax
from hf_he.ops.score_masks import placed_by_giant
from hf_he.packing import Packing, ScoreLayout

LARGEST = 64.0
"""Of the reciprocals that are kept: at level 0 a slot holds a few hundred."""


@dataclass(frozen=True)
class Saved:
    """What the backward needs of the forward of one feature block, unbatched: q, k, v and `share` times the reciprocal; and by policy x [score ciphertexts]
    ("recompute") or x^p and x^(p - 1) [2, score ciphertexts] ("keep"). `output`: the result, of which this is block `block`."""

    heads: int
    scaling: float
    factors: Factors
    policy: str
    share: float
    q: Ciphertext
    k: Ciphertext
    v: Ciphertext
    scores: Ciphertext
    inverse: Ciphertext | None
    output: Operand
    block: int


@dataclass(frozen=True)
class PowerKernel:
    """Forward and backward of one attention module; `levels` as planned, or None."""

    heads: int
    scaling: float
    form: PowerSoftmax
    approximation: Reciprocal | Polynomial
    levels: AttentionLevels | None = None
    causal: bool = False

    def forward(self, context: Any, query: Operand, key: Operand, value: Operand, mask: Ciphertext | None) -> tuple[Operand, tuple[Saved, ...]]:
        levels = self.levels or training_levels(context, self.form, self.causal or mask is not None)
        return forward(context, query, key, value, mask, self.heads, self.scaling, self.form, self.approximation, self.causal, levels, context.activations)

    def backward(self, context: OperationContext, saved: Sequence[Saved], gradient: Operand, needs: tuple[bool, bool, bool]) -> Gradients:
        return backward(context, saved, gradient, needs, output_level(context, self.form.depth))


def training_levels(context: OperationContext, form: PowerSoftmax, masked: bool) -> AttentionLevels:
    """Queries and keys one level above the gradients that are made of them, values high enough for do . v."""
    lowest, query = form.default_levels(masked), output_level(context, form.depth) + 1
    return replace(lowest, query=max(lowest.query, query), value=max(lowest.value, attention.SCORE_DEPTH))


def forward(
    context: OperationContext,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Ciphertext | None,
    heads: int,
    scaling: float,
    form: PowerSoftmax,
    approximation: Reciprocal | Polynomial,
    causal: bool,
    levels: AttentionLevels,
    policy: str = "recompute",
) -> tuple[Operand, tuple[Saved, ...]]:
    """`power_softmax.encrypted`, and what `backward` needs, by feature block.

    "recompute" saves x and multiplies it up again in the backward; "keep" multiplies up x^(p - 1) beside x^p (at most one more product per level) and
    saves both.
    """
    own, share = attention.block_heads(query, heads), _share(form, approximation)
    factors = Factors(context, ScoreLayout(context.packing, own), form, approximation, mask, causal)
    found = []
    for operands in power_softmax.by_block(query, key, value, levels):
        prepared = power_softmax.prepare(context, *operands, own, scaling, factors, levels)
        with context.backend.log.measure("attention"), context.backend.log.measure("kernel"):
            if policy == "keep":
                scores = powers(context, prepared.x, form.power)
                weights = context.backend.take(scores, 0)
            else:
                scores, weights = prepared.x, power_softmax.power(context, prepared.x, form.power)
        found.append((prepared, scores, *power_softmax.attended(context, prepared, weights, levels.value)))
    output = Operand(context, query.features, attention.joined(context, [out for _, _, out, _ in found]))
    saved = [
        Saved(own, scaling, factors, policy, share, prepared.q, prepared.k, prepared.v, scores, _times(context, inverse, share), output, block)
        for block, (prepared, scores, _, inverse) in enumerate(found)
    ]
    return output, tuple(saved)


def backward(
    context: OperationContext, saved: Sequence[Saved], gradient: Operand, needs: tuple[bool, bool, bool] = (True, True, True), output: int = 1
) -> Gradients:
    """Gradients of query, key and value, [blocks] each at level `output`, canonical; None where `needs` says so.

    `gradient`: of the attention's result [blocks], at any level. Refreshed where they fall short: gradient, q, k, v and o together (`output` + 1 levels of
    gradient, q and k, 2 or more of the others), then scores, reciprocal and errors together. Rotations: as `attention_gradient.backward` and
    giants - 1.
    """
    return gradients_by_block(context, saved, gradient, lambda one, do: _backward(context, one, do, needs, output))


def _backward(context: OperationContext, saved: Saved, gradient: Operand, needs: tuple[bool, bool, bool], output: int) -> BlockGradients:
    """`backward` of one block, unbatched."""
    backend, layout = context.backend, ScoreLayout(context.packing, saved.heads)
    for_scores, for_values = needs[0] or needs[1], needs[2]
    if not for_scores and not for_values:
        return None, None, None
    value_level = output + 1 if for_values else 0
    depth = max(value_level, attention.SCORE_DEPTH if for_scores else 0)
    level = output + GRADIENT_DEPTH
    dq = dk = dv = errors = None
    with backend.log.measure("attention"):
        wanted = {"do": (backend.take(gradient.at_least(depth), 0), depth)}
        if for_scores:
            wanted |= {"q": (saved.q, output + 1), "k": (saved.k, output + 1), "v": (saved.v, attention.SCORE_DEPTH)}
            if saved.inverse is not None:
                wanted["out"] = backend.take(saved.output.ciphertext, saved.block), attention.SCORE_DEPTH
        have = dict(zip(wanted, context.ensure_levels(list(wanted.values())), strict=True))
        product_level = _product_level(saved, level, have) if for_scores else 0
        do = backend.match_level(have["do"], max(value_level, product_level))
        rotated = backend.rotate(do, attention.giant_steps(layout, -1))
        if for_scores:
            factor = saved.scaling * saved.factors.uniform * (1.0 if saved.factors.form.distances else saved.factors.form.power)
            errors = attention_gradient.errors(context, layout, backend.match_level(rotated, product_level), have["v"], factor, have.get("out"))
        weights, slopes = _narrow(context, layout, saved, errors, level)
        if slopes is not None:
            distances = saved.factors.form.distances
            dq, dk = attention_gradient.query_and_key(context, layout, have["q"], have["k"], slopes, needs, output, distances)
        if for_values:
            dv = attention_gradient.value_gradient(context, layout, weights, backend.match_level(rotated, value_level))
    return dq, dk, dv


def _product_level(saved: Saved, level: int, have: dict[str, Ciphertext]) -> int:
    """Where do . (v - o) is multiplied: high enough for all that follows, or, where a refresh is needed anyway, as low as it can be."""
    wanted = level + 1 + saved.factors.masked + attention.SCORE_DEPTH
    return wanted if wanted <= min(have[name].level for name in ("do", "v", "out") if name in have) else attention.SCORE_DEPTH


def _narrow(context: OperationContext, layout: ScoreLayout, saved: Saved, errors: Ciphertext | None, level: int) -> tuple[Ciphertext, Ciphertext | None]:
    """r x^p, and errors * f * r x^(p - 1) where there are errors; [score ciphertexts] each, at `level` or higher."""
    backend, factors = context.backend, saved.factors
    form, divided, top = factors.form, saved.inverse is not None, context.top
    with backend.log.measure("kernel"):
        last = level + 1
        enough = last + divided + (0 if saved.policy == "keep" else form.depth)
        wanted = [(saved.scores, enough if enough <= top else form.depth)]
        if divided:
            wanted.append((saved.inverse, min(last + 2, top)))
        if errors is not None:
            wanted.append((errors, min(last + factors.masked, top)))
        scores, *others = context.ensure_levels(wanted)
        pair = scores if saved.policy == "keep" else powers(context, scores, form.power)
        if divided:
            rows = _beside_scores(context, layout, others[0], 1.0 / saved.share)
            pair = context.ensure_level(pair, 1)
            at = min(pair.level, rows.level)
            pair = context.product(backend.match_level(pair, at), backend.match_level(rows, at))
        pair = context.ensure_level(pair, last)
        weights, slopes = (backend.take(pair, i) for i in range(2))
        if errors is None:
            return weights, None
        errors = context.ensure_level(factors.applied(others[-1], last), last)
        return weights, context.product(backend.match_level(slopes, last), backend.match_level(errors, last))


def _beside_scores(context: OperationContext, layout: ScoreLayout, rows: Ciphertext, gain: float) -> Ciphertext:
    """[score ciphertexts]: gain times the value of a head's query in the place of each of its scores; one level."""
    backend, tokens = context.backend, layout.packing.tokens
    rotated = backend.rotate(rows, attention.giant_steps(layout, -1))
    everywhere = np.full((tokens, tokens), gain)
    scale = context.canonical_factor(rows.level, rows.scale)
    plain = context.constant(("rows beside scores", layout, gain), rows.level, scale, lambda: np.moveaxis(placed_by_giant(layout, everywhere), 0, 1))
    return backend.rescale(backend.multiply_plain_sum(plain, rotated))


def _share(form: PowerSoftmax, approximation: Reciprocal | Polynomial) -> float:
    """What brings the largest reciprocal, in units of the powers' gain, below LARGEST."""
    return 1.0 if form.divisor is not None else min(1.0, LARGEST * form.gain(approximation) * approximation.interval[0])


def _times(context: OperationContext, inverse: Ciphertext | None, share: float) -> Ciphertext | None:
    if inverse is None or share == 1.0:
        return inverse
    backend = context.backend
    return backend.rescale(backend.multiply_scalar(inverse, share, context.canonical_factor(inverse.level, inverse.scale)))


def powers(context: OperationContext, x: Ciphertext, exponent: int) -> Ciphertext:
    """x^exponent and x^(exponent - 1), exponent > 1, as [2, *batch]: ceil(log2(exponent)) levels."""
    backend = context.backend
    if exponent == 2:
        square = context.square(x)
        return backend.stack([square, backend.match_level(x, square.level)])
    half = powers(context, x, (exponent + 1) // 2)
    return context.product(half, backend.take(half, exponent % 2))


def rotations(packing: Packing, heads: int, divisor: bool = False) -> set[int]:
    """Rotation steps of `forward` and `backward`, projections not included."""
    return power_softmax.rotations(packing, heads, divisor) | attention_gradient.rotations(packing, heads)
