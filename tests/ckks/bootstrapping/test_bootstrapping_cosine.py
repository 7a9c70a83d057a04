"""The polynomial of the modular reduction, in floating point, and its division in the Chebyshev basis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import chebyshev

from hf_he.ckks.bootstrapping.cosine import HALF_WIDTH, SHIFT, certified_error, cosine_coefficients, divide_chebyshev, reduce_plain
from hf_he.ckks.bootstrapping.plan import OVERFLOW_BOUND, BootstrapPlan
from hf_he.ckks.parameters import parameter_set

DEGREE = BootstrapPlan(parameter_set("n16-bootstrap")).cosine_degree


def test_the_polynomial_is_the_sine_within_its_certificate():
    x = np.linspace(SHIFT - HALF_WIDTH, SHIFT + HALF_WIDTH, 200_001)
    error = np.abs(reduce_plain(x, DEGREE) - np.sin(2 * np.pi * x)).max()
    assert error <= certified_error(DEGREE) < 1e-10


def test_the_certificate_is_negligible_against_the_precision_of_bootstrapping():
    """In units of the message, and summed over the coefficients of a slot as random errors: far below 2^-16."""
    plan = BootstrapPlan(parameter_set("n16-bootstrap"))
    assert certified_error(DEGREE) * plan.ratio / (2 * np.pi) * np.sqrt(plan.parameters.slots) < 2.0**-19


def test_the_interval_covers_every_overflow():
    ends = np.array([-OVERFLOW_BOUND - 1 / 16, OVERFLOW_BOUND + 1 / 16])
    assert np.abs((ends - SHIFT) / HALF_WIDTH).max() <= 1


def test_a_smaller_degree_has_a_larger_certificate():
    assert certified_error(7) > 1e3 * certified_error(DEGREE)
    assert len(cosine_coefficients(DEGREE)) == DEGREE + 1


@given(st.integers(1, 4), st.data())
def test_division(log, data):
    m = 1 << log
    values = data.draw(st.lists(st.floats(-1, 1), min_size=m + 1, max_size=2 * m))
    coefficients = np.array(values)
    quotient, remainder = divide_chebyshev(coefficients, m)
    assert len(quotient) <= m and len(remainder) == m
    t = np.linspace(-1, 1, 101)
    divided = chebyshev.chebval(t, quotient) * chebyshev.chebval(t, [0] * m + [1]) + chebyshev.chebval(t, remainder)
    np.testing.assert_allclose(divided, chebyshev.chebval(t, coefficients), atol=1e-12)
