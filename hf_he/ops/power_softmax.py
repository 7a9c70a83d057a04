"""Power-softmax attention (Zimerman et al., "Power-Softmax", arXiv 2410.09457) between ciphertexts, in the score layout of `hf_he.ops.attention`.

With x_ij = (scaling q_i . k_j + shift) m_ij for a 0/1 mask m, n_i valid keys and an even power p,

    o_i = r(D_i) / n_i sum_j x_ij^p v_j        D_i = mean_eps_i + sum_j x_ij^p / n_i        r(D) = 1 / D by a guess and Goldschmidt

or, with a constant divisor instead of D_i, no reciprocal at all (Powerformer). The mask, the row counts n_i and the reciprocal's interval are one
factor: scores are multiplied by m_ij (g / n_i)^(1 / p), g = 2 / (high - low), so that the powers sum to the reciprocal's input in [-1, 1] up to a
constant and nothing grows beyond 2. Causal masks and their counts are public; an encrypted padding mask is rotated into that factor, beside
the scores. The reciprocal is taken of one ciphertext, a value per head and query, and multiplies the weighted sum of the values, which is aligned
with the queries; the powers themselves are not.

A patent family (US 2026/0046109 A1, US 12,647,248 B2) describes replacing self-attention with a power softmax under homomorphic encryption;
check it before use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from hf_he.approximation import Polynomial, Reciprocal
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import attention
from hf_he.ops.context import OperationContext
from hf_he.ops.goldschmidt import evaluate_reciprocal
from hf_he.ops.normalised import dot_products, row_rotations, row_sums
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.ops.score_masks import causal_pairs, placed, placed_by_baby
from hf_he.packing import Packing, ScoreLayout


@dataclass(frozen=True)
class PowerSoftmax:
    """x^power / (eps + sum x^power) with x = score + shift. `length_agnostic`: eps is added to the mean over the valid keys of each row.
    `divisor`: a constant instead of eps + sum (times the number of valid keys, if length-agnostic). `distances`: scores are
    -scaling / (2 power) ||q - k||^2 instead of scaling q . k, which with shift 1 makes x^power the Gaussian kernel's (1 + s / 2^k)^(2^k)."""

    power: int
    eps: float
    shift: float = 0.0
    divisor: float | None = None
    length_agnostic: bool = False
    distances: bool = False

    @property
    def counts(self) -> bool:
        """Whether rows are divided by their number of valid keys."""
        return self.divisor is None or self.length_agnostic

    @property
    def depth(self) -> int:
        """Levels of the power."""
        return (self.power - 1).bit_length()

    def factor(self, scaling: float) -> float:
        """Of q . k, or of ||q - k||^2."""
        return -0.5 * scaling / self.power if self.distances else scaling

    def gain(self, approximation: Reciprocal | Polynomial) -> float:
        """What multiplies the powers: 1 / divisor, or the slope that maps the reciprocal's interval to [-1, 1]."""
        if self.divisor is not None:
            return 1.0 / self.divisor
        low, high = approximation.interval
        return 2.0 / (high - low)

    def default_levels(self, masked: bool) -> AttentionLevels:
        """The lowest that work: a level of the scores for the mask, one of the values for the reciprocal."""
        return AttentionLevels(query=attention.SCORE_DEPTH + masked, value=1 if self.divisor is not None else 2)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    scaling: float,
    form: PowerSoftmax,
    approximation: Reciprocal | Polynomial,
) -> torch.Tensor:
    """[B, heads, T, head_dim] each, keep [B, 1, T, T] of 0/1 -> [B, T, heads, head_dim]."""
    products = (query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1) if form.distances else query @ key.transpose(-1, -2)
    powers = ((products * form.factor(scaling) + form.shift) * keep) ** form.power
    count = keep.sum(-1, keepdim=True).clamp(min=1.0)
    if form.divisor is not None:
        weights = powers / (form.divisor * count if form.length_agnostic else form.divisor)
    else:
        mean_eps = form.eps if form.length_agnostic else form.eps / count
        weights = powers / count * approximation(mean_eps + powers.sum(-1, keepdim=True) / count)
    return (weights @ value).transpose(1, 2)


def encrypted(
    context: OperationContext,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Ciphertext | None,
    heads: int,
    scaling: float,
    form: PowerSoftmax,
    approximation: Reciprocal | Polynomial,
    causal: bool = False,
    levels: AttentionLevels | None = None,
) -> Ciphertext:
    """Power-softmax attention [blocks], one feature block after another; the result is at levels.value - 1, with a reciprocal at
    levels.value - 2, canonical.

    `mask`: [1] from `pack_attention_mask`. A causal model with padding on the right needs none, and with one its row i counts i + 1 keys;
    otherwise the mask carries the counts where the form has any (`pack_attention_mask(mask, packing, power)`). The scores take two levels from
    levels.query and one more under a mask, the powers ceil(log2(power)), the reciprocal's input one. What has too few left is refreshed: the
    score ciphertexts, the one of the row sums. Rotations: those of Gaussian-kernel attention and about 2 log2(head_dim) + log2(T).

    Raises ShapeError for widths that are no whole blocks, and for eps on the sum of rows whose number of valid keys is encrypted.
    """
    heads = attention.block_heads(query, heads)
    levels = levels or form.default_levels(causal or mask is not None)
    factors, outputs = Factors(context, ScoreLayout(context.packing, heads), form, approximation, mask, causal), []
    for operands in by_block(query, key, value, levels):
        prepared = prepare(context, *operands, heads, scaling, factors, levels)
        with context.backend.log.measure("attention"), context.backend.log.measure("kernel"):
            powers = power(context, prepared.x, form.power)
        outputs.append(attended(context, prepared, powers, levels.value)[0])
    return attention.joined(context, outputs)


class Prepared(NamedTuple):
    """What powers and weighted sum of one feature block are made of: q, k and v unbatched, rotated_v [babies], x [score ciphertexts]."""

    layout: ScoreLayout
    factors: Factors
    q: Ciphertext
    k: Ciphertext
    v: Ciphertext
    rotated_v: Ciphertext
    x: Ciphertext


def prepare(
    context: OperationContext, query: Operand, key: Operand, value: Operand, heads: int, scaling: float, factors: Factors, levels: AttentionLevels
) -> Prepared:
    """Everything up to x, which is refreshed where levels for its powers are missing."""
    backend, form, layout = context.backend, factors.form, ScoreLayout(context.packing, heads)
    q, k, v = attention.project(query, key, value, _own(levels))
    with backend.log.measure("attention"):
        rotated_k = backend.rotate(k, attention.baby_steps(layout))
        rotated_v = backend.rotate(v, attention.baby_steps(layout))
        products = attention.squared_differences if form.distances else dot_products
        scores = attention.collect(context, layout, products(context, layout, q, rotated_k), form.factor(scaling) * factors.uniform)
        with backend.log.measure("kernel"):
            wanted = form.depth + levels.value + 1
            x = factors.shifted(scores, wanted)
            return Prepared(layout, factors, q, k, v, rotated_v, context.ensure_level(x, wanted if wanted <= context.top else form.depth))


def by_block(query: Operand, key: Operand, value: Operand, levels: AttentionLevels) -> list[tuple[Operand, Operand, Operand]]:
    """`attention.by_block`; `value` is the level of the values, where the reciprocal takes one after them."""
    return attention.by_block(query, key, value, _own(levels))


def _own(levels: AttentionLevels) -> AttentionLevels:
    return replace(levels, value=levels.value - 1)


def attended(context: OperationContext, prepared: Prepared, powers: Ciphertext, level: int) -> tuple[Ciphertext, Ciphertext | None]:
    """Weighted sum of the values [1] by `powers`, which meet them at `level`, times the reciprocal of their rows, and that reciprocal."""
    backend, layout, factors = context.backend, prepared.layout, prepared.factors
    form = factors.form
    with backend.log.measure("attention"):
        with backend.log.measure("kernel"):
            weights = context.ensure_level(powers, level + 1)
            inverse = None
            if form.divisor is None:
                mapped = _mapped_row_sums(context, layout, context.ensure_level(powers, 1), form, factors.approximation, factors.counts)
                inverse = evaluate_reciprocal(context, mapped, factors.approximation, level - 1)
        out = attention.weighted_sum(context, layout, weights, prepared.rotated_v)
        return out if inverse is None else context.product(out, backend.match_level(inverse, out.level)), inverse


def power(context: OperationContext, x: Ciphertext, exponent: int) -> Ciphertext:
    """x^exponent, canonical: ceil(log2(exponent)) levels."""
    result = None
    while True:
        if exponent & 1:
            result = x if result is None else context.product(context.backend.match_level(result, x.level), x)
        exponent >>= 1
        if not exponent:
            return result
        x = context.square(x)


class Factors:
    """What scores are multiplied by, m_ij (g / n_i)^(1 / p): `uniform` goes with their scaling, the rest is one multiplication, if any (`masked`).

    Raises ShapeError for eps on the sum of rows whose number of valid keys is encrypted.
    """

    def __init__(
        self,
        context: OperationContext,
        layout: ScoreLayout,
        form: PowerSoftmax,
        approximation: Reciprocal | Polynomial,
        mask: Ciphertext | None,
        causal: bool,
    ) -> None:
        if mask is not None and not causal and form.divisor is None and not form.length_agnostic:
            raise ShapeError(
                "eps on the sum needs public lengths where keys of all positions count: set power_softmax_length_agnostic=True in config.json "
                "(`hf-he convert` does), then train and calibrate again, or pass no mask"
            )
        tokens = layout.packing.tokens
        self._context, self._layout, self._mask, self._causal = context, layout, mask, causal
        self.form, self.approximation = form, approximation
        self.masked = causal or mask is not None
        self.counts = np.ones(tokens)
        if form.counts and causal:
            self.counts = np.arange(1.0, tokens + 1.0)
        elif form.counts and mask is None:
            self.counts *= tokens
        self._shares = (self.counts[0] / self.counts) ** (1.0 / form.power)
        self.uniform = (form.gain(approximation) / self.counts[0]) ** (1.0 / form.power)

    def shifted(self, scores: Ciphertext, wanted: int) -> Ciphertext:
        """`applied` to scores + shift."""
        if self.form.shift:
            scores = self._context.backend.add_scalar(scores, self.form.shift * self.uniform)
        return self.applied(scores, wanted)

    def applied(self, scores: Ciphertext, wanted: int) -> Ciphertext:
        """Scores under the mask, one level, unless there is none. Refreshed before that when no level is left, to `wanted` after it if there are as many."""
        context, backend = self._context, self._context.backend
        if not self.masked:
            return scores
        if scores.level < 1:
            scores = context.ensure_level(scores, min(wanted + 1, context.top))
        layout, tokens = self._layout, self._layout.packing.tokens
        pairs = causal_pairs(tokens) if self._causal else np.ones((tokens, tokens))
        pairs = pairs * self._shares[:, None]
        tag = ("row factors", layout, self._causal, self.form.counts, self.form.power)
        if self._mask is None:
            return context.multiply_constant(scores, tag, lambda: placed(layout, pairs))
        scores = backend.match_level(scores, min(scores.level, context.top - 1))
        mask = backend.drop_level(context.ensure_level(backend.take(self._mask, 0), scores.level + 1), scores.level + 1)
        rotated = backend.rotate(mask, attention.baby_steps(layout))
        plain = context.constant(
            (*tag, "by baby"), mask.level, context.canonical_factor(mask.level, mask.scale), lambda: np.moveaxis(placed_by_baby(layout, pairs), 0, 1)
        )
        return context.product(scores, backend.rescale(backend.multiply_plain_sum(plain, rotated)))


def _mapped_row_sums(
    context: OperationContext, layout: ScoreLayout, powers: Ciphertext, form: PowerSoftmax, approximation: Reciprocal, counts: np.ndarray
) -> Ciphertext:
    """The reciprocal's input in [-1, 1], over every feature of its head in the lane of its query, one level below `powers`; unbatched."""
    backend, packing = context.backend, context.packing
    total = row_sums(context, layout, powers)
    low, high = approximation.interval
    middle = (high + low) / (high - low)
    if form.length_agnostic or np.ptp(counts) == 0.0:
        eps = form.eps if form.length_agnostic else form.eps / counts[0]
        return backend.add_scalar(total, form.gain(approximation) * eps - middle)
    shifts = np.repeat(form.gain(approximation) * form.eps / counts - middle, packing.token_stride)
    return backend.add_plain(total, context.constant(("row eps", form, approximation.interval), total.level, total.scale, lambda: shifts))


def rotations(packing: Packing, heads: int, divisor: bool = False) -> set[int]:
    """Rotation steps of `encrypted`, projections not included; `divisor`: constant, no row sums."""
    layout = ScoreLayout(packing, heads)
    steps = attention.rotations(packing, heads) | (set() if divisor else row_rotations(layout))
    return {step % packing.slots for step in steps} - {0}
