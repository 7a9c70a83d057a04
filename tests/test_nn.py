"""HELayerNorm, HERMSNorm and PolynomialActivation in both modes, rotary embedding, range tracking, live ranges and torch-function dispatch."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_he.errors import ApproximationError, RangeError
from hf_he.nn import (
    EXACT_ACTIVATIONS,
    HELayerNorm,
    HERMSNorm,
    LayerRange,
    PolynomialActivation,
    RangeTracker,
    activation,
    apply_rotary,
    collect_ranges,
    evaluate_polynomial,
    layer_norm,
    rms_norm,
)

NORM_ENTRY = {"interval": [0.1, 9.0], "degree": 15, "newton_steps": 2}
GELU_ENTRY = {"interval": [-8, 8], "degree": 31}


@pytest.fixture
def norm():
    torch.manual_seed(0)
    module = HELayerNorm(16, eps=1e-5)
    module.layer_name = "encoder.LayerNorm"
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


@pytest.fixture
def hidden_states():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class TestHELayerNorm:
    def test_exact_mode_is_layer_norm(self, norm, hidden_states):
        expected = F.layer_norm(hidden_states, (16,), norm.weight, norm.bias, norm.eps)
        assert torch.equal(norm(hidden_states), expected)
        with RangeTracker(norm):
            torch.testing.assert_close(norm(hidden_states), expected)

    def test_polynomial_mode_has_the_certified_relative_error(self, norm, hidden_states):
        norm.configure("polynomial", NORM_ENTRY)
        centred = hidden_states - hidden_states.mean(-1, keepdim=True)
        scale = (norm(hidden_states) - norm.bias) / (centred * norm.weight)
        exact = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        assert (scale / exact - 1).abs().max() <= norm.approximation.max_error + 1e-5

    def test_same_state_dict_names_as_torch(self, norm):
        assert norm.state_dict().keys() == nn.LayerNorm(16).state_dict().keys()

    def test_gradients_agree_between_modes(self, norm, hidden_states):
        hidden_states.requires_grad_()
        (exact,) = torch.autograd.grad(norm(hidden_states).square().sum(), hidden_states)
        norm.configure("polynomial", {**NORM_ENTRY, "degree": 31})
        (polynomial,) = torch.autograd.grad(norm(hidden_states).square().sum(), hidden_states)
        torch.testing.assert_close(polynomial, exact, atol=1e-4, rtol=1e-4)


class TestHERMSNorm:
    @pytest.fixture
    def norm(self):
        torch.manual_seed(0)
        module = HERMSNorm(16, eps=1e-5)
        nn.init.normal_(module.weight)
        return module

    def test_exact_mode_is_rms_norm(self, norm, hidden_states):
        expected = hidden_states / (hidden_states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        torch.testing.assert_close(norm(hidden_states), expected)
        with RangeTracker(norm) as tracker:
            torch.testing.assert_close(norm(hidden_states), expected)
        assert tracker.ranges[""].statistic == "variance"
        assert tracker.ranges[""].maximum == pytest.approx(float(hidden_states.square().mean(-1).max()) + 1e-5)

    def test_polynomial_mode_has_the_certified_relative_error(self, norm, hidden_states):
        norm.configure("polynomial", NORM_ENTRY)
        scale = norm(hidden_states) / (hidden_states * norm.weight)
        exact = (hidden_states.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        assert (scale / exact - 1).abs().max() <= norm.approximation.max_error + 1e-5
        with pytest.raises(RangeError, match="variance"):
            norm(10 * hidden_states)

    def test_same_state_dict_names_as_torch(self, norm):
        assert norm.state_dict().keys() == nn.RMSNorm(16).state_dict().keys()


class TestApplyRotary:
    @staticmethod
    def angles(positions, rotary_dim):
        angles = positions[:, None] * 100.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        return torch.cat((angles, angles), -1)[None]

    @pytest.mark.parametrize("rotary_dim", [4, 8])
    def test_turns_pairs_of_features(self, rotary_dim):
        states = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        angles = self.angles(torch.arange(5, dtype=torch.float64), rotary_dim)
        result = apply_rotary(states, angles.cos(), angles.sin())
        half = rotary_dim // 2
        pairs = torch.complex(states[..., :half], states[..., half:rotary_dim]) * torch.exp(1j * angles[0, :, :half])
        torch.testing.assert_close(result, torch.cat((pairs.real, pairs.imag, states[..., rotary_dim:]), -1))

    def test_products_depend_on_distance_only(self):
        query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 6, 8)
        angles = self.angles(torch.arange(6, dtype=torch.float64), 8)
        products = apply_rotary(query, angles.cos(), angles.sin()) @ apply_rotary(key, angles.cos(), angles.sin()).transpose(-1, -2)
        torch.testing.assert_close(products[0, 0, 1:, 1:], products[0, 0, :-1, :-1])


class TestPolynomialActivation:
    @pytest.mark.parametrize("function", sorted(EXACT_ACTIVATIONS))
    def test_polynomial_mode_has_the_certified_error(self, function):
        module = PolynomialActivation(function)
        x = torch.linspace(-6, 6, 1001)
        exact = module(x)
        module.configure("polynomial", {"interval": [-6.0, 6.0], "degree": 15})
        assert (module(x) - exact).abs().max() <= module.approximation.max_error + 1e-5

    @pytest.mark.parametrize("function, interval", [("gelu", [-6.0, 6.0]), ("gelu", [-6.0, 4.0]), ("tanh", [-3.0, 3.0])])
    def test_gradient_is_that_of_the_polynomial(self, function, interval):
        module = PolynomialActivation(function)
        module.configure("polynomial", {"interval": interval, "degree": 9})
        x = torch.linspace(-2.5, 2.5, 13, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: evaluate_polynomial(module.approximation, x), (x,))

    def test_blocks_and_strides_do_not_matter(self):
        module = PolynomialActivation("gelu")
        module.configure("polynomial", GELU_ENTRY)
        x = torch.randn(300, 200).t()
        torch.testing.assert_close(module(x), module.approximation(x))

    def test_unknown_function(self):
        with pytest.raises(ApproximationError, match="No activation named 'mish'"):
            PolynomialActivation("mish")


class TestConfigure:
    def test_missing_entry_asks_for_calibration(self, norm):
        with pytest.raises(ApproximationError, match=r"encoder\.LayerNorm.*Run calibration"):
            norm.configure("polynomial", None)

    def test_incomplete_entry(self, norm):
        with pytest.raises(ApproximationError, match=r"exactly \['interval', 'degree', 'newton_steps'\]"):
            norm.configure("polynomial", {"interval": [0.1, 9.0]})

    def test_unknown_mode(self, norm):
        with pytest.raises(ApproximationError, match="exact, polynomial"):
            norm.configure("encrypted", NORM_ENTRY)

    def test_exact_mode_remembers_the_interval(self, norm):
        norm.configure("exact", NORM_ENTRY)
        assert norm.approximation is None and norm.interval == (0.1, 9.0)

    def test_copies_keep_their_approximation(self, norm, hidden_states):
        norm.configure("polynomial", NORM_ENTRY)
        assert torch.equal(copy.deepcopy(norm)(hidden_states), norm(hidden_states))


class TestRangeError:
    def test_layer_norm_names_layer_value_and_interval(self, norm, hidden_states):
        norm.configure("polynomial", NORM_ENTRY)
        with pytest.raises(RangeError, match=r"encoder\.LayerNorm: variance \d+.* outside the fitted interval \[0\.1, 9\]"):
            norm(20 * hidden_states)

    @pytest.mark.parametrize("value", [-8.01, 8.01, float("nan"), float("inf")])
    def test_activation(self, value):
        module = PolynomialActivation("gelu")
        module.configure("polynomial", GELU_ENTRY)
        module(torch.tensor([-8.0, 8.0]))
        with pytest.raises(RangeError, match="PolynomialActivation: input"):
            module(torch.tensor([0.0, value]))

    def test_exact_mode_never_raises(self, norm, hidden_states):
        norm.configure("exact", NORM_ENTRY)
        norm(20 * hidden_states)


class TestRangeTracker:
    def test_records_range_and_counts_instead_of_raising(self, norm, hidden_states):
        norm.configure("polynomial", NORM_ENTRY)
        scaled = hidden_states * torch.tensor([1.0, 1.0, 20.0, 1.0, 20.0])[:, None]
        variance = scaled.var(-1, correction=0) + norm.eps
        with RangeTracker(norm) as tracker:
            norm(scaled)
            norm(hidden_states)
        recorded = tracker.ranges["encoder.LayerNorm"]
        assert (recorded.statistic, recorded.interval, recorded.count) == ("variance", (0.1, 9.0), 20)
        assert recorded.maximum == pytest.approx(float(variance.max()), rel=1e-5)
        assert recorded.out_of_range == tracker.out_of_range == 4
        assert tracker.to_dict()["encoder.LayerNorm"]["out_of_range"] == 4

    def test_counts_in_exact_mode_too(self, norm, hidden_states):
        norm.configure("exact", NORM_ENTRY)
        with RangeTracker(norm) as tracker:
            norm(20 * hidden_states)
        assert tracker.out_of_range == 10

    @pytest.mark.parametrize(
        ("values", "ends"), [((2.0, math.inf), (0.0, math.inf)), ((-math.inf, 2.0), (-math.inf, 2.0)), ((math.nan, 2.0), (-math.inf, math.inf))]
    )
    def test_values_that_are_not_finite_are_out_of_any_range(self, values, ends):
        seen = LayerRange("input", None)
        for batch in ((0.0, 1.0), values, (0.5, 1.0)):
            seen.update(torch.tensor(batch))
        assert (seen.minimum, seen.maximum, seen.count, seen.out_of_range) == (*ends, 6, 1)

    def test_only_its_own_model_is_tracked(self, norm, hidden_states):
        other = copy.deepcopy(norm)
        other.configure("polynomial", NORM_ENTRY)
        with RangeTracker(norm) as tracker, pytest.raises(RangeError):
            other(20 * hidden_states)
        assert not tracker.ranges

    def test_names_come_from_the_model_when_layers_have_none(self, hidden_states):
        model = nn.Sequential(HELayerNorm(16), PolynomialActivation("gelu"))
        with RangeTracker(model) as tracker:
            model(hidden_states)
        assert set(tracker.ranges) == {"0", "1"}

    def test_accumulates_over_blocks_and_stops_on_exit(self, norm, hidden_states):
        tracker = RangeTracker(norm)
        for _ in range(2):
            with tracker:
                norm(hidden_states)
        norm(hidden_states)
        assert tracker.ranges["encoder.LayerNorm"].count == 20


def test_collect_ranges_gives_tensors_with_gradients(norm, hidden_states):
    model = nn.Sequential(norm, nn.Linear(16, 16), PolynomialActivation("gelu"))
    hidden_states.requires_grad_()
    with collect_ranges(model) as statistics:
        model(hidden_states)
    assert {name: tuple(value.shape) for name, value in statistics.items()} == {"encoder.LayerNorm": (2, 5, 1), "2": (2, 5, 16)}
    penalty = F.relu(statistics["2"].abs() - 0.1).sum() + F.relu(statistics["encoder.LayerNorm"] - 0.1).sum()
    penalty.backward()
    assert hidden_states.grad.abs().sum() > 0 and model[1].weight.grad.abs().sum() > 0


class Recording(torch.Tensor):
    """A tensor that takes over the overridable functions, as EncryptedTensor does."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (layer_norm, rms_norm, apply_rotary, activation):
            cls.calls.append((func.__name__, args[1]))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def test_layers_are_overridable(norm, hidden_states):
    gelu = PolynomialActivation("gelu")
    gelu(norm(hidden_states.as_subclass(Recording)))
    assert Recording.calls == [("layer_norm", norm), ("activation", gelu)]
    Recording.calls.clear()
    root_norm, cos = HERMSNorm(16), torch.ones(1, 5, 16)
    apply_rotary(root_norm(hidden_states.as_subclass(Recording)), cos, cos)
    assert Recording.calls == [("rms_norm", root_norm), ("apply_rotary", cos)]
