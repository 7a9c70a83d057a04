"""LayerNorm, activations, sums and the first token on ciphertexts against torch."""

import pytest
import torch
from torch.nn import functional as F

from hf_he.approximation import fit_inverse_square_root, fit_polynomial
from hf_he.errors import LevelError, ShapeError
from hf_he.ops import activation, norm, reduce
from hf_he.ops.operand import Operand


@pytest.mark.parametrize("level", [7, 3, 0])
@pytest.mark.parametrize(("degree", "newton_steps"), [(7, 0), (7, 1), (15, 2), (31, 3)])
def test_layer_norm(lab, level, degree, newton_steps):
    x, weight, bias = 2 * lab.states() + 1, lab.random(16), lab.random(16)
    approximation = fit_inverse_square_root((0.3, 15.0), degree, newton_steps)
    out = norm.WaitingNorm(lab.encrypt(x, level).operand, weight, bias, 1e-5, approximation)
    lab.check(out.ciphertext, norm.reference(x, weight, bias, 1e-5, approximation), tolerance=2e-5)


def test_layer_norm_approaches_the_exact_one(lab):
    x, weight, bias = lab.states(), lab.random(16), lab.random(16)
    out = norm.WaitingNorm(lab.encrypt(x).operand, weight, bias, 1e-5, fit_inverse_square_root((0.1, 4.0), 15, 2))
    lab.check(out.ciphertext, F.layer_norm(x, (16,), weight, bias, 1e-5), tolerance=1e-5)


@pytest.mark.parametrize(("degree", "newton_steps"), [(7, 0), (7, 1), (15, 1), (31, 2)])
def test_layer_norm_leaves_the_levels_its_consumer_needs(lab, degree, newton_steps):
    x, approximation = lab.states(), fit_inverse_square_root((0.1, 15.0), degree, newton_steps)

    def waiting():
        return norm.WaitingNorm(lab.encrypt(x).operand, torch.ones(16), None, 1e-5, approximation)

    expected = norm.reference(x, torch.ones(16), torch.zeros(16), 1e-5, approximation)
    for level in range(waiting().level + 1):
        out = waiting().ensure(level)
        assert out.level == level
        lab.check(out, expected, tolerance=2e-5)
    assert waiting().ciphertext.level == waiting().level == min(norm.inverse_root_level(7, approximation) - 1, 4)
    refreshed = waiting().ensure(6)
    assert refreshed.level == 7
    lab.check(refreshed, expected, tolerance=2e-5)


def test_layer_norm_refreshes_one_ciphertext(lab):
    _ = norm.WaitingNorm(lab.encrypt(lab.states()).operand, lab.random(16), None, 1e-5, fit_inverse_square_root((0.3, 15.0), 7, 1)).ciphertext
    assert lab.session.refresh.count == 1


def test_a_refresh_is_of_the_variance_above_its_lower_end(lab):
    """A bootstrap's error grows with the cube of what the slots have in common, and 1 / sqrt needs small variances most precisely."""
    refreshed, answer = [], lab.session.refresh.callback

    def record(data):
        refreshed.append(lab.decrypt(lab.backend.deserialize(data, "ciphertext"), 16))
        return answer(data)

    lab.session.refresh.callback = record
    x, approximation = lab.states(), fit_inverse_square_root((0.1, 15.0), 7, 1)
    _ = norm.WaitingNorm(lab.encrypt(x).operand, torch.ones(16), None, 1e-5, approximation).ciphertext
    (found,) = refreshed
    variance = x.var(-1, unbiased=False, keepdim=True).expand_as(x)
    torch.testing.assert_close(found, 2.0 * (variance - 0.1) / 14.9, atol=2e-5, rtol=0)


def test_layer_norm_over_several_blocks(lab):
    x, weight, bias = 2 * lab.states(48) + 1, lab.random(48), lab.random(48)
    approximation = fit_inverse_square_root((1.0, 10.0), 15, 1)
    out = norm.WaitingNorm(lab.encrypt(x).operand, weight, bias, 1e-5, approximation)
    lab.check(out.ciphertext, norm.reference(x, weight, bias, 1e-5, approximation), tolerance=2e-5)
    assert lab.session.refresh.count == 1, "the statistic is one ciphertext"


def test_layer_norm_needs_whole_blocks(lab):
    with pytest.raises(ShapeError, match="24 features"):
        norm.WaitingNorm(lab.encrypt(lab.states(24)).operand, lab.random(24), None, 1e-5, fit_inverse_square_root((0.3, 15.0), 7, 1))


@pytest.mark.parametrize(("function", "interval", "degree"), [("gelu", (-8.0, 8.0), 31), ("relu", (-5.0, 7.0), 15), ("tanh", (-6.0, 6.0), 15)])
@pytest.mark.parametrize("features", [16, 24])
def test_activation_after_a_linear_map(lab, function, interval, degree, features):
    x, weight, bias = lab.states(), 0.3 * lab.random(features, 16), lab.random(features)
    polynomial = fit_polynomial(function, interval, degree)
    out = activation.encrypted(lab.session, F.linear(lab.encrypt(x), weight, bias).operand, polynomial)
    lab.check(out, polynomial(F.linear(x, weight, bias)))
    assert out.level == 1, "one level is left for the next linear map"
    assert lab.session.refresh.count == 0, "the interval folds into the weights"


def test_activation_on_its_own_spends_a_level_on_its_interval(lab):
    x, polynomial = lab.states(), fit_polynomial("gelu", (-6.0, 5.0), 15)
    out = activation.encrypted(lab.session, lab.encrypt(x).operand, polynomial)
    lab.check(out, polynomial(x))
    assert out.level == 7 - 1 - 4


def test_a_pooled_state_stays_in_range_on_other_tokens(lab):
    x, polynomial = 5 + 2 * torch.tanh(lab.states()), fit_polynomial("tanh", (2.0, 9.0), 15)
    pooled = Operand(lab.session, 16, reduce.encrypted(lab.session, lab.encrypt(x).ciphertext), pooled=True)
    out = lab.decrypt(activation.encrypted(lab.session, pooled, polynomial), 16)
    torch.testing.assert_close(out[:, 0], polynomial(x[:, 0]), atol=3e-8, rtol=0)
    assert out[:, 1:].abs().max() < 1.1


def test_too_deep_an_activation_says_so(make_lab):
    lab = make_lab(levels=3)
    with pytest.raises(LevelError, match="4 levels"):
        activation.encrypted(lab.session, lab.encrypt(lab.states()).operand, fit_polynomial("gelu", (-6.0, 6.0), 15))


def test_first_token(lab):
    x = lab.states()
    out = lab.decrypt(reduce.encrypted(lab.session, lab.encrypt(x).ciphertext), 16)
    torch.testing.assert_close(out[:, 0], reduce.reference(x), atol=2e-8, rtol=0)
    assert out[:, 1:].abs().max() < 2e-8
