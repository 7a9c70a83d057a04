"""Chebyshev series on ciphertexts, Paterson-Stockmeyer style, of degree 2^d - 1 in exactly d levels.

Scales are exact: every sum is formed at one scale by integer factors of about 2^50, before rescaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_he.ckks.bootstrapping.cosine import divide_chebyshev
from hf_he.ckks.bootstrapping.plan import BootstrapPlan
from hf_he.ckks.evaluator import Evaluator
from hf_he.ckks.keys import SwitchingKeys

LINEAR_DEGREE = 3
"""Series up to this degree are plain sums of Chebyshev powers."""


@dataclass(frozen=True)
class Scaled:
    """Residues [B, C, limbs, N] at a depth of the modular reduction, holding slot values times `scale`."""

    values: np.ndarray
    depth: int
    scale: float


def power_depth(k: int) -> int:
    """Levels that T_k takes."""
    return max(0, (k - 1).bit_length())


class ChebyshevSeries:
    """sum_k c_k T_k(u) for u in [-1, 1]."""

    def __init__(self, evaluator: Evaluator, plan: BootstrapPlan, keys: SwitchingKeys) -> None:
        self._evaluator = evaluator
        self._plan = plan
        self._keys = keys
        self._powers: dict[int, Scaled] = {}
        self._base = 0

    def __call__(self, coefficients: np.ndarray, argument: Scaled, depth: int, scale: float) -> Scaled:
        """The series of degree below 2^(depth - argument.depth), at `depth` and `scale`."""
        self._powers = {1: argument}
        self._base = argument.depth
        return self._evaluate(np.asarray(coefficients, dtype=np.float64), depth, scale)

    # ---- levels and scales ----
    def drop(self, a: Scaled, depth: int) -> np.ndarray:
        """Residues of `a` on the limbs of a deeper level."""
        return a.values[..., : self._plan.levels[depth], :]

    def rescale(self, values: np.ndarray, depth: int) -> np.ndarray:
        """From depth - 1 to depth: one or two moduli."""
        while values.shape[-2] > self._plan.levels[depth]:
            values = self._evaluator.rescale(values)
        return values

    def _finish(self, values: np.ndarray, depth: int, scale: float) -> Scaled:
        """Relinearise and rescale a sum of products at depth - 1."""
        if values.shape[-3] == 3:
            values = self._evaluator.relinearize_rescale(values, self._keys)
        return Scaled(self.rescale(values, depth), depth, scale / self._plan.divisor(depth))

    def double_product(self, a: Scaled, b: Scaled, subtract: Scaled | None) -> Scaled:
        """2ab - subtract (None: 1), one level deeper than the deeper factor: ab at half the scale is 2ab."""
        evaluator = self._evaluator
        depth = max(a.depth, b.depth)
        product = evaluator.multiply(self.drop(a, depth), self.drop(b, depth))
        scale = a.scale * b.scale / 2
        if subtract is None:
            product = evaluator.add_integer(product, -round(scale))
        else:
            product = evaluator.add(product, evaluator.multiply_integer(self.drop(subtract, depth), round(scale / subtract.scale)), -1.0)
        return self._finish(product, depth + 1, scale)

    def power(self, k: int) -> Scaled:
        """T_k, kept."""
        if k not in self._powers:
            high, low = self.power(-(-k // 2)), self.power(k // 2)
            self._powers[k] = self.double_product(high, low, None if k % 2 == 0 else self.power(1))
        return self._powers[k]

    def _settled(self, a: Scaled, depth: int) -> Scaled:
        """`a` at `depth`; where the scales shrink on the way down, at the smaller scale, so that the other factor of a product keeps its precision."""
        wanted = self._plan.scale(depth)
        if a.depth == depth or a.scale < 16 * wanted:
            return Scaled(self.drop(a, depth), depth, a.scale)
        factor = round(wanted * self._plan.divisor(depth) / a.scale)
        values = self._evaluator.multiply_integer(self.drop(a, depth - 1), factor)
        return Scaled(self.rescale(values, depth), depth, a.scale * factor / self._plan.divisor(depth))

    # ---- the series ----
    def _evaluate(self, coefficients: np.ndarray, depth: int, scale: float) -> Scaled:
        wide = scale * self._plan.divisor(depth)
        return self._finish(self._accumulate(coefficients, depth - 1, wide), depth, wide)

    def _accumulate(self, coefficients: np.ndarray, depth: int, scale: float) -> np.ndarray:
        """The series at `depth` and a scale of two factors, not rescaled, possibly with three components."""
        degree = len(coefficients) - 1
        if degree <= LINEAR_DEGREE and self._base + power_depth(degree) <= depth:
            return self._linear(coefficients, depth, scale)
        m = 1 << (degree.bit_length() - 1)
        quotient, remainder = divide_chebyshev(coefficients, m)
        power = self._settled(self.power(m), depth)
        left = self._evaluate(quotient, depth, scale / power.scale)
        product = self._evaluator.multiply(left.values, power.values)
        return self._evaluator.add(product, self._accumulate(remainder, depth, scale))

    def _linear(self, coefficients: np.ndarray, depth: int, scale: float) -> np.ndarray:
        powers = [self.power(k) for k in range(1, len(coefficients))]
        integers = [round(c * (scale / p.scale)) for c, p in zip(coefficients[1:], powers, strict=True)]
        return self._evaluator.weighted_sum([self.drop(p, depth) for p in powers], integers, round(coefficients[0] * scale))
