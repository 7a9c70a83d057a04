"""The planner: what it promises is what a run does, and it beats deciding demand by demand."""

import numpy as np
import pytest
from test_tensor import TOKENS, VARIANTS, calibrated, inputs, run, small_model

from hf_he.ckks.parameters import parameter_set
from hf_he.errors import ShapeError
from hf_he.models.he_bert import HEBertConfig, HEBertForSequenceClassification
from hf_he.packing import Packing
from hf_he.planner import WORTH, choose_packing, make_plan, make_plans, packing_widths
from hf_he.protocol import widest_batch


def default_shape(**changes) -> HEBertForSequenceClassification:
    """Two layers x 128 with the approximations of the checkpoint that ships: degree 7, five squarings."""
    model = HEBertForSequenceClassification(HEBertConfig(vocab_size=100, **changes)).eval()
    norm, activation = {"interval": [0.5, 20.0], "degree": 7, "newton_steps": 0}, {"interval": [-6.0, 6.0], "degree": 7}
    approximations = {"bert.pooler.activation": activation}
    for i in range(model.config.num_hidden_layers):
        layer = f"bert.encoder.layer.{i}"
        approximations |= {
            f"{layer}.attention.self": {"interval": [-19.0, 0.0], "squarings": 5},
            f"{layer}.attention.output.LayerNorm": norm,
            f"{layer}.intermediate.intermediate_act_fn": activation,
            f"{layer}.output.LayerNorm": norm,
        }
    model.set_approximations(approximations)
    model.set_mode("polynomial")
    return model


@pytest.mark.parametrize("levels", [7, 13])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_does_what_the_plan_says(make_lab, variant, levels):
    model = small_model(**VARIANTS[variant])
    lab = make_lab(levels=levels)
    embeddings, mask = inputs(model, lab.packing.sequences, TOKENS)
    expected = calibrated(model, embeddings, mask)
    plan = make_plan(model, lab.backend.parameters, lab.packing)
    demand = lab.session.refresh
    run(lab, model, embeddings, mask)
    unplanned = demand.count

    lab.session.place(model, plan.levels)
    lab.backend.log.reset()
    lab.backend.rotations_used.clear()
    np.testing.assert_allclose(run(lab, model, embeddings, mask), expected.numpy(), atol=1e-4)
    assert demand.count - unplanned == len(plan.refreshes) <= unplanned
    assert set(lab.backend.rotations_used) == set(plan.rotations)
    counted = lab.backend.log.operations()
    assert {name: counted[name] for name in plan.operations} == plan.operations
    used = {entry.level for entry in lab.backend.log.trace if entry.primitive == "rotate" and entry.count}
    assert max(used) == max(plan.rotations.values())


def test_five_bootstraps_of_one_ciphertext_each():
    """66 levels of depth in chunks of 13, each refreshed where the model is one ciphertext wide: no plan can do with fewer."""
    parameters = parameter_set("n16-bootstrap")
    plan = make_plan(default_shape(), parameters, Packing.fit(parameters.slots, 128, 32))
    assert [count for _, count in plan.refreshes] == [1] * 5


def test_round_trips_of_the_default_parameters():
    parameters = parameter_set("n14")
    plan = make_plan(default_shape(), parameters, Packing.fit(parameters.slots, 128, 32))
    assert [count for _, count in plan.refreshes] == [1] * 12 and plan.operations["rotate"] == 1077


def test_a_batch_that_fills_the_slots_is_packed_one_feature_per_ciphertext():
    parameters = parameter_set("n14")
    plans = make_plans(default_shape(), parameters, 32)
    few, many = (choose_packing(plans, batch) for batch in (2, 256))
    assert (few.packing.features, many.packing.features) == (128, 1)
    even = next(batch for batch in range(1, 257) if choose_packing(plans, batch).packing.features == 1)
    assert WORTH * many.seconds[1] <= choose_packing(plans, even).seconds[128] < WORTH * many.seconds[1] + sum(few.plan.seconds.values())
    assert many.seconds[128] / 5 > many.seconds[1] == sum(many.plan.seconds.values())
    assert "256 sequences" in many.reason and set(many.seconds) == {1, 128}


@pytest.mark.parametrize(("hidden", "heads", "widths"), [(128, 2, (128, 1)), (768, 12, (256, 1)), (384, 12, (128, 1)), (96, 4, (1,)), (33, 3, (1,))])
def test_ciphertexts_hold_whole_heads_of_a_power_of_two_of_features(hidden, heads, widths):
    assert packing_widths(HEBertConfig(hidden_size=hidden, num_attention_heads=heads)) == widths
    power = HEBertConfig(hidden_size=hidden, num_attention_heads=heads, attention_kernel="power_softmax")
    if widths == (1,):
        with pytest.raises(ShapeError, match="heads of a power of two of features"):
            packing_widths(power)
    else:
        assert packing_widths(power) == widths[:1]


@pytest.mark.parametrize(("hidden", "heads", "widest"), [(768, 12, 12), (384, 12, 12)])
def test_refreshes_of_encoders_of_several_ciphertexts_are_as_wide_as_both_sides_expect(hidden, heads, widest):
    model, parameters = default_shape(hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, num_hidden_layers=1), parameter_set("n14")
    packing = Packing.fit(parameters.slots, packing_widths(model.config)[0], 32)
    assert max(count for _, count in make_plan(model, parameters, packing).refreshes) <= widest_batch(model.config, packing) == widest
