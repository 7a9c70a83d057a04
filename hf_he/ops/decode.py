"""Attention of one new token over a key-value cache: one ciphertext product against all cached keys, one against all cached values.

The cache holds token t of a sequence in token lane t (chunk t // T of a batch of chunks when there are more tokens than lanes); the query
is replicated over all lanes. (q - K)^2, or q K, is summed over each head by rotate-and-add, and one plaintext with the kernel's factor selects the
first feature of each head on valid lanes. Everything narrow then happens on one ciphertext: the scores of chunk j are moved to feature j of
their head, refreshed, and put through the kernel (Rho et al., ICLR 2025) or the power softmax (Zimerman et al., arXiv 2410.09457), whose
sum over the keys is log2(T) rotations by whole lanes. The weights are copied over their head, multiplied by V, and summed over the lanes, which
are cyclic: the result is replicated again. All other slots are exactly 0 or idle in the middle of a fitted interval, so no mask follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from hf_he.approximation import KernelExponential, Polynomial, Reciprocal
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import reduce
from hf_he.ops.context import OperationContext
from hf_he.ops.goldschmidt import evaluate_reciprocal
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.ops.power_softmax import PowerSoftmax, power
from hf_he.ops.rotary import WaitingRotary
from hf_he.packing import Packing

CACHE_LEVELS = AttentionLevels(query=2, value=2)
"""Of the cached keys and values: the lowest that work, and one more for the values, which the map after attention takes. Reading a cache costs
no level of it, and neither does appending."""


class CachedStates(Operand):
    """Keys or values of a cache: `chunks` of unbatched ciphertexts, 0 where `valid` [chunks, T, B] is 0."""

    def __init__(self, context: OperationContext, features: int, chunks: tuple[Ciphertext, ...], valid: np.ndarray) -> None:
        super().__init__(context, features)
        self.chunks = chunks
        self.valid = valid

    @property
    def level(self) -> int:
        return self.chunks[0].level


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    scaling: float,
    approximation: KernelExponential | Reciprocal | Polynomial,
    softmax: PowerSoftmax | None = None,
) -> torch.Tensor:
    """Query [B, heads, head_dim], keys and values [B, heads, S, head_dim], valid [B, S] of 0/1 -> [B, heads, head_dim]."""
    valid = valid[:, None, :].to(query.dtype)
    if softmax is None:
        distance = (query.unsqueeze(-2) - keys).square().sum(-1)
        weights = approximation(-0.5 * scaling * distance) * valid
    else:
        length = valid.sum(-1, keepdim=True)
        products = (query.unsqueeze(-2) - keys).square() if softmax.distances else query.unsqueeze(-2) * keys
        powers = ((products.sum(-1) * softmax.factor(scaling) + softmax.shift) * valid) ** softmax.power
        if softmax.divisor is not None:
            weights = powers / (softmax.divisor * (length if softmax.length_agnostic else 1.0))
        else:
            eps = softmax.eps if softmax.length_agnostic else softmax.eps / length
            weights = powers / length * approximation(eps + powers.sum(-1, keepdim=True) / length)
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


def encrypted(
    context: OperationContext,
    query: Ciphertext,
    keys: Sequence[Ciphertext],
    values: Sequence[Ciphertext],
    valid: np.ndarray,
    heads: int,
    scaling: float,
    approximation: KernelExponential | Reciprocal | Polynomial,
    softmax: PowerSoftmax | None = None,
) -> Ciphertext:
    """Attention of the replicated `query` [1] over chunks of `keys` and `values`, each unbatched and 0 on invalid lanes; [1], replicated, one
    level below the values.

    `valid`: [chunks, T, B] of 0/1, public. `approximation`: of the exponential without `softmax`, of 1 / (mean_eps + mean) with it (ignored when it
    has a divisor). Query and keys are at one level, two above the scores, which are refreshed. Rotations: 2 log2(head_dim) + log2(T) for one
    chunk; each further chunk takes 2 log2(head_dim) + 2.
    """
    backend, packing = context.backend, context.packing
    head_dim = packing.features // heads
    if valid.shape != (len(keys), packing.tokens, packing.sequences) or len(values) != len(keys):
        raise ShapeError(f"{len(keys)} chunks of keys and {len(values)} of values do not fit a validity of shape {valid.shape}")
    if len(keys) > head_dim:
        raise ShapeError(f"{len(keys)} chunks of cached tokens do not fit heads of {head_dim} features: at most {head_dim * packing.tokens} tokens")
    with backend.log.measure("attention"):
        stacked = backend.stack(list(keys))
        if softmax is None:
            difference = backend.subtract(stacked, query)
            products = context.square(difference)
            weights = _kernel(context, products, valid, head_dim, -0.5 * scaling / approximation.degree, approximation.squarings, values[0].level)
        else:
            products = context.square(backend.subtract(stacked, query)) if softmax.distances else context.product(stacked, query)
            weights = _power_softmax(context, products, valid, head_dim, softmax.factor(scaling), approximation, softmax, values[0].level)
        return _weighted_sum(context, weights, backend.stack(list(values)), head_dim)


def _kernel(context: OperationContext, products: Ciphertext, valid: np.ndarray, head_dim: int, factor: float, squarings: int, level: int) -> Ciphertext:
    """(1 + factor * sum)^(2^squarings) on the first feature of each head of valid lanes, 0 elsewhere: [chunks] at `level`."""
    gains, ones = factor * valid, valid.astype(np.float64)
    x = _scores(context, products, gains, ones, head_dim)
    level += _packed(valid)
    for done in range(squarings):
        x = context.square(_prepared(context, x, squarings - done + level, 1))
    return _unpacked(context, _prepared(context, x, level, level), valid, head_dim, level)


def _power_softmax(
    context: OperationContext,
    products: Ciphertext,
    valid: np.ndarray,
    head_dim: int,
    factor: float,
    approximation: Reciprocal | Polynomial,
    softmax: PowerSoftmax,
    level: int,
) -> Ciphertext:
    """Weights on the first feature of each head of valid lanes, 0 elsewhere: [chunks] at `level`. `factor`: of the products' sums.

    The scores carry (gain / length)^(1 / p), so that the sum of their powers is the mean already mapped towards [-1, 1].
    """
    backend = context.backend
    length = np.maximum(valid.sum((0, 1)), 1.0)
    if softmax.divisor is not None:
        gain = 1.0 / (softmax.divisor * (length if softmax.length_agnostic else np.ones_like(length)))
    else:
        low, high = approximation.interval
        gain = 2.0 / (high - low) / length
    root = gain ** (1.0 / softmax.power)
    level += _packed(valid)
    depth = softmax.depth
    x = _scores(context, products, factor * root * valid, softmax.shift * root * valid, head_dim)
    if softmax.divisor is not None:
        powers = power(context, _prepared(context, x, level + depth, depth), softmax.power)
        return _unpacked(context, _prepared(context, powers, level, level), valid, head_dim, level)
    powers = power(context, _prepared(context, x, context.top, depth), softmax.power)
    mean = reduce.sum_lanes(context, powers)
    if _packed(valid):
        mean = reduce.sum_features(context, mean, head_dim)
        mean = context.multiply_constant(context.ensure_level(mean, 1), ("head", head_dim), lambda: reduce.first_of(head_dim))
        mean = reduce.replicate_features(context, mean, head_dim)
    middle = (high + low) / (high - low)
    eps = 2.0 / (high - low) * softmax.eps / (np.ones_like(length) if softmax.length_agnostic else length)
    used = np.ones(head_dim) if _packed(valid) else reduce.first_of(head_dim)
    offset = (eps - middle)[None, :, None, None] * used[None, None, None, :]
    mean = backend.add_plain(mean, _encoded(context, np.broadcast_to(offset, (context.packing.tokens, *offset.shape[1:])), head_dim, mean.level, mean.scale))
    inverse = evaluate_reciprocal(context, mean, approximation, level + 1)
    powers = backend.match_level(context.ensure_level(powers, level + 1), level + 1)
    return _unpacked(context, context.product(powers, backend.match_level(inverse, level + 1)), valid, head_dim, level)


def _scores(context: OperationContext, products: Ciphertext, gains: np.ndarray, shifts: np.ndarray, head_dim: int) -> Ciphertext:
    """gain * (sum over each head) + shift, by lane, on the first feature of each head; unbatched, chunk j on feature j of its head."""
    backend = context.backend
    sums = reduce.sum_features(context, products, head_dim)
    first = reduce.first_of(head_dim)
    plain = _encoded(context, gains[..., None, None] * first, head_dim, sums.level, context.canonical_factor(sums.level, sums.scale))
    scores = backend.rescale(backend.multiply_plain(sums, plain))
    scores = backend.add_plain(scores, _encoded(context, shifts[..., None, None] * first, head_dim, scores.level, scores.scale))
    return backend.sum_rotated(scores, [-chunk for chunk in range(scores.count)])


def _unpacked(context: OperationContext, packed: Ciphertext, valid: np.ndarray, head_dim: int, level: int) -> Ciphertext:
    """[chunks] with each chunk's weights on the first feature of each head; one level, which `_packed` tells, for more than one chunk."""
    backend = context.backend
    if not _packed(valid):
        return backend.reshape(packed, (1,))
    masks = np.eye(head_dim)[: len(valid)]
    plain = context.constant(("chunks", len(valid), head_dim), packed.level, context.canonical_factor(packed.level, packed.scale), lambda: masks)
    apart = backend.rescale(backend.multiply_plain(backend.reshape(packed, (1,)), plain))
    return backend.stack([backend.take(backend.rotate(backend.take(apart, chunk), [chunk]), 0) for chunk in range(len(valid))])


def _packed(valid: np.ndarray) -> bool:
    return len(valid) > 1


def _weighted_sum(context: OperationContext, weights: Ciphertext, values: Ciphertext, head_dim: int) -> Ciphertext:
    """sum over chunks and lanes of (weight over its head) * value: [1], replicated, one level down."""
    backend = context.backend
    weights = reduce.replicate_features(context, backend.match_level(weights, values.level), head_dim)
    products = backend.sum(backend.multiply(weights, values))
    total = reduce.sum_lanes(context, backend.rescale(backend.relinearize(products)))
    return backend.reshape(total, (1,))


def _prepared(context: OperationContext, x: Ciphertext, wanted: int, least: int) -> Ciphertext:
    """`x` at `wanted` levels or, when the parameters have no more, below; refreshed when it has fewer than `least`, or fewer than
    `wanted` and one refresh is enough for all."""
    x = context.ensure_level(x, wanted if wanted <= context.top else least)
    return context.backend.match_level(x, min(x.level, wanted))


def _encoded(context: OperationContext, values: np.ndarray, head_dim: int, level: int, scale: float):
    """[*, T, B, 1, head_dim] of one head for all heads; of this step only, so it is not kept."""
    packing = context.packing
    repeated = np.broadcast_to(values, (*values.shape[:-2], packing.features // head_dim, head_dim))
    return context.backend.encode(repeated.reshape(*values.shape[:-4], packing.slots), level, scale)


def lane_mask(lanes: np.ndarray, packing: Packing) -> np.ndarray:
    """[*, T, B] of 0/1 over all features: [*, slots]."""
    return np.repeat(lanes[..., None], packing.features, axis=-1).reshape(*lanes.shape[:-2], packing.slots).astype(np.float64)


def at_level(operand: Operand, level: int) -> Ciphertext:
    """The one block of `operand` at `level`, unbatched; refreshed, or computed higher, where it has fewer levels."""
    if operand.level < level:
        operand.ensure(level)
    return operand.context.backend.take(operand.at(level), 0)


def placed(operand: Operand, lanes: np.ndarray, level: int) -> Ciphertext:
    """The one block of `operand` on `lanes` [T, B] and 0 elsewhere, at `level`, unbatched; where a rotary embedding waits, by its factors, otherwise
    one level."""
    context = operand.context
    if isinstance(operand, WaitingRotary) and operand.waiting:
        return at_level(WaitingRotary(operand.source, replace(operand.rotation, lanes=lanes)), level)
    backend, state = context.backend, at_level(operand, level + 1)
    plain = backend.encode(lane_mask(lanes, context.packing), state.level, context.canonical_factor(state.level, state.scale))
    return backend.rescale(backend.multiply_plain(state, plain))


def rotations(packing: Packing, heads: int, chunks: int = 1) -> set[int]:
    """Rotation steps of `encrypted` over up to `chunks` chunks."""
    widths = reduce.power_steps(1, packing.features // heads)
    steps = {*widths, *(-width for width in widths), *reduce.lane_steps(packing)}
    steps |= {sign * chunk for chunk in range(chunks) for sign in (1, -1)}
    return {step % packing.slots for step in steps} - {0}
