"""Fits against closed forms, alternation (the minimax criterion) and dense sampling that the fits never saw."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.approximation import (
    fit_inverse_square_root,
    fit_polynomial,
    fit_reciprocal,
    kernel_exponential,
)
from hf_he.chebyshev import evaluate_chebyshev, halve_series
from hf_he.errors import ApproximationError

TORCH = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "inverse_sqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
}

FITS = [
    ("gelu", (-8.0, 8.0), 31),
    ("gelu", (-9.5, 5.0), 15),
    ("relu", (-50.0, 50.0), 63),
    ("relu", (-3.0, 4.0), 9),
    ("silu", (-6.0, 6.0), 7),
    ("sigmoid", (-6.0, 6.0), 7),
    ("tanh", (-5.0, 5.0), 15),
    ("tanh", (-2.0, 6.0), 31),
    ("exp", (-13.0, 1.0), 15),
    ("inverse_sqrt", (0.05, 20.0), 15),
    ("inverse_sqrt", (0.0023, 47.5), 63),
    ("reciprocal", (0.04, 1.0), 15),
]


def error_at(polynomial, count):
    low, high = polynomial.interval
    x = torch.linspace(low, high, count, dtype=torch.float64)
    exact = TORCH[polynomial.function](x)
    error = polynomial(x) - exact
    return error / exact if polynomial.error_kind == "relative" else error


@pytest.mark.parametrize("function, interval, degree", FITS, ids=[f"{f}-{i[0]:g}..{i[1]:g}-{d}" for f, i, d in FITS])
class TestMinimaxFit:
    def test_certified_error_holds_and_is_tight(self, function, interval, degree):
        polynomial = fit_polynomial(function, interval, degree)
        seen = float(error_at(polynomial, 200_003).abs().max())
        assert seen <= polynomial.max_error <= 1.1 * seen + 2e-8

    def test_error_alternates_as_the_best_polynomial_must(self, function, interval, degree):
        polynomial = fit_polynomial(function, interval, degree)
        error = error_at(polynomial, 200_003)
        peaks = error[error.abs() > 0.98 * error.abs().max()]
        alternations = 1 + int((torch.diff(torch.sign(peaks)) != 0).sum())
        assert alternations >= polynomial.degree + 2

    def test_degree_and_depth(self, function, interval, degree):
        polynomial = fit_polynomial(function, interval, degree)
        assert polynomial.degree <= degree
        assert polynomial.depth == math.ceil(math.log2(polynomial.degree + 1))


def test_reciprocal_matches_its_closed_form():
    """The best p makes 1 - v p(v) a Chebyshev polynomial of degree d + 1, whose maximum is 1 / T_{d+1}((hi + lo) / (hi - lo))."""
    low, high, degree = 0.04, 1.0, 7
    best = 1 / np.polynomial.chebyshev.Chebyshev.basis(degree + 1)((high + low) / (high - low))
    assert fit_polynomial("reciprocal", (low, high), degree).max_error == pytest.approx(best, rel=1e-3)


def test_published_accuracies_are_reached():
    """Rho et al. (ICLR 2025) report 18.6 bits for tanh on [-16, 16] at degree 127 and about 21 for exp on [-13, 1] at degree 15."""
    assert -math.log2(fit_polynomial("tanh", (-16.0, 16.0), 127).max_error) > 18.5
    assert -math.log2(fit_polynomial("exp", (-13.0, 1.0), 15).max_error) > 21


@given(coefficients=st.lists(st.floats(-10, 10), min_size=1, max_size=40), t=st.floats(-1, 1))
def test_clenshaw_equals_numpy(coefficients, t):
    value = evaluate_chebyshev(tuple(coefficients), np.array([t]))[0]
    assert value == pytest.approx(np.polynomial.chebyshev.chebval(t, coefficients), abs=1e-10)


@given(half=st.lists(st.floats(-10, 10), min_size=3, max_size=20), low=st.floats(-10, 10), odd=st.booleans(), t=st.floats(-1, 1))
def test_series_with_a_parity_are_halved(half, low, odd, t):
    coefficients = np.zeros(2 * len(half))
    coefficients[1 if odd else 0 :: 2] = half
    coefficients[0 if odd else 1] = low
    halved = halve_series(tuple(coefficients))
    assert halved is not None and len(halved[0]) == len(half)
    value = evaluate_chebyshev(tuple(coefficients), np.array([t]))[0]
    assert value == pytest.approx(np.polynomial.chebyshev.chebval(t, coefficients), abs=1e-9)


def test_gelu_keeps_its_symmetry():
    polynomial = fit_polynomial("gelu", (-6.0, 6.0), 31)
    x = np.linspace(0, 6, 101)
    np.testing.assert_allclose(polynomial(x) - polynomial(-x), x, atol=1e-12)


@pytest.mark.parametrize("function, interval, degree", FITS[:6])
def test_derivative_coefficients(function, interval, degree):
    polynomial = fit_polynomial(function, interval, degree)
    x = torch.linspace(*interval, 101, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(polynomial(x).sum(), x)
    low, high = interval
    t = (x.detach() - (low + high) / 2) * 2 / (high - low)
    torch.testing.assert_close(evaluate_chebyshev(polynomial.derivative_coefficients, t), gradient)


def test_objects_are_deterministic_values():
    polynomial = fit_polynomial("gelu", (-8.0, 8.0), 31)
    fit_polynomial.cache_clear()
    assert fit_polynomial("gelu", (-8.0, 8.0), 31) == polynomial
    assert pickle.loads(pickle.dumps(polynomial)) == polynomial


@settings(max_examples=25, deadline=None)
@given(low=st.floats(1e-2, 1.0), ratio=st.floats(2.0, 300.0), steps=st.integers(0, 3), scale=st.floats(0, 1))
def test_newton_inverse_square_root_stays_within_its_bound(low, ratio, steps, scale):
    approximation = fit_inverse_square_root((low, low * ratio), 31, steps)
    value = low * ratio**scale
    assert abs(approximation(np.float64(value)) * math.sqrt(value) - 1) <= approximation.max_error + 1e-14
    assert approximation.depth == 5 + 2 * steps


def test_newton_squares_the_error():
    errors = [fit_inverse_square_root((0.05, 15.0), 31, steps).max_error for steps in range(3)]
    assert errors[1] == pytest.approx(1.5 * errors[0] ** 2, rel=0.05) and errors[2] == pytest.approx(1.5 * errors[1] ** 2, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(low=st.floats(1e-3, 1.0), ratio=st.floats(2.0, 1000.0), steps=st.integers(0, 4), scale=st.floats(0, 1))
def test_goldschmidt_reciprocal_stays_within_its_bound(low, ratio, steps, scale):
    approximation = fit_reciprocal((low, low * ratio), 15, steps)
    value = low * ratio**scale
    assert abs(approximation(np.float64(value)) * value - 1) <= approximation.max_error + 1e-13
    assert approximation.max_error == pytest.approx(approximation.guess.max_error ** (2**steps), abs=1e-13)


@pytest.mark.parametrize("squarings", [4, 7, 9, 14])
def test_kernel_exponential(squarings):
    approximation = kernel_exponential((-float(2**squarings), 0.0), squarings)
    x = torch.linspace(-float(2**squarings), 0, 300_001, dtype=torch.float64)
    seen = float((approximation(x) - x.exp()).abs().max())
    assert seen <= approximation.max_error <= 1.05 * seen
    assert -math.log2(approximation.max_error) == pytest.approx(squarings + 1.9, abs=0.15)
    assert approximation.depth == squarings
    squared = 1 + x / 2**squarings
    for _ in range(squarings):
        squared = squared * squared
    torch.testing.assert_close(approximation(x), squared, atol=1e-11, rtol=0)


@pytest.mark.parametrize("low", [-40.0, -50.0, -60.0])
def test_kernel_exponential_reaches_below_its_zero(low):
    """With 5 squarings the zero is at -32; down to almost -64 the power is small again."""
    approximation = kernel_exponential((low, 0.0), 5)
    x = torch.linspace(low, 0, 300_001, dtype=torch.float64)
    assert (approximation(x) - x.exp()).abs().max() <= approximation.max_error < 0.02


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fit_polynomial("softplus", (-1.0, 1.0), 7), "No function named 'softplus'"),
        (lambda: fit_polynomial("gelu", (1.0, 1.0), 7), "not an interval"),
        (lambda: fit_polynomial("gelu", (-1.0, math.inf), 7), "not an interval"),
        (lambda: fit_polynomial("inverse_sqrt", (0.0, 1.0), 7), "must be positive"),
        (lambda: fit_polynomial("gelu", (-1.0, 1.0), 0), "outside 1..255"),
        (lambda: fit_inverse_square_root((1e-6, 100.0), 3, 2), "Newton diverges"),
        (lambda: fit_inverse_square_root((0.1, 1.0), 3, -1), "must not be negative"),
        (lambda: fit_reciprocal((0.1, 1.0), 3, -1), "must not be negative"),
        (lambda: kernel_exponential((-1200.0, 0.0), 9), "at least 10 squarings"),
        (lambda: kernel_exponential((-1024.0, 0.0), 9), "at least 10 squarings"),
        (lambda: kernel_exponential((-6.0, 1.0), 9), r"lives in \[lo, 0\]"),
        (lambda: kernel_exponential((-6.0, 0.0), 0), "1..20"),
    ],
)
def test_errors_name_the_fix(call, message):
    with pytest.raises(ApproximationError, match=message):
        call()
