"""Operands of encrypted operations: a batch of feature blocks with what is remembered about it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from hf_he.backends.base import Ciphertext
from hf_he.errors import UnsupportedEncryptedOperation
from hf_he.ops.context import OperationContext


class Operand:
    """A batch of feature blocks [blocks] holding `features` features; `pooled`: only the first token's lanes hold values, others zero."""

    def __init__(self, context: OperationContext, features: int, ciphertext: Ciphertext | None = None, pooled: bool = False) -> None:
        self.context = context
        self.features = features
        self.pooled = pooled
        self._ciphertext = ciphertext
        self._babies: dict[tuple[int, int], Ciphertext] = {}
        self.shared: dict[Hashable, Any] = {}

    @property
    def waiting(self) -> bool:
        """Whether the ciphertext is yet to be computed."""
        return self._ciphertext is None

    @property
    def ciphertext(self) -> Ciphertext:
        assert self._ciphertext is not None
        return self._ciphertext

    @property
    def level(self) -> int:
        """The level `ciphertext` has or would have."""
        return self.ciphertext.level

    def ensure(self, depth: int) -> Ciphertext:
        """The ciphertext, refreshed in place (for every later reader) when it has fewer than `depth` levels."""
        fresh = self.context.ensure_level(self.ciphertext, depth)
        if fresh is not self._ciphertext:
            self._ciphertext = fresh
            self._babies.clear()
            self.shared.clear()
        return fresh

    def prepare(self, depth: int) -> None:
        """See to it that `at_least(depth)` will have `depth` levels; what is waiting waits on, unless that takes a refresh of its result."""
        if self.level < depth:
            self.ensure(depth)

    def at(self, level: int) -> Ciphertext:
        """The ciphertext at `level` (at most its own) and its canonical scale."""
        return self.context.backend.match_level(self.at_least(level), level)

    def at_least(self, level: int) -> Ciphertext:
        """The canonical ciphertext at `level` or above; one that is yet to be computed is computed no higher."""
        return self.ciphertext

    def select(self, rows: np.ndarray) -> Operand:
        """The features `rows` in this order, which linear maps that are still waiting fold into their weights.

        Raises UnsupportedEncryptedOperation for anything that is already computed: moving features about would take a level and rotations.
        """
        raise UnsupportedEncryptedOperation(
            "features can only be reordered while the linear map that makes them is waiting: compute queries, keys and values with plain weights and their sums"
        )

    def babies(self, count: int, level: int) -> Ciphertext:
        """[count, blocks] rotations by 0 .. count - 1 at `level`, hoisted; kept for other linear maps of the same input."""
        backend = self.context.backend
        for (kept, at), rotated in self._babies.items():
            if kept == count and at >= level:
                return backend.drop_level(rotated, level)
        rotated = backend.rotate(backend.drop_level(self.ciphertext, level), range(count))
        self._babies[count, level] = rotated
        return rotated

    def forget_babies(self) -> None:
        """Free the kept rotations, hundreds of megabytes at N = 2^16; another linear map would compute them again."""
        self._babies.clear()


class Together(Operand):
    """One of several computed operands that are refreshed in one batch as soon as one of them must be: see `together`."""

    def __init__(self, operand: Operand, group: list[Operand]) -> None:
        super().__init__(operand.context, operand.features, operand.ciphertext, operand.pooled)
        self._group = group

    def ensure(self, depth: int) -> Ciphertext:
        if self.level < depth:
            fresh = self.context.ensure_levels([(member.ciphertext, depth) for member in self._group])
            for member, ct in zip(self._group, fresh, strict=True):
                member._ciphertext = ct
                member.forget_babies()
        return self.ciphertext


def together(operands: Sequence[Operand | None]) -> list[Operand | None]:
    """Computed operands, those that are not None refreshed together from now on."""
    group: list[Operand] = []
    members = [None if operand is None else Together(operand, group) for operand in operands]
    group.extend(member for member in members if member is not None)
    return members
