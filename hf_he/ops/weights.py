"""Linear layers with encrypted weights: low-rank adapters and narrow heads, forward and backward.

A trained matrix [out, in] is a batch of periodic ciphertexts, every lane of c features holding the same part of one of its vectors: its rows
when out < in, its columns otherwise. A row times a state, summed over the features of each lane, is one number per lane; a column times
one number per lane is a state. So all products are of two kinds, and each is the other's gradient:

    spread_i = sum_f x_f v_if  (WaitingRows)        y = sum_i spread_i v_i  (WaitingColumns)        dv_i = sum over lanes of spread_i y

with `spread` the numbers copied over their lanes. A rank r map of b blocks costs r b products and 2 r log2(c) rotations on the way in, r b
products on the way out, and 3 levels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from hf_he.backends.base import Ciphertext
from hf_he.ops import arithmetic, reduce
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.ops.selection import selected_rows
from hf_he.packing import Packing

ROWS_DEPTH = 2
"""Levels from a state to its numbers: product, mask."""

GRADIENT_LEVEL = 2
"""Where numbers and states meet for the gradient of a vector: one level is left after the product, for packing it densely."""


def orientation(shape: tuple[int, int]) -> Literal["rows", "columns"]:
    """Which vectors of a matrix [out, in] are encrypted: the fewer ones."""
    return "rows" if shape[0] < shape[1] else "columns"


def count(shape: tuple[int, int]) -> int:
    """How many rows or columns those are."""
    return min(shape)


def vectors(shape: tuple[int, int], packing: Packing) -> int:
    """Ciphertexts of a trained matrix [out, in]: row-major [rows or columns, blocks]."""
    return count(shape) * packing.blocks(max(shape))


def reference(values: np.ndarray, packing: Packing) -> np.ndarray:
    """A matrix [out, in] or vector [features] as [vectors, c] values of each lane, padding features zero."""
    rows = np.atleast_2d(values if values.ndim == 1 or orientation(values.shape) == "rows" else values.T)
    padded = np.zeros((len(rows), packing.blocks(rows.shape[1]) * packing.features))
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(-1, packing.features)


def _reach(operand: Operand, depth: int, least: int) -> int:
    """What is left of the levels of `operand` after `depth` of them, refreshed first if that is below `least`."""
    return (operand.level if operand.level >= least + depth else operand.context.top) - depth


class Spread:
    """The features of an operand, each copied over the whole lane: [features], computed once, when first read."""

    def __init__(self, operand: Operand) -> None:
        self.context = operand.context
        self.operand = operand
        self._kept: Ciphertext | None = None

    def _source(self) -> tuple[Operand, int]:
        """What it is computed from and how many levels that takes: rows give their numbers before they are packed."""
        if isinstance(self.operand, WaitingRows) and self.operand.waiting:
            return self.operand.source, ROWS_DEPTH
        return self.operand, 1

    def reach(self, least: int) -> int:
        """The level it has or would have, at least `least` (by a refresh of what it is computed from, if need be)."""
        return self._kept.level if self._kept is not None and self._kept.level >= least else _reach(*self._source(), least)

    def ensure(self, depth: int) -> None:
        """Refresh what it is computed from, or itself, so that `at(depth)` can be had: many copied numbers are copied again rather than refreshed."""
        source, spent = self._source()
        several = max(2, self.context.packing.blocks(source.features))
        if self._kept is not None and self._kept.level < depth <= self.context.top - spent and self._kept.count > several:
            self._kept = None
        if self._kept is not None:
            self._kept = self.context.ensure_level(self._kept, depth)
        elif depth + spent <= self.context.top:
            source.ensure(depth + spent)
        else:
            self._kept = self.context.ensure_level(self.at(0), depth)

    def at(self, level: int) -> Ciphertext:
        """Canonical at `level`; computed there if this is the first use, and kept."""
        self.ensure(level)
        if self._kept is None:
            rows = isinstance(self.operand, WaitingRows) and self.operand.waiting
            self._kept = self.operand.spread(level) if rows else self._spread(self.operand.at(level + 1))
        return self.context.backend.match_level(self._kept, level)

    def _spread(self, ct: Ciphertext) -> Ciphertext:
        context, features, c = self.context, self.operand.features, self.context.packing.features
        backend = context.backend
        with backend.log.measure("linear"):
            masks = np.eye(c)[:features]
            parts = []
            for block in range(ct.count):
                chosen = masks[: features - block * c]
                one = backend.reshape(backend.take(ct, block), (1,))
                parts.append(context.multiply_constant(one, ("features", len(chosen)), lambda chosen=chosen: chosen))
            return backend.stack([_copy(context, backend.take(part, i), i) for part in parts for i in range(part.count)])


def _steps(packing: Packing, feature: int) -> list[int]:
    """Rotations that, added one after another, sum a lane into its `feature` (any order); negated, they copy it over the lane."""
    return [-step if feature & step else step for step in reduce.power_steps(1, packing.features)]


def _copy(context: OperationContext, ct: Ciphertext, feature: int) -> Ciphertext:
    for step in _steps(context.packing, feature):
        ct = reduce.rotate_and_add(context, ct, -step)
    return ct


class WaitingRows(Operand):
    """The products of `source` with n row vectors, `spread` over their lanes or packed into features 0 .. n - 1 (`ciphertext`)."""

    def __init__(self, source: Operand, vectors: Operand, n: int) -> None:
        super().__init__(source.context, n, pooled=source.pooled)
        self.source = source
        self.vectors = vectors

    @property
    def level(self) -> int:
        return min(_reach(operand, ROWS_DEPTH, 0) for operand in (self.source, self.vectors)) if self.waiting else self._ciphertext.level

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    def ensure(self, depth: int) -> Ciphertext:
        if self.waiting and depth + ROWS_DEPTH <= self.context.top:
            return self.at_least(depth)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self.waiting:
            self._ciphertext = self._packed(level)
        return self._ciphertext

    def _sums(self, level: int) -> Ciphertext:
        """[n] products with the vectors, before the sums over features, at `level` + 1."""
        backend = self.context.backend
        self.source.ensure(level + ROWS_DEPTH)
        state = self.source.at(level + ROWS_DEPTH)
        grid = grid_at(self.vectors, self.features, level + ROWS_DEPTH)
        with backend.log.measure("linear"):
            products = [backend.sum(backend.multiply(backend.take(grid, i), state)) for i in range(self.features)]
            return backend.rescale(backend.relinearize(backend.stack(products)))

    def spread(self, level: int) -> Ciphertext:
        """[n] numbers copied over their lanes, at `level`; not kept. 2 log2(c) rotations of [n]."""
        context, c = self.context, self.context.packing.features
        sums = self._sums(level)
        with context.backend.log.measure("linear"):
            sums = context.multiply_constant(reduce.sum_features(context, sums, c), "first_feature", lambda: reduce.first_of(c))
            return reduce.replicate_features(context, sums, c)

    def _packed(self, level: int) -> Ciphertext:
        """[blocks] with number i in feature i: n log2(c) rotations."""
        context, n, packing = self.context, self.features, self.context.packing
        backend, c = context.backend, context.packing.features
        sums = self._sums(level)
        with backend.log.measure("linear"):
            blocks = []
            for first in range(0, n, c):
                width, parts = min(c, n - first), []
                for i in range(width):
                    part = backend.take(sums, first + i)
                    for step in _steps(packing, i):
                        part = reduce.rotate_and_add(context, part, step)
                    parts.append(part)
                scale = context.canonical_factor(sums.level, sums.scale)
                masks = context.constant(("places", width), sums.level, scale, lambda width=width: np.eye(c)[None, :width])
                blocks.append(backend.take(backend.multiply_plain_sum(masks, backend.stack(parts)), 0))
            return backend.rescale(backend.stack(blocks))


class WaitingColumns(Operand):
    """sum_i spread_i v_i over n column vectors, computed when first read, no higher than its consumer asks."""

    def __init__(self, spread: Spread, vectors: Operand, features: int) -> None:
        super().__init__(spread.context, features, pooled=spread.operand.pooled)
        self._spread = spread
        self._vectors = vectors

    @property
    def level(self) -> int:
        return self._spread.reach(1) - 1 if self.waiting else self._ciphertext.level

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    def select(self, rows: np.ndarray) -> Operand:
        if not self.waiting:
            return super().select(rows)
        return WaitingColumns(self._spread, selected_rows(self._vectors, self._spread.operand.features, rows), len(rows))

    def prepare(self, depth: int) -> None:
        """Refresh what the numbers are computed from, so that `at_least(depth)` has `depth` levels, where the parameters allow that."""
        if self.waiting and depth + 1 + ROWS_DEPTH <= self.context.top:
            self._spread.ensure(depth + 1)

    def ensure(self, depth: int) -> Ciphertext:
        self.prepare(depth)
        self.at_least(depth if depth <= self.level else self.level)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self.waiting:
            n, backend = self._spread.operand.features, self.context.backend
            numbers = self._spread.at(level + 1)
            grid = grid_at(self._vectors, n, level + 1)
            with backend.log.measure("linear"):
                products = backend.multiply(backend.reshape(numbers, (n, 1)), grid)
                self._ciphertext = backend.rescale(backend.relinearize(backend.sum(products)))
            del self._spread, self._vectors
        return self._ciphertext


class WaitingAdaptation(arithmetic.WaitingSum):
    """A map with plaintext weights and a low-rank one with encrypted weights of the same input: what they need is asked of that input."""

    def ensure(self, depth: int) -> Ciphertext:
        if self.waiting and depth > self.level:
            for summand in self._summands:
                if isinstance(summand, WaitingColumns):
                    summand.prepare(depth)
        self.at_least(depth)
        return super().ensure(depth)


class BiasSum(arithmetic.WaitingSum):
    """A state plus a periodic bias [blocks], on the first token alone if the state is pooled (one level of the bias)."""

    def __init__(self, state: Operand, bias: Operand) -> None:
        super().__init__(state, WaitingBias(bias) if state.pooled else bias)


class WaitingBias(Operand):
    """A periodic bias on first tokens."""

    def __init__(self, bias: Operand) -> None:
        super().__init__(bias.context, bias.features, pooled=True)
        self._bias = bias

    @property
    def level(self) -> int:
        return (self._bias.level or self.context.top) - 1

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    def at_least(self, level: int) -> Ciphertext:
        self._bias.ensure(level + 1)
        context = self.context
        with context.backend.log.measure("linear"):
            return context.multiply_constant(self._bias.at(level + 1), "first_token", lambda: context.packing.first_token)


def grid_at(vectors: Operand, n: int, level: int) -> Ciphertext:
    """[n, blocks] vectors at `level`, refreshed if they are too low."""
    vectors.ensure(level)
    ct = vectors.at(level)
    return vectors.context.backend.reshape(ct, (n, ct.count // n))


class WeightGradient(Operand):
    """Gradients [vectors] that wait for more of them (micro-batches) before they are relinearised, rescaled and summed over the lanes."""

    def __init__(self, context: OperationContext, features: int, products: Ciphertext) -> None:
        super().__init__(context, features)
        self._products = products

    @property
    def level(self) -> int:
        return self._products.level - self._unscaled if self.waiting else self._ciphertext.level

    @property
    def _unscaled(self) -> int:
        return 0 if self._products.components == 2 else 1

    @property
    def ciphertext(self) -> Ciphertext:
        if self.waiting:
            context = self.context
            with context.backend.log.measure("linear"):
                ct = self._reduced()
                for step in lane_steps(context.packing):
                    ct = reduce.rotate_and_add(context, ct, step)
                self._ciphertext = ct
        return self._ciphertext

    def _reduced(self) -> Ciphertext:
        backend = self.context.backend
        return backend.rescale(backend.relinearize(self._products)) if self._unscaled else self._products

    def plus(self, other: WeightGradient) -> WeightGradient:
        """The sum of two gradients of one weight."""
        backend = self.context.backend
        with backend.log.measure("linear"):
            if self.waiting and other.waiting and (self._products.level, self._products.components) == (other._products.level, other._products.components):
                return WeightGradient(self.context, self.features, backend.add(self._products, other._products))
            if self.waiting and other.waiting:
                a, b = self._reduced(), other._reduced()
                level = min(a.level, b.level)
                return WeightGradient(self.context, self.features, backend.add(backend.match_level(a, level), backend.match_level(b, level)))
        total = arithmetic.WaitingSum(self, other)
        return Operand(self.context, self.features, total.ciphertext)


def vector_gradient(spread: Spread, state: Operand, n: int, features: int, level: int = GRADIENT_LEVEL) -> WeightGradient:
    """Gradient of n vectors that turn numbers into `state` or a state into numbers: products of both at `level`, to be summed over all lanes."""
    context = state.context
    backend = context.backend
    state.ensure(level)
    numbers, values = spread.at(level), state.at(level)
    with backend.log.measure("linear"):
        products = backend.multiply(backend.reshape(numbers, (n, 1)), backend.reshape(values, (1, values.count)))
        return WeightGradient(context, features, backend.reshape(products, (n * values.count,)))


def bias_gradient(state: Operand) -> WeightGradient:
    """Gradient of a bias: the state's gradient, to be summed over all lanes."""
    state.prepare(1)
    return WeightGradient(state.context, state.features, state.at(1))


def lane_steps(packing: Packing) -> list[int]:
    """Rotations that, added one after another, sum over all lanes, of tokens and of sequences."""
    return reduce.power_steps(packing.features, packing.slots)


def rotations(packing: Packing) -> set[int]:
    """Rotation steps of products with encrypted weights, and of their gradients."""
    return reduce.rotations(packing) | set(lane_steps(packing))
