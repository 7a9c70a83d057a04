"""Gradients of Gaussian-kernel attention between ciphertexts (the forward is `hf_he.ops.attention`).

With s_ij = -scaling / 2 |q_i - k_j|^2, w_ij = K(s_ij) = (1 + s_ij / 2^k)^(2^k) and o_i = sum_j w_ij m_j v_j, for the gradient do of o:

    dv_j = m_j sum_i w_ij do_i        ds_ij = (do_i . m_j v_j) K'(s_ij)        K'(s) = (1 + s / 2^k)^(2^k - 1)
    dq_i = scaling sum_j ds_ij (k_j - q_i)        dk_j = -scaling sum_i ds_ij (k_j - q_i)

Everything stays un-aligned: in the lane of token t the score (g, a) belongs to query t - g b and key t + a, so do is rotated as q is,
do . v is collected into the score ciphertexts as the squares are, and one giant step after another is copied over the heads and multiplied.
Sums over the babies belong to queries (rotated by g b), sums over the giants to keys (rotated by -a). K' takes no level of its own:
(do . v) prod_{i < k} (1 + x)^(2^i) is multiplied up beside the squarings of (1 + x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from hf_he.approximation import KernelExponential
from hf_he.backends.base import Ciphertext
from hf_he.ops import attention
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import Packing, ScoreLayout

Policy = Literal["recompute", "keep"]

TRAINING_LEVELS = AttentionLevels(query=2, value=2)
"""Masked values are two levels high, as do . v needs them."""

ADAPTER_LEVEL = 4
"""Where low-rank maps (hf_he.ops.weights) want the gradients of queries, keys and values."""

GRADIENT_DEPTH = 2
"""Levels from the kernel or its slopes to the gradients: copy mask, product."""

Gradients = tuple[Operand | None, Operand | None, Operand | None]
BlockGradients = tuple[Ciphertext | None, Ciphertext | None, Ciphertext | None]


@dataclass(frozen=True)
class Saved:
    """What the backward needs of the forward of one feature block, unbatched: q, k and the masked v; the encrypted mask [1]; and of the kernel, by policy, the
    scores s / 2^squarings [score ciphertexts] ("recompute") or kernel and derivative [2, score ciphertexts] ("keep")."""

    heads: int
    scaling: float
    approximation: KernelExponential
    policy: Policy
    mask: Ciphertext | None
    q: Ciphertext
    k: Ciphertext
    v: Ciphertext
    scores: Ciphertext


def output_level(context: OperationContext, squarings: int) -> int:
    """Level of the gradients: that of the adapters where the parameters have so many levels above the kernel, otherwise 1, to be refreshed."""
    return ADAPTER_LEVEL if ADAPTER_LEVEL + GRADIENT_DEPTH + 1 + squarings <= context.top else 1


def training_levels(context: OperationContext, squarings: int) -> AttentionLevels:
    """Queries and keys one level above the gradients that are made of them."""
    return replace(TRAINING_LEVELS, query=output_level(context, squarings) + 1)


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
    causal: bool = False,
) -> tuple[Operand, tuple[Saved, ...]]:
    """`attention.encrypted`, and what `backward` needs, by feature block.

    "recompute" saves the scores and squares again in the backward: no more work here, and one refresh of two narrow ciphertexts there, if the
    levels suffice for all squarings. "keep" multiplies up the derivative beside the kernel (squarings - 1 more products) and saves both.
    """
    outputs, saved = [], []
    for operands in attention.by_block(query, key, value, levels):
        own = attention.block_heads(query, heads)
        prepared = attention.prepare(context, *operands, mask, own, scaling, approximation, levels, causal)
        with context.backend.log.measure("attention"):
            if policy == "keep":
                scores = kernel_and_derivative(context, prepared.scores, approximation.squarings, levels.value + 1)
                weights = context.backend.take(scores, 0)
            else:
                scores = prepared.scores
                weights = attention.kernel(context, scores, approximation.squarings, levels.value + 1)
            outputs.append(attention.weighted_sum(context, prepared.layout, weights, prepared.rotated_v))
        saved.append(Saved(own, scaling, approximation, policy, mask, prepared.q, prepared.k, prepared.v, scores))
    return Operand(context, query.features, attention.joined(context, outputs)), tuple(saved)


@dataclass(frozen=True)
class GaussianKernel:
    """Forward and backward of one attention module; `levels` as planned, or None."""

    heads: int
    scaling: float
    approximation: KernelExponential
    levels: AttentionLevels | None = None
    causal: bool = False

    def forward(self, context: Any, query: Operand, key: Operand, value: Operand, mask: Ciphertext | None) -> tuple[Operand, tuple[Saved, ...]]:
        levels = self.levels or training_levels(context, self.approximation.squarings)
        policy = context.activations
        return forward(context, query, key, value, mask, self.heads, self.scaling, self.approximation, levels, policy, self.causal)

    def backward(self, context: OperationContext, saved: Sequence[Saved], gradient: Operand, needs: tuple[bool, bool, bool]) -> Gradients:
        return backward(context, saved, gradient, needs, output_level(context, self.approximation.squarings))


def backward(
    context: OperationContext, saved: Sequence[Saved], gradient: Operand, needs: tuple[bool, bool, bool] = (True, True, True), output: int = 1
) -> Gradients:
    """Gradients of query, key and value, [blocks] each at level `output`, canonical; None where `needs` says so.

    `gradient`: of the attention's result [blocks], at any level. Of it `output` + 1 levels are used for values (one more under a mask) and 2 for
    queries and keys, of q and k `output` + 1, of the kernel and its slopes GRADIENT_DEPTH more than `output` (of the kernel one more under a mask). What
    falls short is refreshed: whole states together, then score ciphertexts together. T log2(head_dim / b) rotations for do . v, as many for
    the slopes, as many for the weights; about 3 b + 4 T / b others.
    """
    return gradients_by_block(context, saved, gradient, lambda one, do: _backward(context, one, do, needs, output))


def gradients_by_block(context: OperationContext, saved: Sequence[Any], gradient: Operand, one_block: Callable[[Any, Operand], BlockGradients]) -> Gradients:
    """Gradients [blocks] of queries, keys and values from those of each block; the gradient itself if there is but one."""
    blocks = [gradient] if len(saved) == 1 else [attention.block_of(context, gradient.ciphertext, i) for i in range(len(saved))]
    found = [one_block(one, do) for one, do in zip(saved, blocks, strict=True)]

    def operand(position: int) -> Operand | None:
        if found[0][position] is None:
            return None
        return Operand(context, gradient.features, context.backend.stack([gradients[position] for gradients in found]))

    return operand(0), operand(1), operand(2)


def _backward(context: OperationContext, saved: Saved, gradient: Operand, needs: tuple[bool, bool, bool], output: int) -> BlockGradients:
    """`backward` of one block, unbatched."""
    backend, layout = context.backend, ScoreLayout(context.packing, saved.heads)
    for_scores, for_values = needs[0] or needs[1], needs[2]
    if not for_scores and not for_values:
        return None, None, None
    masked = saved.mask is not None
    value_level = output + 1 + masked if for_values else 0
    depth = max(value_level, attention.SCORE_DEPTH if for_scores else 0)
    q, k, v, dq, dk, dv = saved.q, saved.k, saved.v, None, None, None
    with backend.log.measure("attention"):
        do = backend.take(gradient.at_least(depth), 0)
        if for_scores:
            do, q, k, v = context.ensure_levels([(do, depth), (q, output + 1), (k, output + 1), (v, attention.SCORE_DEPTH)])
        else:
            do = context.ensure_level(do, depth)
        levels = kernel_levels(saved, output + GRADIENT_DEPTH, for_values)
        at = product_level(saved, levels.slopes, min(do.level, v.level))
        do = backend.drop_level(do, max(value_level, at if for_scores else 0))
        rotated = backend.rotate(do, attention.giant_steps(layout, -1))
        found = errors(context, layout, backend.drop_level(rotated, at), v, saved.scaling) if for_scores else None
        weights, slopes = narrow(context, saved, found, levels)
        if slopes is not None:
            dq, dk = query_and_key(context, layout, q, k, slopes, needs, output)
        if for_values:
            dv = value_gradient(context, layout, weights, backend.drop_level(rotated, value_level))
            if saved.mask is not None:
                dv = context.product(dv, backend.match_level(context.ensure_level(backend.take(saved.mask, 0), dv.level), dv.level))
    return dq, dk, dv


def kernel_and_derivative(context: OperationContext, scores: Ciphertext, squarings: int, level: int) -> Ciphertext:
    """[2, score ciphertexts]: (1 + x)^n and (1 + x)^(n - 1), n = 2^squarings, at `level` or higher."""
    backend = context.backend
    x = backend.add_scalar(context.ensure_level(scores, squarings + level if squarings + level <= context.top else 1), 1.0)
    square = context.square(x)
    pair = backend.stack([square, backend.match_level(x, square.level)])
    for _ in range(squarings - 1):
        pair = context.ensure_level(pair, 1)
        pair = context.product(pair, backend.take(pair, 0))
    return context.ensure_level(pair, level)


class KernelLevels(NamedTuple):
    """Of the kernel and of its slopes, for a gradient."""

    weights: int
    slopes: int


def kernel_levels(saved: Saved, level: int, for_values: bool) -> KernelLevels:
    """`level`; the kernel one higher where a mask follows its product, and with it the slopes that are multiplied up beside it.

    The derivative that "keep" saved must not be asked for that level: it is far below 1 between distant tokens, and a bootstrap's error is absolute.
    """
    weights = level + (saved.mask is not None and for_values)
    return KernelLevels(weights, level if saved.policy == "keep" else weights)


def product_level(saved: Saved, slope_level: int, available: int) -> int:
    """Where do . v is multiplied: high enough for all that follows, or, where a refresh is needed anyway, as low as it can be."""
    rest = 1 if saved.policy == "keep" else saved.approximation.squarings
    level = slope_level + rest + attention.SCORE_DEPTH
    return level if level <= available else attention.SCORE_DEPTH


def errors(context: OperationContext, layout: ScoreLayout, rotated_do: Ciphertext, v: Ciphertext, factor: float, out: Ciphertext | None = None) -> Ciphertext:
    """[score ciphertexts]: factor * do_i . (v_j - o_i) in the place of score (i, j), two levels below `rotated_do` [giants]; without `out`, o is 0."""
    backend, level = context.backend, rotated_do.level
    v = backend.drop_level(v, level) if out is None else backend.match_level(v, level)
    rotated_v = backend.rotate(v, attention.baby_steps(layout))
    rotated_out = None if out is None else backend.rotate(backend.match_level(out, level), attention.giant_steps(layout, -1))

    def products() -> Iterator[Ciphertext]:
        for g in range(layout.giants):
            difference = rotated_v if rotated_out is None else backend.subtract(rotated_v, _giant(context, rotated_out, g))
            yield backend.multiply(difference, _giant(context, rotated_do, g))

    return attention.collect(context, layout, products(), factor)


def narrow(context: OperationContext, saved: Saved, errors: Ciphertext | None, levels: KernelLevels) -> tuple[Ciphertext, Ciphertext | None]:
    """Kernel w, and errors * K' where there are errors; [score ciphertexts] each, at `levels` or higher."""
    backend = context.backend
    if saved.policy == "recompute":
        return weights_and_slopes(context, saved.scores, errors, saved.approximation.squarings, levels.weights)
    weights, derivative = (backend.take(saved.scores, i) for i in range(2))
    if errors is None:
        return context.ensure_level(weights, levels.weights), None
    above = levels.slopes + 1
    weights, derivative, errors = context.ensure_levels([(weights, levels.weights), (derivative, above), (errors, above)])
    return weights, context.product(backend.match_level(derivative, above), backend.match_level(errors, above))


def weights_and_slopes(
    context: OperationContext, scores: Ciphertext, errors: Ciphertext | None, squarings: int, level: int
) -> tuple[Ciphertext, Ciphertext | None]:
    """(1 + x)^n and errors * (1 + x)^(n - 1), n = 2^squarings, of x = `scores`, multiplied up side by side; at `level` or higher."""
    backend = context.backend
    if errors is None:
        return attention.kernel(context, scores, squarings, level), None
    enough = squarings + level if squarings + level <= context.top else 1
    scores, errors = context.ensure_levels([(scores, enough), (errors, enough)])
    x = backend.add_scalar(scores, 1.0)
    start = min(x.level, errors.level)
    pair = backend.stack([backend.match_level(ct, start) for ct in (x, errors)])
    for _ in range(squarings):
        pair = context.ensure_level(pair, 1)
        pair = context.product(pair, backend.take(pair, 0))
    pair = context.ensure_level(pair, level)
    return backend.take(pair, 0), backend.take(pair, 1)


def query_and_key(
    context: OperationContext,
    layout: ScoreLayout,
    q: Ciphertext,
    k: Ciphertext,
    slopes: Ciphertext,
    needs: tuple[bool, bool, bool],
    output: int,
    distances: bool = True,
) -> tuple[Ciphertext | None, Ciphertext | None]:
    """At `output`, of scores -|q_i - k_j|^2 / 2: sum_j slope_ij (k_j - q_i), and minus the same sum over i; of q_i . k_j: sum_j slope_ij k_j and
    sum_i slope_ij q_i."""
    backend = context.backend
    rotated_k = backend.rotate(backend.match_level(k, output + 1), attention.baby_steps(layout))
    rotated_q = backend.rotate(backend.match_level(q, output + 1), attention.giant_steps(layout, -1))
    queries: list[Ciphertext] = []
    keys: Ciphertext | None = None
    for g, copied in enumerate(attention.copies(context, layout, slopes, rotated_k)):
        one_q = _giant(context, rotated_q, g)
        both = backend.multiply(copied, backend.subtract(rotated_k, one_q)) if distances else None
        if needs[0]:
            queries.append(backend.sum(both or backend.multiply(copied, rotated_k)))
        if needs[1]:
            product = both or backend.multiply(copied, one_q)
            keys = product if keys is None else backend.add(keys, product)
    dq = aligned(context, backend.stack(queries), attention.giant_steps(layout)) if needs[0] else None
    dk = None if keys is None else aligned(context, keys, attention.baby_steps(layout, -1))
    return dq, backend.negate(dk) if distances and dk is not None else dk


def _giant(context: OperationContext, rotated: Ciphertext, g: int) -> Ciphertext:
    """[1]: one of [giants], beside all babies."""
    return context.backend.reshape(context.backend.take(rotated, g), (1,))


def value_gradient(context: OperationContext, layout: ScoreLayout, weights: Ciphertext, rotated_do: Ciphertext) -> Ciphertext:
    """sum_i w_ij do_i, one level below `rotated_do` [giants], canonical; `weights` are above it."""
    backend = context.backend
    total: Ciphertext | None = None
    for g, copied in enumerate(attention.copies(context, layout, weights, rotated_do)):
        product = backend.multiply(copied, _giant(context, rotated_do, g))
        total = product if total is None else backend.add(total, product)
    assert total is not None
    return aligned(context, total, attention.baby_steps(layout, -1))


def aligned(context: OperationContext, products: Ciphertext, steps: Sequence[int]) -> Ciphertext:
    """sum_i rotate(products[i], steps[i]) of 3 components, relinearised, moved and rescaled once."""
    backend = context.backend
    return backend.rescale(backend.sum_rotated(backend.relinearize(products), steps))


def rotations(packing: Packing, heads: int) -> set[int]:
    """Rotation steps of `forward` and `backward`, projections not included."""
    backwards = {step % packing.slots for step in attention.baby_steps(ScoreLayout(packing, heads), -1)}
    return attention.rotations(packing, heads) | backwards - {0}
