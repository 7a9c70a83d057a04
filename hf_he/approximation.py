"""Polynomials that stand in for the non-polynomial functions of a transformer.

Every fit is computed here (Remez exchange, Chebyshev interpolation below the precision Remez can reach) and is deterministic. Each
object knows the interval it was fitted on, its degree, its multiplicative depth in CKKS levels (for an input already mapped to
[-1, 1]) and a certified bound of its error: the maximum over a dense grid plus the most the error can grow between grid points.
All objects are callable on `torch.Tensor` and `numpy.ndarray` alike; outside the interval they extrapolate and promise nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.polynomial import chebyshev

from hf_he.chebyshev import basis, certify, evaluate_chebyshev, remez
from hf_he.errors import ApproximationError
from hf_he.functions import FUNCTIONS, Function

Array = TypeVar("Array")
Interval = tuple[float, float]

MAX_DEGREE = 255


@dataclass(frozen=True)
class Polynomial:
    """A polynomial in the Chebyshev basis of `interval`: sum_j coefficients[j] T_j(t), t = (2 x - lo - hi) / (hi - lo).

    `max_error` bounds |p - f| ("absolute") or |p - f| / |f| ("relative") on the whole interval.
    """

    function: str
    interval: Interval
    coefficients: tuple[float, ...]
    max_error: float
    error_kind: str

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    @property
    def depth(self) -> int:
        """Levels of a Paterson-Stockmeyer evaluation from an input in [-1, 1]."""
        return self.degree.bit_length()

    def __call__(self, x: Array) -> Array:
        low, high = self.interval
        return evaluate_chebyshev(self.coefficients, (x - 0.5 * (low + high)) * (2.0 / (high - low)))

    @property
    def derivative_coefficients(self) -> tuple[float, ...]:
        """Chebyshev coefficients of dp/dx on the same interval."""
        low, high = self.interval
        return tuple(float(c) for c in chebyshev.chebder(np.asarray(self.coefficients)) * (2.0 / (high - low)))


@dataclass(frozen=True)
class InverseSquareRoot:
    """1 / sqrt(v): a polynomial guess, then Newton steps y <- 1.5 y - (0.5 v y) y^2 of two levels each. `max_error` is relative."""

    guess: Polynomial
    newton_steps: int
    max_error: float

    @property
    def interval(self) -> Interval:
        return self.guess.interval

    @property
    def depth(self) -> int:
        return self.guess.depth + 2 * self.newton_steps

    def __call__(self, value: Array) -> Array:
        return self.refine(value, self.guess(value))

    def refine(self, value: Array, estimate: Array) -> Array:
        """The Newton steps alone, from `estimate` of 1 / sqrt(`value`)."""
        half = 0.5 * value
        for _ in range(self.newton_steps):
            estimate = 1.5 * estimate - (half * estimate) * (estimate * estimate)
        return estimate


@dataclass(frozen=True)
class Reciprocal:
    """1 / v by Goldschmidt: a polynomial guess y, r = 1 - v y, then `steps` times y <- y (1 + r), r <- r^2. `max_error` is relative.

    One level for v y and one for each step (y and r are updated side by side). Its derivative in torch is that of 1 / v, -y^2, as in the encrypted
    backward: that of the polynomials themselves ripples by many times its size where `max_error` is a few percent.
    """

    guess: Polynomial
    steps: int
    max_error: float

    @property
    def interval(self) -> Interval:
        return self.guess.interval

    @property
    def depth(self) -> int:
        return self.guess.depth + 1 + self.steps if self.steps else self.guess.depth

    def __call__(self, value: Array) -> Array:
        if not getattr(value, "requires_grad", False):
            return self.refine(value, self.guess(value))
        fixed = value.detach()
        inverse = self(fixed)
        return inverse - inverse * inverse * (value - fixed)

    def refine(self, value: Array, estimate: Array) -> Array:
        """The Goldschmidt steps alone, from `estimate` of 1 / `value`."""
        if self.steps:
            residual = 1.0 - value * estimate
            estimate = estimate + estimate * residual
            for _ in range(self.steps - 1):
                residual = residual * residual
                estimate = estimate + estimate * residual
        return estimate


@dataclass(frozen=True)
class KernelExponential:
    """exp(x) for x in [lo, 0] as (1 + x / 2^squarings)^(2^squarings), one level per squaring (Rho et al., ICLR 2025).

    The relative error grows with |x| but the absolute one does not: it peaks near x = -2 at about 2^(-squarings - 1.9).
    """

    squarings: int
    interval: Interval
    max_error: float

    @property
    def degree(self) -> int:
        return 1 << self.squarings

    @property
    def depth(self) -> int:
        return self.squarings

    def __call__(self, x: Array) -> Array:
        return (1.0 + x * (1.0 / self.degree)) ** self.degree


@lru_cache(maxsize=1024)
def fit_polynomial(function: str, interval: Interval, degree: int) -> Polynomial:
    """The minimax polynomial of `degree` for a named function (see `hf_he.functions.FUNCTIONS`) on `interval`.

    Minimises the relative error of `inverse_sqrt` and `reciprocal`, the absolute one of the others.

    Raises:
        ApproximationError: unknown function, an interval outside its domain, or a degree outside 1..255.
    """
    spec = _function(function)
    low, high = _checked_interval(function, interval, spec)
    if not 1 <= degree <= MAX_DEGREE:
        raise ApproximationError(f"{function}: degree {degree} is outside 1..{MAX_DEGREE}.")
    indices, target = basis(spec, low, high, degree)
    series = remez(spec, target, low, high, indices)
    if low == -high and spec.parity == "even_plus_half_identity":
        series[1] += 0.5 * high
    if low == -high and spec.parity == "odd_plus_half":
        series[0] += 0.5
    coefficients = tuple(float(c) for c in series)
    return Polynomial(function, (low, high), coefficients, certify(spec, low, high, series), "relative" if spec.root else "absolute")


@lru_cache(maxsize=1024)
def fit_inverse_square_root(interval: Interval, degree: int, newton_steps: int) -> InverseSquareRoot:
    """1 / sqrt on `interval` (0 < lo < hi): minimax guess in relative error, then Newton.

    A relative error e becomes -1.5 e^2 - 0.5 e^3 per step, so that the bound after the last step is certified too.

    Raises:
        ApproximationError: the guess is too rough for Newton to converge, or see `fit_polynomial`.
    """
    if newton_steps < 0:
        raise ApproximationError(f"inverse_sqrt: newton_steps must not be negative, got {newton_steps}.")
    guess = fit_polynomial("inverse_sqrt", interval, degree)
    error = guess.max_error
    if newton_steps and error >= 0.7:
        raise ApproximationError(
            f"inverse_sqrt on [{interval[0]:g}, {interval[1]:g}]: a guess of degree {degree} is off by {error:.2f} and Newton diverges. "
            "Raise the degree or narrow the interval (train with the range penalty)."
        )
    for _ in range(newton_steps):
        error = 1.5 * error**2 + 0.5 * error**3
    return InverseSquareRoot(guess, newton_steps, error + 4e-15)


@lru_cache(maxsize=1024)
def fit_reciprocal(interval: Interval, degree: int, steps: int) -> Reciprocal:
    """1 / v on `interval` (0 < lo < hi): minimax guess in relative error e, then Goldschmidt; the final error is e^(2^steps).

    Raises:
        ApproximationError: see `fit_polynomial`.
    """
    if steps < 0:
        raise ApproximationError(f"reciprocal: steps must not be negative, got {steps}.")
    guess = fit_polynomial("reciprocal", interval, degree)
    return Reciprocal(guess, steps, guess.max_error ** (1 << steps) + 4e-15)


@lru_cache(maxsize=1024)
def kernel_exponential(interval: Interval, squarings: int) -> KernelExponential:
    """(1 + x / 2^k)^(2^k) on [lo, 0] with its certified absolute error.

    The base lies in [-1, 1] down to lo = -2^(k+1), so that intervals up to almost that are served; near it the even power grows again.

    Raises:
        ApproximationError: the interval does not end at 0, or k squarings do not reach lo (an error above 0.1).
    """
    low, high = (float(v) for v in interval)
    if not (math.isfinite(low) and low < 0.0 and high == 0.0):
        raise ApproximationError(f"The kernel exponent lives in [lo, 0] with lo < 0, got [{low:g}, {high:g}].")
    if not 1 <= squarings <= 20:
        raise ApproximationError(f"squarings must be in 1..20, got {squarings}.")
    n = 1 << squarings
    # For -n <= x <= 0 both functions lie in [0, e^x]; further down (1 + x/n)^n is its own mirror image about -n. Both second derivatives
    # lie in [0, 1] for -2n <= x, and below -64 (or -n) the larger of the two bounds is all that is left.
    error = math.inf
    if low > -2 * n:
        x, step = np.linspace(max(low, -64.0), 0.0, 1 << 17, retstep=True)
        error = float(np.max(np.abs(np.exp(x) - (1.0 + x / n) ** n))) + step**2 / 8 + 1e-12
        error = max(error, math.exp(-64.0), math.exp(-(2 * n + low)) if low < -n else 0.0)
    if error > 0.1:
        raise ApproximationError(
            f"(1 + x / {n})^{n} does not reach down to {low:g}: use at least {max(math.ceil(math.log2(-low)) - 1, squarings + 1)} squarings."
        )
    return KernelExponential(squarings, (low, 0.0), error)


def power_polynomial(interval: Interval, power: int) -> Polynomial:
    """x^power on `interval`, exact (its error is 0): says where a power is safe to evaluate, as the fits do for other functions."""
    low, high = (float(v) for v in interval)
    series = np.polynomial.Polynomial.basis(power).convert(domain=[low, high], kind=np.polynomial.Chebyshev)
    return Polynomial("power", (low, high), tuple(float(c) for c in series.coef), 0.0, "absolute")


def _function(name: str) -> Function:
    if name not in FUNCTIONS:
        raise ApproximationError(f"No function named {name!r}; known: {', '.join(sorted(FUNCTIONS))}.")
    return FUNCTIONS[name]


def _checked_interval(name: str, interval: Interval, spec: Function) -> Interval:
    low, high = (float(v) for v in interval)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ApproximationError(f"{name}: [{low:g}, {high:g}] is not an interval.")
    if spec.root and low <= 0.0:
        raise ApproximationError(f"{name}: the interval [{low:g}, {high:g}] must be positive.")
    return low, high
