"""LayerNorm and RMSNorm: sums over the features by rotate-and-add, 1 / sqrt by polynomial and Newton steps on one statistic ciphertext.

RMSNorm (Zhang and Sennrich, 2019) is the same without the mean, one level less. The variance is masked, mapped to [-1, 1] by the same mask, and
copied over its lane before it is refreshed: the refreshed ciphertext is one, whatever the width. weight * (x - mean) is computed beside it, so
that the affine part adds no level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_he.approximation import InverseSquareRoot
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import polynomial, reduce
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.ops.placement import NormLevels

STATISTIC_DEPTH = 3
"""Levels from the input to the mapped variance: mean, square, variance."""

RMS_STATISTIC_DEPTH = STATISTIC_DEPTH - 1


def rms_reference(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, approximation: InverseSquareRoot) -> torch.Tensor:
    """[B, T, F] -> [B, T, F] with the polynomial inverse square root."""
    return weight * hidden_states * approximation(hidden_states.square().mean(-1, keepdim=True) + eps)


def reference(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, approximation: InverseSquareRoot) -> torch.Tensor:
    """[B, T, F] -> [B, T, F] with the polynomial inverse square root."""
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    return weight * centred * approximation(centred.square().mean(-1, keepdim=True) + eps) + bias


def inverse_root_depth(approximation: InverseSquareRoot) -> int:
    """Levels from the mapped variance to 1 / sqrt."""
    return polynomial.depth(approximation.guess.coefficients) + 2 * approximation.newton_steps


def inverse_root_level(top: int, approximation: InverseSquareRoot) -> int:
    """The level at which `inverse_root` leaves 1 / sqrt."""
    level = top - polynomial.depth(approximation.guess.coefficients)
    for _ in range(approximation.newton_steps):
        level = (level if level >= 3 else top) - 2
    return level if level >= 1 else top


@dataclass
class Statistics:
    """What the backward of a norm needs of its forward: x - mean [blocks], the variance mapped to [-1, 1] and 1 / sqrt, [1] each."""

    centred: Ciphertext
    mapped: Ciphertext
    inverse: Ciphertext
    factor: float = 1.0
    """What `centred` is multiplied by."""


class WaitingNorm(Operand):
    """LayerNorm, or RMSNorm without `centre`, of `source` at planned `levels`; without them it is computed when its consumer has said how many
    levels it needs: exactly those if the result can have them, otherwise none, since it will be refreshed."""

    def __init__(
        self,
        source: Operand,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        approximation: InverseSquareRoot,
        levels: NormLevels | None = None,
        centre: bool = True,
        keep: bool = False,
    ) -> None:
        super().__init__(source.context, source.features)
        self._levels = levels
        self._centre = centre
        if source.features % source.context.packing.features:
            raise ShapeError(
                f"a norm over {source.features} features needs a packing whose features per ciphertext divide them, this one has "
                f"{source.context.packing.features}"
            )
        self._source: Operand | None = source
        self._layer = (weight, bias, eps, approximation)
        self._keep = keep
        self._statistics: list[Statistics] = []

    def statistics(self) -> Statistics:
        """What was kept for the backward."""
        self.at_least(self.level)
        return self._statistics[0]

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    @property
    def level(self) -> int:
        if self._source is None:
            return super().ciphertext.level
        if self._levels is not None:
            return self._levels.output
        depth = statistic_depth(self._centre, sums_everywhere(self.context))
        available = self._source.level if self._source.level >= depth else self.context.top
        return min(inverse_root_level(self.context.top, self._layer[-1]) - 1, available - depth)

    def at_least(self, level: int) -> Ciphertext:
        if self._source is not None:
            levels = self._levels or NormLevels(0, min(level, self.level))
            if self.context.uniform:
                statistics = self._shared(levels)
            else:
                statistics = statistics_of(self.context, self._source, *self._layer[2:], levels, self._centre, high=self._keep)
            self._ciphertext = normalised(self.context, statistics, *self._layer[:2], levels.output)
            self._source = None
            if self._keep:
                self._statistics.append(statistics)
        return super().ciphertext

    def _shared(self, levels: NormLevels) -> Statistics:
        """Statistics as high as they can be, so that another norm of the same state, in a parallel residual, has them already."""
        key = (*self._layer[2:], self._centre)
        if key not in self._source.shared or self._source.shared[key].inverse.level <= levels.output:
            highest = NormLevels(levels.statistic, max(levels.output, self.level))
            self._source.shared[key] = statistics_of(self.context, self._source, *self._layer[2:], highest, self._centre, high=True)
        return self._source.shared[key]

    def ensure(self, depth: int) -> Ciphertext:
        self.at_least(depth if depth <= self.level else 0)
        return super().ensure(depth)


def encrypted(
    context: OperationContext,
    operand: Operand,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    approximation: InverseSquareRoot,
    levels: NormLevels,
    centre: bool = True,
) -> Ciphertext:
    """weight * (x - mean) / sqrt(variance + eps) + bias at levels.output (at most what WaitingNorm.level says without a plan).

    Without `centre` the mean counts as 0. The statistic is refreshed when levels.statistic is too low for 1 / sqrt, more than once when guess
    and Newton steps exceed the parameters' levels; 4 log2(c) rotations, half as many without `centre`.
    """
    statistics = statistics_of(context, operand, eps, approximation, levels, centre)
    return normalised(context, statistics, weight, bias, levels.output)


def statistics_of(
    context: OperationContext, operand: Operand, eps: float, approximation: InverseSquareRoot, levels: NormLevels, centre: bool, high: bool = False
) -> Statistics:
    """x - mean, and 1 / sqrt at levels.output + 1 or higher; `high`: x - mean as high as x allows, for the backward."""
    backend, c = context.backend, context.packing.features
    low, upper = approximation.interval
    gain, shift = 2.0 / (upper - low), (2.0 * eps - low - upper) / (upper - low)
    depth = statistic_depth(centre, sums_everywhere(context))
    level, first = levels.output, max(levels.output, levels.statistic) + depth
    if operand.level < first:
        operand.ensure(first)
    hidden = operand.at_least(operand.level if high else first)
    with backend.log.measure("norm"):
        if sums_everywhere(context):
            enough = hidden.level - depth >= inverse_root_depth(approximation) + level + 1
            at = hidden.level if enough else levels.statistic + depth
            centred, mapped, factor = _uniform_statistic(context, hidden, at, operand.features, gain, shift, centre)
            mapped = _ready(context, mapped, approximation, level + 1)
            return Statistics(centred, mapped, inverse_root(context, mapped, approximation, level + 1), factor)
        centred = _centred(context, hidden, hidden.level if high else first) if centre else hidden
        lowered = backend.drop_level(centred, levels.statistic + RMS_STATISTIC_DEPTH)
        squares = backend.rescale(backend.relinearize(sum_blocks(context, backend.multiply(lowered, lowered))))
        total = reduce.sum_features(context, squares, c)
        mapped = context.multiply_constant(total, ("variance", gain, operand.features), lambda: reduce.first_of(c, gain / operand.features))
        mapped = backend.add_scalar(reduce.replicate_features(context, mapped, c), shift)
        mapped = _ready(context, mapped, approximation, level + 1)
        return Statistics(centred, mapped, inverse_root(context, mapped, approximation, level + 1))


def normalised(context: OperationContext, statistics: Statistics, weight: torch.Tensor, bias: torch.Tensor | None, level: int) -> Ciphertext:
    """weight * (x - mean) / sqrt(variance + eps) + bias at `level`."""
    backend, c = context.backend, context.packing.features
    with backend.log.measure("norm"):
        inverse = backend.drop_level(statistics.inverse, level + 1)
        centred = backend.drop_level(statistics.centred, level + 2)
        target = context.canonical_factor(level + 1, inverse.scale)
        factor = target * backend.parameters.moduli[level + 2] / centred.scale
        tag, share = ("weight", statistics.factor), 1.0 / statistics.factor
        plain = context.encoded((weight,), tag, level + 2, factor, lambda: share * blocks(weight, c))
        weighted = backend.rescale(backend.multiply_plain(centred, plain))
        out = context.product(weighted, inverse)
        if bias is None:
            return out
        return backend.add_plain(out, context.encoded((bias,), "norm_bias", out.level, out.scale, lambda: blocks(bias, c)))


def sums_everywhere(context: OperationContext) -> bool:
    """Whether sums over the features are right in every slot, without masks: one feature per ciphertext, or a state that is the same in every lane."""
    return context.uniform or context.packing.features == 1


def statistic_depth(centre: bool, everywhere: bool = False) -> int:
    """Levels from the input to the mapped variance; `everywhere`: see `sums_everywhere`."""
    return STATISTIC_DEPTH if centre and not everywhere else RMS_STATISTIC_DEPTH


def _uniform_statistic(
    context: OperationContext, hidden: Ciphertext, level: int, features: int, gain: float, shift: float, centre: bool
) -> tuple[Ciphertext, Ciphertext, float]:
    """factor * (x - mean), the mapped variance of x at `level`, and the factor, where `sums_everywhere`.

    Without a level for the mean: features * x - sum is features * (x - mean), and features * sum x^2 - (sum x)^2 is features^2 * variance.
    """
    backend, c = context.backend, context.packing.features
    low = backend.drop_level(hidden, level)
    if not centre:
        squares = backend.rescale(backend.relinearize(sum_blocks(context, backend.multiply(low, low))))
        total = reduce.sum_features(context, squares, c)
        return hidden, _scaled(context, total, gain / features, shift), 1.0
    total = reduce.sum_features(context, sum_blocks(context, hidden), c)
    low_total = backend.drop_level(total, level)
    both = backend.stack([sum_blocks(context, backend.multiply(low, low)), backend.multiply(low_total, low_total)])
    both = backend.rescale(backend.relinearize(both))
    squares = reduce.sum_features(context, backend.take(both, 0), c)
    spread = backend.subtract(backend.multiply_scalar(squares, features, 1.0), backend.take(both, 1))
    centred = backend.subtract(backend.multiply_scalar(hidden, features, 1.0), total)
    return centred, _scaled(context, spread, gain / features**2, shift), float(features)


def _scaled(context: OperationContext, ct: Ciphertext, gain: float, shift: float) -> Ciphertext:
    backend = context.backend
    return backend.add_scalar(backend.rescale(backend.multiply_scalar(ct, gain, context.canonical_factor(ct.level, ct.scale))), shift)


def _centred(context: OperationContext, hidden: Ciphertext, level: int) -> Ciphertext:
    """x - mean, one below `level`."""
    backend, c = context.backend, context.packing.features
    total = reduce.sum_features(context, sum_blocks(context, backend.drop_level(hidden, level)), c)
    features = hidden.count * c
    mean = context.multiply_constant(total, ("mean", features), lambda: reduce.first_of(c, 1.0 / features))
    mean = reduce.replicate_features(context, mean, c)
    return backend.subtract(backend.match_level(hidden, mean.level), mean)


def _ready(context: OperationContext, mapped: Ciphertext, approximation: InverseSquareRoot, level: int) -> Ciphertext:
    """`mapped` with the levels that `inverse_root` at `level` begins with. A refresh is of `mapped` + 1, whose zero is the lower end of the interval: a
    bootstrap's error grows with the cube of what the slots have in common, and 1 / sqrt needs small variances most precisely."""
    wanted = inverse_root_depth(approximation) + level
    wanted = wanted if wanted <= context.top else polynomial.depth(approximation.guess.coefficients)
    if mapped.level >= wanted:
        return mapped
    return context.backend.add_scalar(context.ensure_level(context.backend.add_scalar(mapped, 1.0), wanted), -1.0)


def inverse_root(context: OperationContext, mapped: Ciphertext, approximation: InverseSquareRoot, level: int) -> Ciphertext:
    """1 / sqrt of the variance whose image in [-1, 1] is `mapped`; at `level` or higher."""
    backend = context.backend
    low, high = approximation.interval
    mapped = _ready(context, mapped, approximation, level)
    mapped = backend.drop_level(mapped, min(mapped.level, inverse_root_depth(approximation) + level))
    y = polynomial.evaluate(backend, mapped, approximation.guess.coefficients)
    if approximation.newton_steps:
        half = backend.rescale(backend.multiply_scalar(mapped, 0.25 * (high - low), context.canonical_factor(mapped.level, mapped.scale)))
        half = backend.add_scalar(half, 0.25 * (high + low))
    for _ in range(approximation.newton_steps):
        half = backend.match_level(half, y.level)
        if y.level < 3:
            both = context.ensure_level(backend.stack([y, half]), 3)
            y, half = backend.take(both, 0), backend.take(both, 1)
        y = _newton_step(context, y, half)
    return context.ensure_level(y, level)


def _newton_step(context: OperationContext, y: Ciphertext, half: Ciphertext) -> Ciphertext:
    """1.5 y - (half y) y^2 with `half` = variance / 2: two levels."""
    backend = context.backend
    products = context.product(backend.stack([half, y]), y)
    product = backend.multiply(backend.take(products, 0), backend.take(products, 1))
    linear = backend.multiply_scalar(backend.drop_level(y, product.level), 1.5, product.scale / y.scale)
    return backend.rescale(backend.relinearize(backend.subtract(linear, product)))


def sum_blocks(context: OperationContext, ct: Ciphertext) -> Ciphertext:
    """The sum of all feature blocks, [1]."""
    return ct if ct.count == 1 else context.backend.reshape(context.backend.sum(ct), (1,))


def blocks(vector: torch.Tensor, c: int) -> np.ndarray:
    """[blocks, c] values of a plaintext vector."""
    return vector.detach().to(torch.float64).cpu().numpy().reshape(-1, c)
