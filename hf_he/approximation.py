"""Polynomials that stand in for the non-polynomial functions of a transformer.

Every fit is computed here (Remez exchange, Chebyshev interpolation below the precision Remez can reach) and is deterministic. Each
object knows the interval it was fitted on, its degree, its multiplicative depth in CKKS levels (for an input already mapped to
[-1, 1]) and a certified bound of its error: the maximum over a dense grid plus the most the error can grow between grid points.
All objects are callable on `torch.Tensor` and `numpy.ndarray` alike; outside the interval they extrapolate and promise nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.polynomial import chebyshev

from hf_he.errors import ApproximationError
from hf_he.functions import FUNCTIONS, Function

Array = TypeVar("Array")
Interval = tuple[float, float]

MAX_DEGREE = 255
_CERTIFICATION_CELLS = 1 << 17
_REMEZ_TOLERANCE = 1e-3


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
def halve_series(coefficients: tuple[float, ...]) -> tuple[tuple[float, ...], bool] | None:
    """Half as many coefficients for a series of one parity, up to its terms 0 and 1: (reduced, odd), or None.

    Even (GELU, ReLU, with a T_1 term): sum_j reduced[j] T_j(2 t^2 - 1) + c_1 t. Odd (tanh and the derivatives of the even ones, with
    a constant): t sum_j reduced[j] T_j(2 t^2 - 1) + c_0.
    """
    if len(coefficients) <= 4:
        return None
    if not any(coefficients[3::2]):
        return coefficients[::2], False
    if any(coefficients[2::2]):
        return None
    reduced, suffix = [], 0.0
    for c in coefficients[1::2][::-1]:
        suffix = c - suffix
        reduced.append(2.0 * suffix)
    reduced[-1] = suffix
    return tuple(reduced[::-1]), True


def evaluate_chebyshev(coefficients: tuple[float, ...], t: Array) -> Array:
    """sum_j coefficients[j] T_j(t) by Clenshaw, in half the steps when the series has a parity."""
    halved = halve_series(coefficients)
    if halved is None:
        return _clenshaw(coefficients, t)
    reduced, odd = halved
    inner = _clenshaw(reduced, 2.0 * t * t - 1.0)
    return inner * t + coefficients[0] if odd else inner + coefficients[1] * t


def _clenshaw(coefficients: tuple[float, ...], t: Array) -> Array:
    if len(coefficients) == 1:
        return t * 0.0 + coefficients[0]
    twice = t + t
    current, previous = twice * 0.0 + coefficients[-1], 0.0
    for c in coefficients[-2:0:-1]:
        current, previous = twice * current + (c - previous), current
    return t * current + (coefficients[0] - previous)


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
    indices, target = _basis(spec, low, high, degree)
    series = _remez(spec, target, low, high, indices)
    if low == -high and spec.parity == "even_plus_half_identity":
        series[1] += 0.5 * high
    if low == -high and spec.parity == "odd_plus_half":
        series[0] += 0.5
    coefficients = tuple(float(c) for c in series)
    return Polynomial(function, (low, high), coefficients, _certify(spec, low, high, series), "relative" if spec.root else "absolute")


def minimal_polynomial(function: str, interval: Interval, max_error: float, max_degree: int = 127) -> Polynomial:
    """The shallowest polynomial whose certified error is at most `max_error`: degrees 1, 3, 7, 15, ... (one more level each).

    Raises:
        ApproximationError: none up to `max_degree` is good enough; the message says what the largest one reaches.
    """
    best = None
    degree = 1
    while degree <= max_degree:
        best = fit_polynomial(function, interval, degree)
        if best.max_error <= max_error:
            return best
        degree = 2 * degree + 1
    reached = f"degree {best.degree} reaches {best.max_error:.3g}" if best else f"no degree up to {max_degree}"
    raise ApproximationError(
        f"{function} on [{interval[0]:g}, {interval[1]:g}]: error {max_error:g} asked, {reached}. "
        "Narrow the interval (train with the range penalty), allow a larger degree or a larger error."
    )


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


def _basis(spec: Function, low: float, high: float, degree: int) -> tuple[range, Callable[[np.ndarray], np.ndarray]]:
    """Chebyshev indices to fit and the target in t. On a symmetric interval the parity of the function halves the problem: the full
    basis would make the exchange degenerate, since best approximations of degree 2m and 2m + 1 coincide."""
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    if low == -high and spec.parity == "odd":
        return range(1, degree + 1, 2), lambda t: spec.value(half * t)
    if low == -high and spec.parity == "odd_plus_half":
        return range(1, degree + 1, 2), lambda t: spec.value(half * t) - 0.5
    if low == -high and spec.parity == "even_plus_half_identity":
        return range(0, degree + 1, 2), lambda t: spec.value(half * t) - 0.5 * half * t
    return range(degree + 1), lambda t: spec.value(middle + half * t)


def _remez(spec: Function, target: Callable[[np.ndarray], np.ndarray], low: float, high: float, indices: range) -> np.ndarray:
    """Remez exchange for the basis {T_j : j in indices}; returns a dense coefficient vector of length degree + 1."""
    size = len(indices)
    next_index = indices[-1] + indices.step
    last_angle = math.pi if indices.step == 1 else 0.5 * math.pi
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    theta = _grid(spec, low, high, last_angle, 64 * (next_index + 8))
    grid = np.cos(theta)
    weight = 1.0 / spec.value(middle + half * grid) if spec.root else np.ones_like(grid)
    values = target(grid)
    basis = np.cos(np.outer(theta, np.asarray(indices, dtype=np.float64)))
    reference = np.abs(theta[:, None] - np.arange(size + 1) * (math.pi / next_index)).argmin(0)
    signs = (-1.0) ** np.arange(size + 1)
    best, best_error = None, math.inf
    for _ in range(100):
        system = np.column_stack([basis[reference], signs / weight[reference]])
        solution = np.linalg.solve(system, values[reference])
        error = weight * (values - basis @ solution[:-1])
        peak = float(np.max(np.abs(error)))
        if peak < best_error:
            best, best_error = solution[:-1], peak
        floor = 1e-13 * float(np.max(np.abs(weight * values)))
        if peak <= max((1 + _REMEZ_TOLERANCE) * abs(solution[-1]), floor):
            break
        exchanged = _alternating_extrema(error, size + 1)
        if exchanged is None or np.array_equal(exchanged, reference):
            break
        reference = exchanged
    series = np.zeros(max(indices[-1], 1) + 1)
    series[list(indices)] = best
    return series


def _grid(spec: Function, low: float, high: float, last_angle: float, cells: int) -> np.ndarray:
    """Angles from 0 to `last_angle` that include the kinks of the function, where the error may peak."""
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    kinks = [math.acos((k - middle) / half) for k in spec.kinks if low < k < high]
    return np.union1d(np.linspace(0.0, last_angle, cells + 1), [k for k in kinks if k <= last_angle])


def _alternating_extrema(error: np.ndarray, count: int) -> np.ndarray | None:
    """Grid indices of `count` extrema of alternating sign, the largest ones; None when the error does not alternate that often."""
    boundaries = np.flatnonzero(np.diff(np.sign(error)) != 0) + 1
    extrema = [segment[np.argmax(np.abs(error[segment]))] for segment in np.split(np.arange(error.size), boundaries)]
    extrema = [i for i in extrema if error[i] != 0.0]
    while len(extrema) > count:
        if len(extrema) == count + 1:
            extrema.pop(0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1)
            continue
        sizes = np.abs(error[extrema])
        pairs = np.maximum(sizes[:-1], sizes[1:])
        smallest = int(np.argmin(pairs))
        del extrema[smallest : smallest + 2]
    return np.asarray(extrema) if len(extrema) == count else None


def _certify(spec: Function, low: float, high: float, series: np.ndarray) -> float:
    """An upper bound of the error on the whole interval, from a grid in theta (x = middle + half cos theta) of spacing h.

    Absolute: between the kinks of the function the error exceeds its grid values by at most h^2 / 8 max |error''|, where
    |p''| <= sum_j j^2 |c_j|. Relative, for v^(-1/r): (1 - error)^r = v p(v)^r is a polynomial of degree m in cos theta, and a
    trigonometric polynomial exceeds its grid values by at most 1 / cos(m h / 2) (Ehlich and Zeller, 1964).
    """
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    cell = math.pi / _CERTIFICATION_CELLS
    t = np.cos(_grid(spec, low, high, math.pi, _CERTIFICATION_CELLS))
    x = middle + half * t
    values = evaluate_chebyshev(tuple(series), t)
    if spec.root:
        if np.min(values) <= 0.0:
            return math.inf
        power = x * values**spec.root
        slack = 0.5 * float(np.ptp(power)) * (1.0 / math.cos(0.5 * cell * (spec.root * (series.size - 1) + 1)) - 1.0)
        lowest, highest = float(np.min(power)) - slack, float(np.max(power)) + slack
        return max(1.0 - max(lowest, 0.0) ** (1.0 / spec.root), highest ** (1.0 / spec.root) - 1.0) + 4e-15
    first, second = spec.derivative_bounds(low, high)
    curvature = half**2 * second + half * first + float(np.sum(np.arange(series.size) ** 2 * np.abs(series)))
    return float(np.max(np.abs(spec.value(x) - values))) + cell**2 / 8 * curvature + 1e-14 * float(np.sum(np.abs(series)))
