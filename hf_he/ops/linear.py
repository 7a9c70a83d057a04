"""Linear layers with plaintext weights: zero-padded diagonals, baby-step giant-step (Halevi and Shoup, CRYPTO 2014).

Feature o of the output is sum_s weight[o, o + s] x[o + s] over offsets s = -(c - 1) .. c - 1; rotating x by s brings x[o + s] to o, and
where o + s leaves the lane the diagonal is zero. With s = G + a, babies a = 0 .. b - 1 are rotated once for all output blocks, and
products are summed over babies and input blocks before one rotation per giant G. Diagonals have period c, so they are stored compactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import feature_major, uniform
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.packing import Packing

GIANT_COST = 1.7
"""Cost of a giant step (its own decomposition) in units of a hoisted baby step."""

KEY_TOLERANCE = 1.1
"""How much dearer a step count may be for the sake of fewer different rotation keys."""


@dataclass(frozen=True)
class BlockPlan:
    """Rotation steps of a map from `in_features` to outputs of `out_features` each (a tuple: maps of one input computed together)."""

    features: int
    in_features: int
    out_features: tuple[int, ...]

    @property
    def in_blocks(self) -> int:
        return -(-self.in_features // self.features)

    @property
    def out_blocks(self) -> int:
        return sum(-(-out // self.features) for out in self.out_features)

    def giants_for(self, babies: int) -> list[int]:
        """Giant steps with a diagonal that is not zero by shape alone."""
        c = self.features
        lowest, highest = -(min(max(self.out_features), c) - 1), min(self.in_features, c) - 1
        return [giant for giant in range(-c, c, babies) if giant + babies > lowest and giant <= highest]

    @cached_property
    def babies(self) -> int:
        """The cheapest count, or one within KEY_TOLERANCE of it nearer to sqrt(2 c), whose steps other maps need as well."""

        def cost(babies: int) -> float:
            return self.in_blocks * (babies - 1) + GIANT_COST * self.out_blocks * (len(self.giants_for(babies)) - 1)

        candidates = [1 << e for e in range(self.features.bit_length())]
        allowed = KEY_TOLERANCE * min(cost(babies) for babies in candidates)
        balanced = math.log2(2 * self.features) / 2
        return min((b for b in candidates if cost(b) <= allowed), key=lambda b: (abs(math.log2(b) - balanced), b))

    @property
    def giants(self) -> list[int]:
        return self.giants_for(self.babies)

    def rotations(self, slots: int) -> set[int]:
        return {step % slots for step in (*range(self.babies), *self.giants)} - {0}


class WaitingLinear(Operand):
    """weight [out, in] and bias [out] applied to `source`, computed when first read, or as its consumer asks.

    Waiting pays: an activation folds its interval into the weights before it (a level saved), attention computes q, k and v in one
    matrix product at the lowest level that works, and a residual sum runs a linear map no higher than its other operand.
    """

    def __init__(self, source: Operand, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(source.context, weight.shape[0], pooled=source.pooled)
        self.source = source
        self.weight = weight
        self.bias = bias

    @property
    def ciphertext(self) -> Ciphertext:
        if self._ciphertext is None:
            self.source.ensure(1)
            self._ciphertext = self.compute(self.source.level - 1)
        return self._ciphertext

    @property
    def level(self) -> int:
        if self._ciphertext is None:
            return self.source.level - 1 if self.source.level else self.context.top - 1
        return self._ciphertext.level

    def ensure(self, depth: int) -> Ciphertext:
        if self._ciphertext is None and depth > self.level and depth < self.context.top and self.source.features <= self.features:
            self.source.ensure(depth + 1)
        return super().ensure(depth)

    def prepare(self, depth: int) -> None:
        if self._ciphertext is None and self.level < depth < self.context.top and self.source.features <= self.features:
            self.source.prepare(depth + 1)
        else:
            super().prepare(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self._ciphertext is None and level <= self.level:
            self.source.ensure(level + 1)
            self._ciphertext = self.compute(level)
        return self.ciphertext

    def select(self, rows: np.ndarray) -> Operand:
        if self._ciphertext is not None:
            return super().select(rows)
        tag = ("rows", rows.tobytes())
        weight, bias = (None if t is None else self.context.derived(t, tag, lambda t: t.detach()[torch.from_numpy(rows)]) for t in (self.weight, self.bias))
        return WaitingLinear(self.source, weight, bias)

    def compute(self, level: int, gain: float = 1.0, shift: float = 0.0) -> Ciphertext:
        """gain * (weight x + bias) + shift at `level`, not kept; padding features and, when pooled, other tokens stay 0."""
        return encrypted(self.context, self.source, [self], level, gain, shift)


def diagonals(weight: np.ndarray, plan: BlockPlan) -> np.ndarray:
    """[out, in] -> [giants, out_blocks, babies, in_blocks, c], each diagonal pre-rotated by its giant step."""
    c, babies, giants = plan.features, plan.babies, plan.giants
    padded = np.zeros((-(-weight.shape[0] // c) * c, plan.in_blocks * c))
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(-1, c, plan.in_blocks, c)
    giant, baby, slot = np.ix_(giants, range(babies), range(c))
    out = (slot - giant) % c
    source = out + giant + baby
    inside = (source >= 0) & (source < c)
    values = blocks[:, out, :, np.where(inside, source, 0)] * inside[..., None, None]
    return np.ascontiguousarray(values.transpose(0, 3, 1, 4, 2))


def reference(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[*, in] -> [*, out]."""
    return F.linear(hidden_states, weight, bias)


def encrypted(context: OperationContext, source: Operand, maps: Sequence[WaitingLinear], level: int, gain: float = 1.0, shift: float = 0.0) -> Ciphertext:
    """gain * (weight x + bias) + shift for each map of one `source`, stacked: [sum of output blocks], canonical at `level`.

    One level: `source` must be at `level` + 1 or higher. (babies - 1) * in_blocks + (giants - 1) * out_blocks rotations; with one feature per
    ciphertext none, by `hf_he.ops.feature_major`.
    """
    backend = context.backend
    plan = BlockPlan(context.packing.features, source.features, tuple(m.features for m in maps))
    for m in maps:
        if m.weight.shape[1] != source.features:
            raise ShapeError(f"a weight of shape {tuple(m.weight.shape)} does not fit an encrypted tensor of {source.features} features")
    weights = tuple(m.weight for m in maps)
    with backend.log.measure("linear"):
        if context.uniform:
            return uniform.encrypted(context, source, maps, level, gain, shift)
        if plan.features == 1:
            stacked = gain * np.concatenate([_numpy(w) for w in weights])
            state = backend.drop_level(source.ciphertext, level + 1)
            out = context.sharded(plan.out_blocks, lambda rows: feature_major.encrypted(context, state, stacked, rows))
            return _add_bias(context, out, maps, gain, shift)
        babies = source.babies(plan.babies, level + 1)
        scale = context.canonical_factor(level + 1, babies.scale)

        inputs = backend.reshape(babies, (plan.babies * plan.in_blocks,))

        def blocks(own: range) -> Ciphertext:
            def build() -> np.ndarray:
                stacked = np.concatenate([diagonals(_numpy(w), plan) for w in weights], axis=1)[:, own.start : own.stop]
                giants, out_blocks, count, in_blocks, c = stacked.shape
                return gain * stacked.reshape(giants * out_blocks, count * in_blocks, c)

            plain = context.encoded(weights, ("diagonals", plan, gain, own), level + 1, scale, build)
            partial = backend.reshape(backend.multiply_plain_sum(plain, inputs), (len(plan.giants), len(own)))
            return backend.rescale(backend.sum_rotated(partial, plan.giants))

        out = context.sharded(plan.out_blocks, blocks)
        return _add_bias(context, out, maps, gain, shift)


def _add_bias(context: OperationContext, out: Ciphertext, maps: Sequence[WaitingLinear], gain: float, shift: float) -> Ciphertext:
    if not shift and all(m.bias is None for m in maps):
        return out
    packing, pooled = context.packing, maps[0].pooled
    c = packing.features

    def build() -> np.ndarray:
        rows = []
        for m in maps:
            row = np.zeros(packing.blocks(m.features) * c)
            row[: m.features] = shift if m.bias is None else gain * _numpy(m.bias) + shift
            rows.append(row.reshape(-1, c))
        values = np.concatenate(rows)
        return np.tile(values, packing.slots // c) * packing.first_token if pooled else values

    owners = tuple(m.bias for m in maps if m.bias is not None)
    tag = ("bias", tuple(m.features for m in maps), tuple(m.bias is None for m in maps), gain, shift, pooled)
    return context.backend.add_plain(out, context.encoded(owners, tag, out.level, out.scale, build))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).cpu().numpy()


def rotations(packing: Packing, in_features: int, *out_features: int) -> set[int]:
    """Rotation steps of the maps of one input that are computed together."""
    return BlockPlan(packing.features, in_features, out_features).rotations(packing.slots)
