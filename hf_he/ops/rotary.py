"""Rotary position embedding (Su et al., 2021) of ciphertexts: cos x + sin rotate_half(x), features from rotary_dim on left alone.

rotate_half is two rotations by rotary_dim / 2 features whose plaintext factors -sin and sin vanish where a rotation leaves its half, so that one
level, two hoisted rotations and no extra weight do it: folding rotate_half into the weights instead would cost a second projection of
queries and of keys, and could not be done for a projection with encrypted low-rank weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.packing import Packing


@dataclass(frozen=True, eq=False)
class Rotation:
    """`cos` and `sin` [B or 1, T, rotary_dim] of the positions, for heads of `head_dim` features; rotary_dim is even."""

    cos: np.ndarray = field(repr=False)
    sin: np.ndarray = field(repr=False)
    head_dim: int
    lanes: np.ndarray | None = field(default=None, repr=False)
    """[T, B] of 0/1: where the result is wanted; 0 elsewhere. None: everywhere."""

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> Rotation:
        return cls(*(table.detach().to(torch.float64).cpu().numpy() for table in (cos, sin)), head_dim)

    @property
    def half(self) -> int:
        return self.cos.shape[-1] // 2

    @property
    def steps(self) -> list[int]:
        """Rotations of the three summands: x, x from the second half to the first, and back."""
        return [0, self.half, -self.half]

    @property
    def transposed(self) -> Rotation:
        """The transposed map, for gradients: the halves of sin change places and sign."""
        return replace(self, sin=-np.roll(self.sin, self.half, axis=-1))

    @cached_property
    def tag(self) -> tuple[str, int, str]:
        return "rotary", self.head_dim, hashlib.sha256(self.cos.tobytes() + self.sin.tobytes()).hexdigest()

    def factors(self, packing: Packing) -> np.ndarray:
        """[3, slots]: cos, -sin in first halves, sin in second halves; of one position, [3, head_dim], their period."""
        half, width = self.half, 2 * self.half
        heads = packing.features // self.head_dim
        lanes = (packing.sequences, packing.tokens)
        factors = np.zeros((3, *lanes, self.head_dim))
        factors[0] = 1.0
        factors[0, ..., :width] = self.cos
        factors[1, ..., :half] = -self.sin[..., :half]
        factors[2, ..., half:width] = self.sin[..., half:]
        if self.cos.shape[:2] == (1, 1) and self.lanes is None:
            return factors[:, 0, 0]
        factors = np.moveaxis(factors, 1, 2)[..., None, :]
        if self.lanes is not None:
            factors = factors * self.lanes[..., None, None]
        return np.broadcast_to(factors, (3, packing.tokens, packing.sequences, heads, self.head_dim)).reshape(3, packing.slots)


class WaitingRotary(Operand):
    """`source`, all heads of it, with `rotation` applied: one level below it, computed when first read, no higher than its consumer asks."""

    def __init__(self, source: Operand, rotation: Rotation) -> None:
        super().__init__(source.context, source.features)
        packing = source.context.packing
        if rotation.cos.shape[0] not in (1, packing.sequences) or rotation.cos.shape[1] != source.context.tokens:
            raise ShapeError(
                f"rotary positions of {rotation.cos.shape[0]} x {rotation.cos.shape[1]} tokens do not fit a packing of "
                f"{packing.sequences} sequences of {source.context.tokens}: pass position_ids [1, {source.context.tokens}] or one row per sequence"
            )
        self.source = source
        self.rotation = rotation

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    @property
    def level(self) -> int:
        if self._ciphertext is None:
            return (self.source.level or self.context.top) - 1
        return self._ciphertext.level

    def ensure(self, depth: int) -> Ciphertext:
        if self._ciphertext is None and depth < self.context.top:
            self.source.ensure(depth + 1)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self._ciphertext is None:
            level = min(level, self.level)
            if self.source.level <= level:
                self.source.ensure(level + 1)
            self._ciphertext = encrypted(self.context, self.source.at(level + 1), self.rotation)
        return self._ciphertext

    def select(self, rows: np.ndarray) -> Operand:
        heads = rows.reshape(-1, self.rotation.head_dim)
        if (heads != heads[:, :1] + np.arange(self.rotation.head_dim)).any() or (heads[:, 0] % self.rotation.head_dim).any():
            raise ShapeError("only whole heads can be selected after a rotary embedding")
        return WaitingRotary(self.source.select(rows), self.rotation)


def encrypted(context: OperationContext, states: Ciphertext, rotation: Rotation) -> Ciphertext:
    """[*batch] canonical -> [*batch] one level below, canonical. Two rotations, hoisted. The factors of a single token are of that token only, and not kept."""
    backend = context.backend
    with backend.log.measure("attention"):
        rotated = backend.rotate(states, rotation.steps)
        scale = context.canonical_factor(states.level, states.scale)
        if context.replicated or rotation.lanes is not None:
            factors = backend.encode(rotation.factors(context.packing)[None], states.level, scale)
        else:
            factors = context.constant(rotation.tag, states.level, scale, lambda: rotation.factors(context.packing)[None])
        return backend.rescale(backend.take(backend.multiply_plain_sum(factors, rotated), 0))


def rotations(packing: Packing, rotary_dim: int) -> set[int]:
    """Rotation steps of `encrypted`."""
    return {rotary_dim // 2, packing.slots - rotary_dim // 2} if rotary_dim else set()
