"""The penalty is zero inside its intervals, pulls values in from outside, and calibration covers what it saw with the margin."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_he import HEBertConfig, HEBertForSequenceClassification, HEGPTNeoXConfig, HEGPTNeoXForCausalLM, collect_ranges
from hf_he.errors import ApproximationError
from hf_he.nn import LayerRange
from hf_he.training.range_penalty import Degrees, RangePenalty, RangeTargets, calibrate, track_ranges


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = HEBertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.5)
    return HEBertForSequenceClassification(config).eval()


@pytest.fixture
def batch():
    ids = torch.randint(50, (12, 8), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) < torch.arange(1, 13).clamp(max=8)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def test_hinge_is_the_squared_distance_of_the_worst_value_of_each_sentence():
    penalty = RangePenalty({"a": (-1.0, 2.0)})
    values = torch.tensor([[[-3.0, 5.0]], [[0.0, 1.0]]])
    assert float(penalty({"a": values})) == pytest.approx(((-1 + 3) ** 2 + (5 - 2) ** 2) / 2)


def test_variances_are_compared_by_their_logarithms():
    penalty = RangePenalty({"norm": (0.1, 10.0)}, logarithmic=["norm"])
    low, high = (float(penalty({"norm": torch.tensor([[value]])})) for value in (0.01, 100.0))
    assert low == pytest.approx(high) == pytest.approx(math.log(10.0) ** 2)


@given(st.lists(st.floats(-1.0, 2.0), min_size=1, max_size=20))
def test_nothing_is_charged_inside(values):
    assert float(RangePenalty({"a": (-1.0, 2.0)})({"a": torch.tensor([values])})) == 0.0


def test_gradient_descent_on_the_penalty_brings_every_layer_home(model, batch):
    targets = RangeTargets(exponent=-6.0, variance_ratio=8.0, activations={"gelu": 2.0, "tanh": 1.0})
    penalty = RangePenalty.for_model(model, batch, targets)
    assert set(penalty.intervals) == set(model.polynomial_layers())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(150):
        with collect_ranges(model) as statistics:
            model(**batch)
        loss = penalty(statistics)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > 1.0
    assert history[-1] < history[0] / 100


def test_padding_positions_and_masked_pairs_are_tracked(model, batch):
    ranges = track_ranges(model, [batch])
    assert ranges["bert.encoder.layer.0.attention.self"].count == 12 * 2 * 8 * 8
    assert ranges["bert.encoder.layer.1.output.LayerNorm"].count == 12 * 8


def test_calibration_covers_the_ranges_with_margin(model, batch):
    ranges = track_ranges(model, [batch])
    approximations = calibrate(model, ranges, Degrees(), margin=0.25)
    for name, seen in ranges.items():
        low, high = approximations[name]["interval"]
        if seen.statistic == "variance":
            assert low <= seen.minimum / 1.25 and high >= seen.maximum * 1.25
            assert low >= seen.minimum / 1.25 * 0.9 and high <= seen.maximum * 1.25 * 1.1
        elif seen.statistic == "exponent":
            assert (low <= seen.minimum * 1.25, high) == (True, 0.0)
            assert 2 ** approximations[name]["squarings"] >= -low
        else:
            assert -low == high >= 1.25 * max(-seen.minimum, seen.maximum)
    model.set_approximations(approximations)
    model.set_mode("polynomial")
    again = track_ranges(model, [batch])
    assert again["bert.encoder.layer.0.attention.self"].out_of_range == 0


def test_a_wide_exponent_gets_the_squarings_it_needs(model):
    seen = {"bert.encoder.layer.0.attention.self": LayerRange("exponent", None, -100.0, -1.0)}
    entry = calibrate(model, seen, Degrees(squarings=5), margin=0.0)["bert.encoder.layer.0.attention.self"]
    assert entry == {"interval": [-100.0, 0.0], "squarings": 7}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_interval_covers_values_that_are_not_finite(model, value):
    seen = LayerRange("exponent", None)
    for values in ([-1.0, value], [-2.0, -1.0]):
        seen.update(torch.tensor(values))
    with pytest.raises(ApproximationError, match="exponent was infinite or no number"):
        calibrate(model, {"bert.encoder.layer.0.attention.self": seen}, Degrees())


def test_an_activation_without_target_or_degree_is_named(model, batch):
    with pytest.raises(ApproximationError, match="no range target for input of gelu"):
        RangePenalty.for_model(model, batch, RangeTargets(activations={"tanh": 1.0}))
    with pytest.raises(ApproximationError, match="intermediate_act_fn: no degree for input of gelu"):
        calibrate(model, track_ranges(model, [batch]), Degrees(activations={"tanh": 7}))


def test_tracking_leaves_the_training_flag(model, batch):
    model.train()
    track_ranges(model, [batch])
    assert model.training


def decoder(**overrides):
    torch.manual_seed(0)
    config = HEGPTNeoXConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
        attention_kernel="power_softmax",
        power_softmax_eps=0.05,
        power_softmax_length_agnostic=True,
        **overrides,
    )
    return HEGPTNeoXForCausalLM(config).eval()


def test_power_means_are_pulled_in_from_above_and_from_below(batch):
    model = decoder()
    penalty = RangePenalty.for_model(model, batch, RangeTargets(power_mean=[0.2, 2.0]))
    names = [name for name, interval in penalty.intervals.items() if interval == (0.2, 2.0)]
    assert len(names) == 2 and penalty.logarithmic.issuperset(names)
    with collect_ranges(model) as statistics:
        model(**batch)
        statistics = {name: statistics[name].detach().requires_grad_() for name in penalty.intervals}
    penalty(statistics).backward()
    for name in names:
        rows, pull = statistics[name].detach().flatten(1), -statistics[name].grad.flatten(1)
        lowest, highest = (places[:, None] for places in (rows.argmin(1), rows.argmax(1)))
        assert (rows.gather(1, lowest) < 0.2).any() and (rows.gather(1, highest) > 2.0).any()
        assert torch.equal(pull.gather(1, lowest) > 0, rows.gather(1, lowest) < 0.2)
        assert torch.equal(pull.gather(1, highest) < 0, rows.gather(1, highest) > 2.0)


def test_power_mean_hinge_compares_logarithms():
    penalty = RangePenalty({"a": (0.1, 1.0)}, logarithmic=["a"])
    assert float(penalty({"a": torch.tensor([[0.01, 0.5], [0.5, 10.0]])})) == pytest.approx(math.log(10.0) ** 2)


def test_centred_intervals_follow_the_median_of_the_batch():
    penalty = RangePenalty({"norm": (0.5, 2.0)}, logarithmic=["norm"], centred=["norm"])
    values = torch.tensor([[1.0, 1.5, 3.0]])
    assert float(penalty({"norm": values})) == float(penalty({"norm": 1000.0 * values})) == 0.0
    assert float(penalty({"norm": torch.tensor([[1.0, 1.0, 4.0]])})) == pytest.approx(math.log(2.0) ** 2)


def test_training_from_scratch_leaves_the_scale_of_variances_free(batch):
    model = decoder()
    penalty = RangePenalty.for_model(model, batch, RangeTargets(), from_scratch=True)
    norms = {name for name, entry in track_ranges(model, [batch]).items() if entry.statistic == "variance"}
    assert penalty.centred == norms and all(penalty.intervals[name][0] * penalty.intervals[name][1] == pytest.approx(1.0) for name in norms)


def test_what_calibration_saw_costs_nothing(batch):
    model = decoder()
    penalty = RangePenalty.from_ranges(track_ranges(model, [batch]))
    with collect_ranges(model) as statistics, torch.no_grad():
        model(**batch)
    assert float(penalty(statistics)) == pytest.approx(0.0, abs=1e-9)


def test_calibration_of_power_softmax(batch):
    model = decoder()
    ranges = track_ranges(model, [batch])
    name = "gpt_neox.layers.0.attention"
    entry = calibrate(model, ranges, Degrees(reciprocal_degree=15, goldschmidt_steps=2), margin=0.25)[name]
    assert (entry["degree"], entry["goldschmidt_steps"]) == (15, 2)
    assert entry["interval"][0] >= 0.05, "eps + mean x^p is never below eps"
    assert entry["interval"][1] >= 1.25 * ranges[name].maximum
    divided = decoder(power_softmax_divisor=20.0)
    ranges = track_ranges(divided, [batch])
    low, high = calibrate(divided, ranges, Degrees(), margin=0.25)[name]["interval"]
    assert -low == high >= 1.25 * max(-ranges[name].minimum, ranges[name].maximum)
    assert RangePenalty.for_model(divided, batch, RangeTargets(score=3.0)).intervals[name] == (-3.0, 3.0)
