"""Gaussian-kernel attention (Rho et al., ICLR 2025) between ciphertexts.

Scores are taken along diagonals j = g * b + a of the token-by-token matrix, un-aligned: D_j = rotate(q, -g b) - rotate(k, a), so that b - 1
rotations of k and v and T / b - 1 of q serve all T diagonals (distances in tokens). Squares are summed over each head, and the sums of all
diagonals and heads are moved into one score ciphertext (see ScoreLayout), where everything narrow happens: refresh, (1 + x / 2^k)^(2^k) by k
squarings. Then each score is copied over its head again, multiplied with rotate(v, a), summed over a, and each g is rotated into place.
The encrypted mask multiplies v before its rotations, beside the scores, where a level is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from hf_he.approximation import KernelExponential
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import linear, reduce, rotary
from hf_he.ops.context import OperationContext
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.ops.rotary import WaitingRotary
from hf_he.ops.score_masks import causal_pairs, placed
from hf_he.packing import Packing, ScoreLayout

SCORE_DEPTH = 2
"""Levels from query and key to the scores: square, score mask."""


DEFAULT_LEVELS = AttentionLevels()


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float, approximation: KernelExponential
) -> torch.Tensor:
    """[B, heads, T, head_dim] each, mask [B, 1, T, T] of 0/1 -> [B, T, heads, head_dim]."""
    distance = (query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1)
    weights = approximation(-0.5 * scaling * distance)
    weights = weights if mask is None else weights * mask
    return (weights @ value).transpose(1, 2)


class Prepared(NamedTuple):
    """What the scores and the weighted sum are made of: q, k and v (masked) unbatched, rotated_v [babies], scores [score ciphertexts]."""

    layout: ScoreLayout
    q: Ciphertext
    k: Ciphertext
    v: Ciphertext
    rotated_v: Ciphertext
    scores: Ciphertext


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
    """Un-normalised kernel attention [blocks], one feature block after another; the result is at level `levels.value` - 1, canonical.

    `mask`: [1] from `pack_attention_mask`. `causal`: keys up to the query only, one level of the scores. The scores are refreshed when `levels`
    leave them too few levels for the kernel. Rotations: T log2(head_dim / b) at each of levels.query - 1 and levels.value, about
    2 T / b + 6 b others.
    """
    outputs = []
    for operands in by_block(query, key, value, levels):
        prepared = prepare(context, *operands, mask, block_heads(query, heads), scaling, approximation, levels, causal)
        with context.backend.log.measure("attention"):
            weights = kernel(context, prepared.scores, approximation.squarings, levels.value + 1)
            outputs.append(weighted_sum(context, prepared.layout, weights, prepared.rotated_v))
    return joined(context, outputs)


def by_block(query: Operand, key: Operand, value: Operand, levels: AttentionLevels) -> list[tuple[Operand, Operand, Operand]]:
    """The operands themselves if they are one feature block, otherwise each block of them, at the levels of `project`: heads lie within blocks.

    Raises ShapeError where features are no multiple of the packing's.
    """
    context, c = query.context, query.context.packing.features
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if operand.features % c or operand.features != query.features:
            raise ShapeError(f"the {name} has {operand.features} features, the packing {c} per ciphertext: attention needs whole blocks, and all alike")
    if query.features == c:
        return [(query, key, value)]
    projected = _projected(query, key, value, levels)
    return [tuple(block_of(context, ct, block) for ct in projected) for block in range(query.features // c)]


def block_of(context: OperationContext, ct: Ciphertext, block: int) -> Operand:
    """One feature block of a batch [blocks]."""
    return Operand(context, context.packing.features, context.backend.take(ct, slice(block, block + 1)))


def block_heads(query: Operand, heads: int) -> int:
    """Heads of one feature block. Raises ShapeError for heads that would cross blocks."""
    blocks = query.features // query.context.packing.features
    if heads % blocks:
        raise ShapeError(f"{heads} heads cannot be shared out among {blocks} ciphertexts: use a packing with fewer or more features")
    return heads // blocks


def joined(context: OperationContext, parts: list[Ciphertext]) -> Ciphertext:
    """Feature blocks [1] as one batch [blocks]."""
    return parts[0] if len(parts) == 1 else context.backend.reshape(context.backend.stack(parts), (len(parts),))


def prepare(
    context: OperationContext,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Ciphertext | None,
    heads: int,
    scaling: float,
    approximation: KernelExponential,
    levels: AttentionLevels,
    causal: bool = False,
) -> Prepared:
    """Everything up to the scores s / 2^squarings, two levels below levels.query, three when `causal`: then -1 where the key is ahead of the
    query, which makes the kernel (1 - 1)^(2^squarings) and its derivative exactly 0 there."""
    layout = ScoreLayout(context.packing, heads)
    backend = context.backend
    q, k, v = project(query, key, value, levels)
    with backend.log.measure("attention"):
        rotated_k = backend.rotate(k, baby_steps(layout))
        v = _masked(context, v, mask, levels.value)
        rotated_v = backend.rotate(v, baby_steps(layout))
        scores = _scores(context, layout, q, rotated_k, -0.5 * scaling / approximation.degree)
        if causal:
            scores = _causal(context, layout, scores, approximation.squarings + levels.value + 2)
    return Prepared(layout, q, k, v, rotated_v, scores)


def default_levels(context: OperationContext, squarings: int, causal: bool) -> AttentionLevels:
    """The lowest that work; a causal mask gets a level of the scores where it would cost the refreshed ones another refresh."""
    if causal and squarings + DEFAULT_LEVELS.value + 2 > context.top:
        return replace(DEFAULT_LEVELS, query=DEFAULT_LEVELS.query + 1)
    return DEFAULT_LEVELS


def project(query: Operand, key: Operand, value: Operand, levels: AttentionLevels = DEFAULT_LEVELS) -> tuple[Ciphertext, Ciphertext, Ciphertext]:
    """q and k at levels.query, v one above levels.value, one feature block each, unbatched; maps of one input that are still waiting and end at
    one level are one matrix product."""
    return tuple(query.context.backend.take(ct, 0) for ct in _projected(query, key, value, levels))


def _projected(query: Operand, key: Operand, value: Operand, levels: AttentionLevels) -> list[Ciphertext]:
    """`project`, [blocks] each."""
    operands = [operand.source if _rotates(operand) else operand for operand in (query, key, value)]
    context = query.context
    backend = context.backend
    ends = (levels.query, levels.query, levels.value + 1)
    wanted = [end + _rotates(operand) for end, operand in zip(ends, (query, key, value), strict=True)]
    source = getattr(operands[0], "source", None)
    if all(isinstance(o, WaitingLinear) and o.waiting and o.source is source for o in operands):
        source.ensure(max(wanted) + 1)
        results: dict[int, Ciphertext] = {}
        for level in sorted(set(wanted), reverse=True):
            members = [i for i in range(3) if wanted[i] == level]
            stacked = linear.encrypted(context, source, [operands[i] for i in members], level)
            blocks = stacked.count // len(members)
            results |= {i: backend.take(stacked, slice(position * blocks, (position + 1) * blocks)) for position, i in enumerate(members)}
        projected = [results[i] for i in range(3)]
    else:
        projected = [_at_level(operand, level) for operand, level in zip(operands, wanted, strict=True)]
    return [rotary.encrypted(context, ct, o.rotation) if _rotates(o) else ct for o, ct in zip((query, key, value), projected, strict=True)]


def _rotates(operand: Operand) -> bool:
    return isinstance(operand, WaitingRotary) and operand.waiting


def _at_level(operand: Operand, level: int) -> Ciphertext:
    if operand.level < level:
        operand.ensure(level)
    return operand.at(level)


def _scores(context: OperationContext, layout: ScoreLayout, q: Ciphertext, rotated_k: Ciphertext, factor: float) -> Ciphertext:
    """[score ciphertexts] holding factor * ||q - k||^2, two levels below q. The other slots are 0."""
    return collect(context, layout, squared_differences(context, layout, q, rotated_k), factor)


def squared_differences(context: OperationContext, layout: ScoreLayout, q: Ciphertext, rotated_k: Ciphertext) -> Iterator[Ciphertext]:
    """(q_i - k_j)^2 per giant step, [babies] of 3 components, for `collect`."""
    backend = context.backend
    rotated_q = backend.rotate(q, giant_steps(layout, -1))
    for g in range(layout.giants):
        difference = backend.subtract(rotated_k, backend.reshape(backend.take(rotated_q, g), (1,)))
        yield backend.multiply(difference, difference)


def collect(context: OperationContext, layout: ScoreLayout, products: Iterable[Ciphertext], factor: float) -> Ciphertext:
    """[score ciphertexts] holding factor * (sums over each head) of `products`, [babies] of 3 components per giant step; two levels below them.

    Each diagonal is summed into the window of its giant step by rotate-and-add, and from there into its own feature by the transpose of
    what copies it back later: masks that also carry `factor`, summed over the diagonals, then one rotation per offset. One giant step after
    another, because all products at once would take gigabytes.
    """
    backend, b = context.backend, layout.babies
    sums = []
    for g, product in enumerate(products):
        partial = backend.relinearize(backend.rescale(product))
        for step in window_steps(layout, layout.window(g)):
            partial = reduce.rotate_and_add(context, partial, step)
        sums.append(partial)
    scale = context.canonical_factor(sums[0].level, sums[0].scale)
    parts = []
    for first in range(0, layout.giants, layout.windows):
        diagonals = backend.stack(sums[first : first + layout.windows])
        count = diagonals.batch_shape[0]
        masks = context.constant(("collect", layout, count, factor), diagonals.level, scale, lambda n=count: factor * collect_masks(layout, n))
        collected = backend.multiply_plain_sum(masks, backend.reshape(diagonals, (count * b,)))
        parts.append(backend.sum_rotated(collected, offsets(layout)))
    return backend.rescale(backend.stack(parts))


def _causal(context: OperationContext, layout: ScoreLayout, scores: Ciphertext, wanted: int) -> Ciphertext:
    """m (1 + scores) - 1 for the causal mask m: one level; without one the scores are refreshed first, to `wanted` if there are as many."""
    backend = context.backend
    if scores.level < 1:
        scores = context.ensure_level(scores, min(wanted, context.top))
    kept = context.multiply_constant(backend.add_scalar(scores, 1.0), ("causal", layout), lambda: placed(layout, causal_pairs(layout.packing.tokens)))
    return backend.add_scalar(kept, -1.0)


def kernel(context: OperationContext, scores: Ciphertext, squarings: int, level: int) -> Ciphertext:
    """(1 + x)^(2^squarings), at `level` or higher; one refresh, at once and of x, where one is enough: a bootstrap's error grows with the cube of what the
    slots have in common, and every squaring doubles it."""
    with context.backend.log.measure("kernel"):
        enough = squarings + level
        x = context.backend.add_scalar(context.ensure_level(scores, enough) if enough <= context.top else scores, 1.0)
        for _ in range(squarings):
            x = context.square(context.ensure_level(x, 1))
        return context.ensure_level(x, level)


def _masked(context: OperationContext, value: Ciphertext, mask: Ciphertext | None, level: int) -> Ciphertext:
    """value * mask at `level`."""
    backend = context.backend
    if mask is None:
        return backend.drop_level(value, level)
    mask = context.ensure_level(backend.take(mask, 0), level + 1)
    return context.product(value, backend.drop_level(mask, level + 1))


def weighted_sum(context: OperationContext, layout: ScoreLayout, weights: Ciphertext, rotated_v: Ciphertext) -> Ciphertext:
    """sum_j (score j over its head) * v_j, [1], canonical, one level below v; `weights` are above v."""
    backend = context.backend
    sums = [backend.sum(backend.multiply(copied, rotated_v)) for copied in copies(context, layout, weights, rotated_v)]
    products = backend.relinearize(backend.stack(sums))
    return backend.reshape(backend.rescale(backend.sum_rotated(products, giant_steps(layout))), (1,))


def copies(context: OperationContext, layout: ScoreLayout, scores: Ciphertext, other: Ciphertext) -> Iterator[Ciphertext]:
    """Per giant step, [babies]: each score over all features of its head, at the level of `other`, and at the scale with which the
    product with it is canonical after rescaling; `scores` are above `other`."""
    backend = context.backend
    scores = backend.drop_level(scores, other.level + 1)
    product_scale = backend.parameters.scale_at(other.level - 1) * backend.parameters.moduli[other.level]
    factor = product_scale / other.scale * backend.parameters.moduli[scores.level] / scores.scale
    rotated = [backend.rotate(backend.take(scores, s), offsets(layout)) for s in range(layout.ciphertexts)]
    for g in range(layout.giants):
        window = layout.window(g)
        masks = context.constant(("copy", layout, window), scores.level, factor, lambda w=window: copy_masks(layout, w))
        copied = backend.rescale(backend.multiply_plain_sum(masks, rotated[layout.ciphertext(g)]))
        for step in reversed(window_steps(layout, window)):
            copied = reduce.rotate_and_add(context, copied, -step)
        yield copied


def baby_steps(layout: ScoreLayout, sign: int = 1) -> list[int]:
    """Rotations by 0 .. babies - 1 tokens."""
    return [sign * a * layout.packing.token_stride for a in range(layout.babies)]


def giant_steps(layout: ScoreLayout, sign: int = 1) -> list[int]:
    """Rotations by 0 .. giants - 1 times `babies` tokens."""
    return [sign * g * layout.babies * layout.packing.token_stride for g in range(layout.giants)]


def offsets(layout: ScoreLayout) -> list[int]:
    """Distances between two features of one window."""
    return list(range(-(layout.babies - 1), layout.babies))


def window_steps(layout: ScoreLayout, window: int) -> list[int]:
    """Rotations that, added one after another, sum a whole head into one of its windows; negated and reversed, they copy the window
    over the head."""
    start = window * layout.babies
    widths = reversed(reduce.power_steps(layout.babies, layout.head_dim))
    return [-width if start & width else width for width in widths]


def collect_masks(layout: ScoreLayout, windows: int) -> np.ndarray:
    """[2b - 1, windows * b, head_dim] 0/1: which rotation r = o - a brings feature o of a window to feature a, for its diagonal a."""
    b = layout.babies
    masks = np.zeros((2 * b - 1, windows, b, layout.head_dim))
    for window in range(windows):
        for a in range(b):
            for o in range(b):
                masks[o - a + b - 1, window, a, window * b + o] = 1.0
    return masks.reshape(2 * b - 1, windows * b, layout.head_dim)


def copy_masks(layout: ScoreLayout, window: int) -> np.ndarray:
    """[b, 2b - 1, head_dim] 0/1: which rotation r = a - o brings feature a of the window to each of its features o."""
    b = layout.babies
    masks = np.zeros((b, 2 * b - 1, layout.head_dim))
    for a in range(b):
        for o in range(b):
            masks[a, a - o + b - 1, window * b + o] = 1.0
    return masks


def rotations(packing: Packing, heads: int) -> set[int]:
    """Rotation steps of `encrypted`, projections not included."""
    layout = ScoreLayout(packing, heads)
    steps = {*baby_steps(layout), *giant_steps(layout), *giant_steps(layout, -1), *offsets(layout)}
    for window in range(min(layout.windows, layout.giants)):
        steps |= {sign * step for step in window_steps(layout, window) for sign in (1, -1)}
    return {step % packing.slots for step in steps} - {0}
