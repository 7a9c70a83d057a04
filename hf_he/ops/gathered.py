"""Gradients of features that were selected: what cutting a fused projection, or repeating grouped keys and values, leaves to its backward.

The gradient of `x.select(rows)` is that of the selection put back where its features came from, repeated ones added up. Nothing is moved: the parts stay as
they are, side by side, and the map before the selection takes its columns in their order. Trained columns are selected as in the forward; only their
own gradients, a few periodic ciphertexts, are moved back (`hf_he.ops.selection.put_back`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops.arithmetic import WaitingSum
from hf_he.ops.context import OperationContext
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand
from hf_he.ops.rotary import Rotation, WaitingRotary
from hf_he.ops.selection import put_back, selected_rows
from hf_he.ops.weights import WeightGradient


class Joined(Operand):
    """States side by side, [blocks of all], each of whole blocks; what falls short of levels is refreshed part by part."""

    def __init__(self, parts: Sequence[Operand]) -> None:
        context = parts[0].context
        super().__init__(context, sum(part.features for part in parts))
        for part in parts:
            if part.features % context.packing.features:
                raise ShapeError(f"{part.features} features are no whole blocks of {context.packing.features}: attention needs whole blocks")
        self._parts = list(parts)

    @property
    def level(self) -> int:
        return min(part.level for part in self._parts) if self.waiting else self._ciphertext.level

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    def ensure(self, depth: int) -> Ciphertext:
        if self.waiting:
            for part in self._parts:
                if part.level < depth:
                    part.ensure(depth)
            self.at_least(depth)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self.waiting:
            level, backend = min(level, self.level), self.context.backend
            found = [part.at(level) for part in self._parts]
            blocks = [backend.take(ct, i) for ct in found for i in range(ct.count)]
            self._ciphertext = backend.stack(blocks)
        return self._ciphertext


class Gathered(Operand):
    """Gradient of a state of `features` features from those of its selections: part i is the gradient of `select(rows[i])`."""

    def __init__(self, parts: Sequence[Operand], rows: Sequence[np.ndarray], features: int) -> None:
        super().__init__(parts[0].context, features)
        self._parts, self._rows = list(parts), list(rows)
        self.joined = Joined(parts)

    @property
    def rows(self) -> np.ndarray:
        """Which feature each of `joined` belongs to."""
        return np.concatenate(self._rows)

    @property
    def level(self) -> int:
        return (self.joined.level or self.context.top) - 1 if self.waiting else self._ciphertext.level

    @property
    def ciphertext(self) -> Ciphertext:
        """In the order of the features: a linear map of 0 and 1, for consumers that do not take `joined`."""
        if self.waiting:
            matrix = torch.zeros(self.features, self.joined.features, dtype=torch.float64)
            matrix[torch.from_numpy(self.rows), torch.arange(self.joined.features)] = 1.0
            self._ciphertext = WaitingLinear(self.joined, matrix, None).ciphertext
        return self._ciphertext

    def plus(self, other: Gathered) -> Gathered:
        """The gradient of all selections of both."""
        return Gathered([*self._parts, *other._parts], [*self._rows, *other._rows], self.features)

    def rotated(self, rotation: Rotation) -> Gathered:
        """`rotation` of whole heads, which commutes with selecting them."""
        return Gathered([WaitingRotary(part, rotation) for part in self._parts], self._rows, self.features)

    def transposed(self, weight: torch.Tensor) -> WaitingLinear:
        """weight^T times this gradient, `weight` [features, in]."""
        rows = self.rows
        tag = ("transposed", rows.tobytes())
        return WaitingLinear(self.joined, self.context.derived(weight, tag, lambda w: w.detach().T[:, torch.from_numpy(rows)]), None)

    def columns(self, vectors: Operand, n: int) -> Operand:
        """n trained columns [n * blocks] in the order of `joined`: the selections of the forward."""
        context, backend = self.context, self.context.backend
        selected = [selected_rows(vectors, n, rows) for rows in self._rows]
        level = min(operand.level for operand in selected)
        parts = [backend.reshape(operand.at(level), (n, operand.ciphertext.count // n)) for operand in selected]
        blocks = [backend.take(backend.take(part, i), block) for i in range(n) for part in parts for block in range(part.batch_shape[1])]
        return Operand(context, self.joined.features, backend.stack(blocks))

    def moved_back(self, gradient: WeightGradient, n: int) -> Operand:
        """Gradients [n * blocks] of columns in the order of `joined`, as those of the columns themselves: one level, once, when they are read."""
        return PutBack(self.context, self.features, [(gradient, self.rows)], n)


class PutBack(WeightGradient):
    """Gradients of selected columns that wait for more of them; sums over the lanes, then every entry goes where it came from."""

    def __init__(self, context: OperationContext, features: int, parts: Sequence[tuple[WeightGradient, np.ndarray]], n: int) -> None:
        Operand.__init__(self, context, features)
        self._gradients: list[tuple[Operand, np.ndarray]] = list(parts)
        self._n = n

    @property
    def level(self) -> int:
        return min(gradient.level for gradient, _ in self._gradients) - 1 if self.waiting else self._ciphertext.level

    @property
    def ciphertext(self) -> Ciphertext:
        if self.waiting:
            backend, total = self.context.backend, None
            for gradient, rows in self._gradients:
                ct = put_back(self.context, gradient.ensure(1), self._n, rows, self.features)
                level = ct.level if total is None else min(ct.level, total.level)
                ct = backend.match_level(ct, level)
                total = ct if total is None else backend.add(backend.match_level(total, level), ct)
            self._ciphertext = total
        return self._ciphertext

    def plus(self, other: PutBack) -> PutBack:
        """The sum of both; gradients of the same selection add up before anything is moved."""
        merged = list(self._gradients)
        for gradient, rows in other._gradients:
            same = next((i for i, (_, known) in enumerate(merged) if np.array_equal(known, rows)), None)
            if same is None:
                merged.append((gradient, rows))
            else:
                merged[same] = (_sum(merged[same][0], gradient), rows)
        return PutBack(self.context, self.features, merged, self._n)


def _sum(a: Operand, b: Operand) -> Operand:
    return a.plus(b) if isinstance(a, WeightGradient) and isinstance(b, WeightGradient) else WaitingSum(a, b)
