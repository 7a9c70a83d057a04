"""Backward of LayerNorm and RMSNorm: the derivative of the very polynomial that the forward evaluates (hf_he.ops.norm).

With z = x - mean, v = mean(z^2) + eps, f the polynomial of 1 / sqrt with its Newton steps, and h = weight * gradient:

    dx = f(v) (h - mean(h)) + (2 / n) f'(v) sum(h z) z

(RMSNorm: z = x and no mean of h.) f' is one polynomial in v, evaluated on the statistic that the forward kept: a Chebyshev series no longer
than 1e-5 of relative accuracy asks for. Both sums are taken in one batch, and f'(v) z is multiplied beside them, so that the gradient itself
loses 3 levels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import chebyshev

from hf_he.approximation import InverseSquareRoot
from hf_he.backends.base import Ciphertext
from hf_he.chebyshev import evaluate_chebyshev
from hf_he.ops import polynomial, reduce
from hf_he.ops.norm import Statistics, blocks, sum_blocks
from hf_he.ops.operand import Operand

GRADIENT_DEPTH = 3
"""Levels of the gradient: product with weight * z, mask of the sums, product with f'(v) z."""

SLOPE_ERROR = 1e-5
"""Relative error of the series of f' on the fitted interval."""


@lru_cache(maxsize=256)
def slope(approximation: InverseSquareRoot) -> tuple[float, ...]:
    """Chebyshev coefficients of f' on the fitted interval of v, Newton steps included: the least depth within SLOPE_ERROR, or all of them."""
    low, high = approximation.interval
    degree = approximation.guess.degree
    for _ in range(approximation.newton_steps):
        degree = 3 * degree + 1

    def derivative(t: np.ndarray) -> np.ndarray:
        v = 0.5 * (high - low) * t + 0.5 * (high + low)
        y, dy = approximation.guess(v), evaluate_chebyshev(approximation.guess.derivative_coefficients, t)
        for _ in range(approximation.newton_steps):
            y, dy = 1.5 * y - 0.5 * v * y**3, 1.5 * dy - 0.5 * y**3 - 1.5 * v * y**2 * dy
        return dy

    grid = np.cos(np.linspace(0.0, np.pi, 4001))
    wanted = derivative(grid)
    depth = 1
    while (1 << depth) < degree:
        series = chebyshev.chebinterpolate(derivative, (1 << depth) - 1)
        if np.all(np.abs(chebyshev.chebval(grid, series) - wanted) <= SLOPE_ERROR * np.abs(wanted)):
            return tuple(float(c) for c in series)
        depth += 1
    return tuple(float(c) for c in chebyshev.chebinterpolate(derivative, max(degree - 1, 0)))


class WaitingNormGradient(Operand):
    """Gradient of a norm's input, computed when its consumer has said how many levels it needs: exactly those if the result can have them,
    otherwise none, since it will be refreshed."""

    def __init__(self, gradient: Operand, statistics: Statistics, weight: torch.Tensor, approximation: InverseSquareRoot, centre: bool = True) -> None:
        super().__init__(gradient.context, gradient.features)
        self._pending: tuple[Operand, Statistics] | None = (gradient, statistics)
        self._layer = (weight, approximation, centre)

    @property
    def level(self) -> int:
        if self._pending is None:
            return super().ciphertext.level
        gradient, statistics = self._pending
        top = self.context.top

        def left(level: int, depth: int) -> int:
            return (level if level >= depth else top) - depth

        return min(left(gradient.level, GRADIENT_DEPTH), left(statistics.centred.level, GRADIENT_DEPTH + 1))

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level)

    def ensure(self, depth: int) -> Ciphertext:
        self.at_least(depth if depth <= self.level else 0)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self._pending is not None:
            self._ciphertext = self._computed(min(level, self.level), *self._pending)
            self._pending = None
        return super().ciphertext

    def _computed(self, level: int, gradient: Operand, statistics: Statistics) -> Ciphertext:
        """At `level`; what falls short of it, the gradient, x - mean, 1 / sqrt and the variance (above its interval's lower end), is refreshed in one batch."""
        context, (weight, approximation, centre) = self.context, self._layer
        backend, c = context.backend, context.packing.features
        coefficients = slope(approximation)
        depth = polynomial.depth(coefficients)
        for_slope = level + 2 + depth if level + 2 + depth <= context.top else depth
        given = gradient.at_least(level + GRADIENT_DEPTH)
        given, centred, inverse, mapped = context.ensure_levels(
            [
                (given, level + GRADIENT_DEPTH),
                (statistics.centred, level + GRADIENT_DEPTH + 1),
                (statistics.inverse, level + 1),
                (backend.add_scalar(statistics.mapped, 1.0), for_slope),
            ]
        )
        mapped = backend.add_scalar(mapped, -1.0)
        with backend.log.measure("norm"):
            mapped = backend.drop_level(mapped, min(mapped.level, level + 2 + depth))
            slopes = backend.match_level(context.ensure_level(polynomial.evaluate(backend, mapped, coefficients), level + 2), level + 2)
            direction = context.product(slopes, backend.match_level(centred, level + 2))
            given = backend.match_level(given, level + GRADIENT_DEPTH)
            weighted = self._weighted(backend.match_level(centred, level + GRADIENT_DEPTH + 1), weight)
            products = backend.rescale(backend.relinearize(sum_blocks(context, backend.multiply(given, weighted))))
            scaled = self._weighted(given, weight)
            sums = backend.stack([products, sum_blocks(context, scaled)]) if centre else backend.stack([products])
            factors = np.array([2.0 / statistics.factor**2, 1.0])[: sums.batch_shape[0]] / self.features
            tag = ("norm gradient", len(factors), self.features, statistics.factor)
            sums = context.multiply_constant(reduce.sum_features(context, sums, c), tag, lambda: factors[:, None, None] * reduce.first_of(c))
            sums = reduce.replicate_features(context, sums, c)
            scaled = backend.match_level(scaled, level + 1)
            if centre:
                scaled = backend.subtract(scaled, backend.take(sums, 1))
            total = backend.add(backend.multiply(scaled, backend.match_level(inverse, level + 1)), backend.multiply(backend.take(sums, 0), direction))
            return backend.rescale(backend.relinearize(total))

    def _weighted(self, ct: Ciphertext, weight: torch.Tensor) -> Ciphertext:
        context = self.context
        factor = context.canonical_factor(ct.level, ct.scale)
        plain = context.encoded((weight,), "weight", ct.level, factor, lambda: blocks(weight, context.packing.features))
        return context.backend.rescale(context.backend.multiply_plain(ct, plain))
