"""Gaussian-kernel attention (Rho et al., ICLR 2025) between ciphertexts.

Scores are taken along diagonals j = g * b + a of the token-by-token matrix, un-aligned: D_j = rotate(q, -g b) - rotate(k, a), so that b - 1
rotations of k and v and T / b - 1 of q serve all T diagonals (distances in tokens). Squares are summed over each head, and the sums of all
diagonals and heads are moved into one score ciphertext (see ScoreLayout), where everything narrow happens: refresh, (1 + x / 2^k)^(2^k) by k
squarings. Then each score is copied over its head again, multiplied with rotate(v, a), summed over a, and each g is rotated into place.
The encrypted mask multiplies v before its rotations, beside the scores, where a level is free.
"""

from __future__ import annotations

import numpy as np
import torch

from hf_he.approximation import KernelExponential
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import linear, reduce
from hf_he.ops.context import OperationContext
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
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
) -> Ciphertext:
    """Un-normalised kernel attention of one feature block [1]; the result is at level `levels.value` - 1, canonical.

    `mask`: [1] from `pack_attention_mask`. The scores are refreshed when `levels` leave them too few levels for the kernel. Rotations:
    T log2(head_dim / b) at each of levels.query - 1 and levels.value, about 2 T / b + 6 b others.
    """
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if operand.features != context.packing.features:
            raise ShapeError(f"the {name} has {operand.features} features, the packing {context.packing.features} per ciphertext: attention needs them equal")
    layout = ScoreLayout(context.packing, heads)
    backend = context.backend
    q, k, v = project(query, key, value, levels)
    with backend.log.measure("attention"):
        babies = [a * context.packing.token_stride for a in range(layout.babies)]
        rotated_k = backend.rotate(k, babies)
        rotated_v = backend.rotate(_masked(context, v, mask, levels.value), babies)
        scores = _scores(context, layout, q, rotated_k, -0.5 * scaling / approximation.degree)
        weights = _kernel(context, scores, approximation.squarings, levels.value + 1)
        weights = backend.drop_level(weights, levels.value + 1)
        return backend.reshape(_weighted_sum(context, layout, weights, rotated_v), (1,))


def project(query: Operand, key: Operand, value: Operand, levels: AttentionLevels = DEFAULT_LEVELS) -> tuple[Ciphertext, Ciphertext, Ciphertext]:
    """q and k at levels.query, v one above levels.value, unbatched; maps of one input that are still waiting and end at one level are one
    matrix product."""
    operands = (query, key, value)
    context = query.context
    backend = context.backend
    wanted = (levels.query, levels.query, levels.value + 1)
    waiting = all(isinstance(o, WaitingLinear) and o.waiting for o in operands)
    if not waiting or not query.source is key.source is value.source:
        return tuple(_at_level(operand, level) for operand, level in zip(operands, wanted, strict=True))
    query.source.ensure(max(wanted) + 1)
    results: dict[int, Ciphertext] = {}
    for level in sorted(set(wanted), reverse=True):
        members = [i for i in range(3) if wanted[i] == level]
        stacked = linear.encrypted(context, query.source, [operands[i] for i in members], level)
        results |= {i: backend.take(stacked, position) for position, i in enumerate(members)}
    return results[0], results[1], results[2]


def _at_level(operand: Operand, level: int) -> Ciphertext:
    if operand.level < level:
        operand.ensure(level)
    return operand.context.backend.take(operand.at(level), 0)


def _scores(context: OperationContext, layout: ScoreLayout, q: Ciphertext, rotated_k: Ciphertext, factor: float) -> Ciphertext:
    """[score ciphertexts] holding factor * ||q - k||^2, two levels below q. The other slots are 0.

    Each diagonal is summed into the window of its giant step by rotate-and-add, and from there into its own feature by the transpose of
    what copies it back later: masks that also carry `factor`, summed over the diagonals, then one rotation per offset. One giant step after
    another, because all squares at once would take gigabytes.
    """
    backend, stride, b = context.backend, context.packing.token_stride, layout.babies
    rotated_q = backend.rotate(q, [-g * b * stride for g in range(layout.giants)])
    sums = []
    for g in range(layout.giants):
        difference = backend.subtract(rotated_k, backend.reshape(backend.take(rotated_q, g), (1,)))
        partial = backend.relinearize(backend.rescale(backend.multiply(difference, difference)))
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


def _kernel(context: OperationContext, scores: Ciphertext, squarings: int, level: int) -> Ciphertext:
    """(1 + x)^(2^squarings), at `level` or higher; one refresh, at once, where one is enough."""
    x = context.backend.add_scalar(scores, 1.0)
    if squarings + level <= context.top:
        x = context.ensure_level(x, squarings + level)
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


def _weighted_sum(context: OperationContext, layout: ScoreLayout, weights: Ciphertext, rotated_v: Ciphertext) -> Ciphertext:
    """sum_j (score j over its head) * v_j, canonical, one level below v and two below the weights."""
    backend, b = context.backend, layout.babies
    product_scale = backend.parameters.scale_at(rotated_v.level - 1) * backend.parameters.moduli[rotated_v.level]
    factor = product_scale / rotated_v.scale * backend.parameters.moduli[weights.level] / weights.scale
    rotated = [backend.rotate(backend.take(weights, s), offsets(layout)) for s in range(layout.ciphertexts)]
    sums = []
    for g in range(layout.giants):
        window = layout.window(g)
        masks = context.constant(("copy", layout, window), weights.level, factor, lambda w=window: copy_masks(layout, w))
        copies = backend.rescale(backend.multiply_plain_sum(masks, rotated[layout.ciphertext(g)]))
        for step in reversed(window_steps(layout, window)):
            copies = reduce.rotate_and_add(context, copies, -step)
        sums.append(backend.sum(backend.multiply(copies, rotated_v)))
    products = backend.relinearize(backend.stack(sums))
    return backend.rescale(backend.sum_rotated(products, [g * b * context.packing.token_stride for g in range(layout.giants)]))


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
    b, stride = layout.babies, packing.token_stride
    steps = {a * stride for a in range(b)} | {sign * g * b * stride for g in range(layout.giants) for sign in (1, -1)} | set(offsets(layout))
    for window in range(min(layout.windows, layout.giants)):
        steps |= {sign * step for step in window_steps(layout, window) for sign in (1, -1)}
    return {step % packing.slots for step in steps} - {0}
