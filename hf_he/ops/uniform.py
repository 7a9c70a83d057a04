"""Linear maps of states that are the same in every lane of a ciphertext: one token of one sequence (`OperationContext.single_token`).

Rotations of such a state are cyclic within its c features, so a square map has c diagonals instead of 2 c - 1. Wide states, of P c features, are
split over the lanes instead of taking P ciphertexts: lane t holds block t mod L, L = min(P, lanes), in P / L ciphertexts. Widening a state or
narrowing it then costs what a square map does, narrowing log2(L) rotations more, and the activation between runs on P / L ciphertexts:

    widen    out[t, f] = sum_s  W[t c + f, (f + s) mod c] x[f + s]                                       x uniform
    narrow   out[f]    = sum over the lanes t of  sum_s  W[f, e] x[e],  e = (t c + f + s) mod L c       every (f, e) once, s = 0 .. c - 1

both by baby steps and giant steps over s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import reduce
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.packing import Packing

if TYPE_CHECKING:
    from hf_he.ops.linear import WaitingLinear

GIANT_COST = 1.7
"""Of a giant step, with its own decomposition, in hoisted baby steps."""


@dataclass(frozen=True)
class Spread:
    """How a state of `features` features lies in ciphertexts of `lanes` lanes of c."""

    features: int
    c: int
    lanes: int

    @cached_property
    def split(self) -> int:
        """Lanes that differ: a power of two, 1 for a uniform state."""
        blocks = -(-self.features // self.c)
        return min(1 << (blocks - 1).bit_length(), self.lanes)

    @property
    def ciphertexts(self) -> int:
        return -(-self.features // (self.split * self.c))

    @property
    def padded(self) -> int:
        return self.ciphertexts * self.split * self.c

    def place(self, values: np.ndarray) -> np.ndarray:
        """[features] -> [ciphertexts, split * c], zero-padded."""
        return np.pad(values, (0, self.padded - len(values))).reshape(self.ciphertexts, -1)

    @classmethod
    def of(cls, features: int, packing: Packing) -> Spread:
        return cls(features, packing.features, packing.slots // packing.features)


@dataclass(frozen=True)
class UniformPlan:
    """Steps of `count` maps between two spreads, computed together; one of the two is uniform."""

    source: Spread
    target: Spread
    count: int

    @cached_property
    def babies(self) -> int:
        c, outputs = self.source.c, self.count * self.target.ciphertexts
        candidates = [1 << e for e in range(c.bit_length())]
        return min(candidates, key=lambda b: ((b - 1) * self.source.ciphertexts + GIANT_COST * (c // b - 1) * outputs, b))

    @property
    def giants(self) -> list[int]:
        return list(range(0, self.source.c, self.babies))

    @property
    def lane_steps(self) -> list[int]:
        return [self.source.c * width for width in reduce.power_steps(1, self.source.split)]

    @property
    def rotations(self) -> set[int]:
        return {*range(self.babies), *self.giants, *self.lane_steps} - {0}

    def diagonals(self, weight: np.ndarray) -> np.ndarray:
        """[out, in] -> [giants, out ciphertexts, babies, in ciphertexts, period], pre-rotated by the giant steps."""
        source, target, c = self.source, self.target, self.source.c
        padded = np.zeros((target.padded, source.padded))
        padded[: weight.shape[0], : weight.shape[1]] = weight
        period = c * max(source.split, target.split)
        giant, out, baby, inner, slot = np.ix_(self.giants, range(target.ciphertexts), range(self.babies), range(source.ciphertexts), range(period))
        rows = out * target.split * c + (slot - giant) % (target.split * c)
        columns = inner * source.split * c + (slot + baby) % (source.split * c)
        return padded[rows, columns]


def encrypted(context: OperationContext, source: Operand, maps: Sequence[WaitingLinear], level: int, gain: float, shift: float) -> Ciphertext:
    """gain * (weight x + bias) + shift for each map of one `source`, stacked: [sum of their ciphertexts], canonical at `level`. One level.

    Raises ShapeError for maps of different widths, and for one from a wide state to a wide state.
    """
    backend, packing = context.backend, context.packing
    spread, target = Spread.of(source.features, packing), Spread.of(maps[0].features, packing)
    if any(Spread.of(m.features, packing).padded != target.padded for m in maps) or (target.split > 1 and spread.split > 1):
        raise ShapeError(f"maps from {source.features} to {[m.features for m in maps]} features have no form on uniform states: compute them one by one")
    plan = UniformPlan(spread, target, len(maps))
    babies = source.babies(plan.babies, level + 1)
    weights = tuple(m.weight for m in maps)

    def build() -> np.ndarray:
        stacked = gain * np.concatenate([plan.diagonals(_numpy(w)) for w in weights], axis=1)
        giants, outputs, count, inputs, period = stacked.shape
        return stacked.reshape(giants * outputs, count * inputs, period)

    plain = context.encoded(weights, ("uniform diagonals", plan, gain), level + 1, context.canonical_factor(level + 1, babies.scale), build)
    partial = backend.multiply_plain_sum(plain, backend.reshape(babies, (babies.count,)))
    partial = backend.reshape(partial, (len(plan.giants), len(maps) * target.ciphertexts))
    out = backend.rescale(backend.sum_rotated(partial, plan.giants))
    for step in plan.lane_steps:
        out = reduce.rotate_and_add(context, out, step)
    return _add_bias(context, out, maps, target, gain, shift)


def _add_bias(context: OperationContext, out: Ciphertext, maps: Sequence[WaitingLinear], target: Spread, gain: float, shift: float) -> Ciphertext:
    if not shift and all(m.bias is None for m in maps):
        return out

    def build() -> np.ndarray:
        rows = (np.full(m.features, shift) if m.bias is None else gain * _numpy(m.bias) + shift for m in maps)
        return np.concatenate([target.place(row) for row in rows])

    owners = tuple(m.bias for m in maps if m.bias is not None)
    tag = ("uniform bias", tuple(m.features for m in maps), tuple(m.bias is None for m in maps), gain, shift)
    return context.backend.add_plain(out, context.encoded(owners, tag, out.level, out.scale, build))


def unpack_uniform(slots: np.ndarray, packing: Packing, features: int) -> np.ndarray:
    """[ciphertexts, slots] of a decrypted state -> [features]."""
    spread = Spread.of(features, packing)
    return np.asarray(slots).reshape(-1, packing.slots)[:, : spread.split * spread.c].reshape(-1)[:features]


def rotations(packing: Packing, in_features: int, out_features: int, count: int = 1) -> set[int]:
    """Rotation steps of `encrypted`."""
    return UniformPlan(Spread.of(in_features, packing), Spread.of(out_features, packing), count).rotations


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).cpu().numpy()
