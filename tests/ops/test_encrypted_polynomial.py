"""Chebyshev series on ciphertexts: numpy's values, the least depth, few products, exact scales."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev

from hf_he.approximation import fit_polynomial
from hf_he.ops import polynomial


def encrypt_inputs(lab, level=None):
    u = np.random.default_rng(0).uniform(-1, 1, (2, lab.packing.slots))
    return u, lab.backend.encrypt(u, lab.secret, level)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 21, 31, 32, 63, 127])
def test_every_degree_at_the_least_depth(lab, degree):
    coefficients = tuple(np.random.default_rng(degree).normal(size=degree + 1))
    u, ct = encrypt_inputs(lab)
    out = polynomial.evaluate(lab.backend, ct, coefficients)
    assert ct.level - out.level == int(np.ceil(np.log2(degree + 1))) == polynomial.depth(coefficients)
    assert out.scale == pytest.approx(lab.backend.parameters.scale_at(out.level), rel=1e-12)
    np.testing.assert_allclose(lab.backend.decrypt(out, lab.secret), chebyshev.chebval(u, coefficients), atol=1e-4)


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_tree_is_the_polynomial(coefficients):
    coefficients = polynomial._trimmed(tuple(coefficients))

    def value(node):
        if isinstance(node, polynomial.Leaf):
            return np.array(node.coefficients)
        power = np.zeros(node.n + 1)
        power[-1] = 1
        return chebyshev.chebadd(chebyshev.chebmul(value(node.quotient), power), value(node.remainder))

    found = value(polynomial.evaluation_tree(coefficients))
    np.testing.assert_allclose(np.pad(found, (0, 64 - len(found))), np.pad(coefficients, (0, 64 - len(coefficients))), atol=1e-9)


@pytest.mark.parametrize(("function", "interval", "degree", "products"), [("gelu", (-4, 4), 30, 9), ("tanh", (-3, 3), 15, 8), ("inverse_sqrt", (0.1, 3), 7, 5)])
def test_fitted_functions(lab, function, interval, degree, products):
    fitted = fit_polynomial(function, interval, degree)
    u, ct = encrypt_inputs(lab)
    lab.backend.log.reset()
    out = polynomial.evaluate(lab.backend, ct, fitted.coefficients)
    x = 0.5 * (interval[1] - interval[0]) * u + 0.5 * (interval[1] + interval[0])
    np.testing.assert_allclose(lab.backend.decrypt(out, lab.secret), fitted(x), atol=5e-8)
    assert lab.backend.log.operations()["multiply"] <= products * ct.count


def test_below_the_top_level(lab):
    coefficients = (0.5, 1.0, -0.25, 0.125, 0.5)
    u, ct = encrypt_inputs(lab, level=3)
    out = polynomial.evaluate(lab.backend, ct, coefficients)
    assert out.level == 0
    np.testing.assert_allclose(lab.backend.decrypt(out, lab.secret), chebyshev.chebval(u, coefficients), atol=5e-8)


def test_vanishing_coefficients_cost_nothing(lab):
    _, ct = encrypt_inputs(lab)
    lab.backend.log.reset()
    polynomial.evaluate(lab.backend, ct, (0.0,) * 8 + (1.0,))
    assert lab.backend.log.operations()["multiply"] == 3 * ct.count
