"""Optimisers on dense ciphertexts against their twins, and the twins against torch.optim."""

import numpy as np
import pytest
import torch

from hf_he.errors import ParameterError, RangeError
from hf_he.finetuning.optimizer import SGD, AdamWHE, calibrate_divisor, fitting
from hf_he.finetuning.schedule import learning_rate

STEPS = 6


def problem(slots, seed=0, size=0.02):
    """Weights [2, slots] and a gradient per step; a third of the entries get no gradient, as padding features do."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(2, slots)) * 0.1
    gradients = rng.normal(size=(STEPS, 2, slots)) * size
    gradients[:, :, : slots // 3] = 0.0
    return weights, np.clip(gradients, -3 * size, 3 * size)


def run_reference(optimizer, weights, gradients, lr=4e-3):
    state = {}
    for step, gradient in enumerate(gradients, start=1):
        weights, state = optimizer.reference(weights, optimizer.gradient_gain * gradient, state, learning_rate("cosine", lr, step, STEPS), step)
    return weights, state


def run_encrypted(lab, optimizer, weights, gradients, lr=4e-3):
    """Gradients arrive at level 0, as packing leaves them."""
    dense = lab.backend.encrypt(weights, lab.secret)
    state = {}
    for step, gradient in enumerate(gradients, start=1):
        gradient = lab.backend.encrypt(optimizer.gradient_gain * gradient, lab.secret, 0)
        dense, state = optimizer.step(lab.session, dense, gradient, state, learning_rate("cosine", lr, step, STEPS), step)
        assert abs(dense.scale / lab.backend.parameters.scale_at(dense.level) - 1) < 1e-9
    return lab.backend.decrypt(dense, lab.secret), {name: lab.backend.decrypt(ct, lab.secret) for name, ct in state.items()}


def exact_adamw(optimizer, weights, gradients, lr=4e-3):
    """torch.optim.AdamW's formula with eps inside the root, no polynomial."""
    theta, m, v = torch.from_numpy(weights.copy()), 0.0, 0.0
    for step, gradient in enumerate(map(torch.from_numpy, gradients), start=1):
        rate = learning_rate("cosine", lr, step, STEPS)
        m = optimizer.beta1 * m + (1 - optimizer.beta1) * gradient
        v = optimizer.beta2 * v + (1 - optimizer.beta2) * gradient.square()
        m_hat, v_hat = m / (1 - optimizer.beta1**step), v / (1 - optimizer.beta2**step)
        theta = theta * (1 - rate * optimizer.weight_decay) - rate * m_hat / (v_hat + optimizer.eps).sqrt()
    return theta.numpy()


ADAMW = [
    pytest.param({"degree": 15}, id="degree-15"),
    pytest.param({"degree": 31, "weight_decay": 0.1}, id="degree-31-decay"),
    pytest.param({"degree": 7, "newton_steps": 1}, id="newton"),
    pytest.param({"degree": 15, "newton_steps": 2}, id="deeper-than-the-parameters"),
    pytest.param({"degree": 63, "newton_steps": 2}, id="the-recipe"),
]


@pytest.mark.parametrize("settings", ADAMW)
def test_encrypted_adamw_is_its_twin(lab, settings):
    weights, gradients = problem(lab.packing.slots)
    divisor, eps = calibrate_divisor(float((gradients**2).max()), margin=1.5)
    optimizer = AdamWHE(eps=eps, divisor=divisor, **settings)
    expected, state = run_reference(optimizer, weights, gradients)
    found, found_state = run_encrypted(lab, optimizer, weights, gradients)
    change = np.abs(expected - weights).max()
    assert change > 5e-3
    np.testing.assert_allclose(found, expected, atol=2e-4 * change, rtol=0)
    for name in ("m", "v"):
        np.testing.assert_allclose(found_state[name], state[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ratio", "settings", "tolerance"), [(0.02, {}, 5e-3), (0.02, {"degree": 31}, 1e-4), (5e-4, {"degree": 31, "newton_steps": 2}, 2e-3)])
def test_adamw_is_close_to_the_exact_formula(ratio, settings, tolerance):
    weights, gradients = problem(256)
    divisor, eps = calibrate_divisor(float((gradients**2).max()), ratio, margin=1.5)
    optimizer = AdamWHE(eps=eps, divisor=divisor, weight_decay=0.05, **settings)
    found, _ = run_reference(optimizer, weights, gradients)
    expected = exact_adamw(optimizer, weights, gradients)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected - weights).max()


@pytest.mark.parametrize(("ratio", "levels"), [(0.02, 4), (0.004, 5), (1e-3, 6), (3e-4, 8), (1e-4, 10)])
def test_the_fit_for_a_ratio_is_within_a_percent(ratio, levels):
    degree, newton_steps = fitting(ratio)
    optimizer = AdamWHE(eps=ratio, divisor=1.0, degree=degree, newton_steps=newton_steps)
    values = np.geomspace(ratio, 1.0, 5001)
    assert np.abs(optimizer.approximation(values) * np.sqrt(values) - 1.0).max() < 0.01
    assert optimizer.depth == 3 + levels


def test_the_exact_formula_is_torch_adamw_but_for_eps():
    weights, gradients = problem(64)
    optimizer = AdamWHE(eps=1e-16, divisor=1.0, weight_decay=0.05)
    theta = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    stock = torch.optim.AdamW([theta], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    for step, gradient in enumerate(gradients, start=1):
        stock.param_groups[0]["lr"] = learning_rate("cosine", 4e-3, step, STEPS)
        theta.grad = torch.from_numpy(gradient.copy())
        stock.step()
    np.testing.assert_allclose(exact_adamw(optimizer, weights, gradients), theta.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
def test_sgd_is_torch_sgd(lab, momentum, decay):
    weights, gradients = problem(lab.packing.slots)
    optimizer = SGD(momentum, decay, divisor=4e-4)
    theta = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    stock = torch.optim.SGD([theta], lr=1.0, momentum=momentum, weight_decay=decay)
    for step, gradient in enumerate(gradients, start=1):
        stock.param_groups[0]["lr"] = learning_rate("cosine", 0.5, step, STEPS)
        theta.grad = torch.from_numpy(gradient.copy())
        stock.step()
    expected = theta.detach().numpy()
    np.testing.assert_allclose(run_reference(optimizer, weights, gradients, 0.5)[0], expected, atol=1e-12)
    np.testing.assert_allclose(run_encrypted(lab, optimizer, weights, gradients, 0.5)[0], expected, atol=1e-5)


def test_an_adamw_step_refreshes_gradient_and_moments_together(lab):
    weights, gradients = problem(lab.packing.slots)
    optimizer = AdamWHE(eps=2e-4, divisor=1e-2)
    assert optimizer.depth == 7 == lab.session.top
    run_encrypted(lab, optimizer, weights, gradients[:1])
    assert lab.session.refresh.count == 1
    run_encrypted(lab, optimizer, weights, gradients[:2])
    assert lab.session.refresh.count == 1 + 3, "the second step also refreshes the weights, which installing them would have done"


def test_a_second_moment_beyond_the_divisor_is_an_error():
    weights, gradients = problem(64)
    optimizer = AdamWHE(eps=1e-6, divisor=1e-4)
    with pytest.raises(RangeError, match="optimizer, step 1"):
        optimizer.reference(weights, optimizer.gradient_gain * gradients[0], {}, 1e-3, 1)


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"eps": 2.0}, {"beta1": 1.0}, {"weight_decay": -0.1}, {"divisor": -1.0, "eps": -2.0}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ParameterError):
        AdamWHE(**wrong)


@pytest.mark.parametrize("largest", [0.0, float("nan")])
def test_calibration_without_a_gradient_says_so(largest):
    with pytest.raises(ParameterError, match="check labels"):
        calibrate_divisor(largest)
