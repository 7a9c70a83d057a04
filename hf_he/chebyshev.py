"""Series in the Chebyshev basis: evaluation, minimax fits by Remez exchange, and certificates of their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from hf_he.functions import Function

Array = TypeVar("Array")

_CERTIFICATION_CELLS = 1 << 17
_REMEZ_TOLERANCE = 1e-3


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


def basis(spec: Function, low: float, high: float, degree: int) -> tuple[range, Callable[[np.ndarray], np.ndarray]]:
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


def remez(spec: Function, target: Callable[[np.ndarray], np.ndarray], low: float, high: float, indices: range) -> np.ndarray:
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


def certify(spec: Function, low: float, high: float, series: np.ndarray) -> float:
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
