"""The series of the derivative of 1 / sqrt's polynomial against torch's autograd of that polynomial."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.approximation import fit_inverse_square_root
from hf_he.ops import norm, norm_gradient, polynomial
from hf_he.ops.norm_gradient import SLOPE_ERROR, slope


@given(st.floats(0.01, 2.0), st.floats(1.5, 60.0), st.sampled_from([(7, 0), (15, 0), (5, 1), (15, 1), (7, 2)]))
@settings(deadline=None, max_examples=15)
def test_slope_is_the_derivative_of_the_very_polynomial(low, ratio, form):
    approximation = fit_inverse_square_root((low, low * ratio), *form)
    v = torch.linspace(low, low * ratio, 501, dtype=torch.float64, requires_grad=True)
    approximation(v).sum().backward()
    t = (2.0 * v.detach() - low - low * ratio) / (low * ratio - low)
    found = torch.from_numpy(norm_gradient.chebyshev.chebval(t.numpy(), slope(approximation)))
    assert ((found - v.grad).abs() <= 2 * SLOPE_ERROR * v.grad.abs() + 1e-9 * v.grad.abs().max()).all()
    assert polynomial.depth(slope(approximation)) <= norm.inverse_root_depth(approximation) + 1


@pytest.mark.parametrize("centre", [True, False])
def test_layer_norm_and_rms_norm(lab, centre):
    approximation = fit_inverse_square_root((0.05, 6.0), 15, 1)
    weight, x, upstream = lab.random(16), lab.states(), lab.states()
    plain = x.clone().requires_grad_()
    if centre:
        norm.reference(plain, weight, lab.random(16), 1e-6, approximation).backward(upstream)
    else:
        norm.rms_reference(plain, weight, 1e-6, approximation).backward(upstream)
    forward = norm.WaitingNorm(lab.encrypt(x).operand, weight, None, 1e-6, approximation, centre=centre, keep=True)
    gradient = norm_gradient.WaitingNormGradient(lab.encrypt(upstream).operand, forward.statistics(), weight, approximation, centre)
    assert gradient.level == min(7 - norm_gradient.GRADIENT_DEPTH, forward.statistics().centred.level - norm_gradient.GRADIENT_DEPTH - 1)
    lab.check(gradient.ciphertext, plain.grad, tolerance=1e-6 * float(plain.grad.abs().max()))
