"""Linear layers on ciphertexts against torch, over shapes with several and partly filled feature blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_he.ops.linear import BlockPlan, diagonals, rotations


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (16, 64), (64, 16), (16, 2), (16, 24), (8, 16), (40, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_against_torch(lab, inputs, outputs, bias):
    x, weight = lab.states(inputs), lab.random(outputs, inputs)
    offset = lab.random(outputs) if bias else None
    y = F.linear(lab.encrypt(x), weight, offset)
    assert y.shape == (lab.packing.sequences, lab.packing.tokens, outputs)
    assert y.ciphertext.level == lab.session.top - 1
    lab.check(y.ciphertext, F.linear(x, weight, offset))


def test_padding_features_stay_zero(lab):
    y = F.linear(lab.encrypt(lab.states()), lab.random(3, 16), lab.random(3))
    assert lab.decrypt(y.ciphertext, 16)[..., 3:].abs().max() < 1e-8


def test_rotations_are_the_promised_ones(lab):
    for inputs, outputs in [(16, 16), (16, 64), (64, 16), (16, 2)]:
        x = lab.encrypt(lab.states(inputs))
        lab.backend.rotations_used.clear()
        _ = F.linear(x, lab.random(outputs, inputs)).ciphertext
        assert set(lab.backend.rotations_used) == rotations(lab.packing, inputs, outputs)


@given(st.sampled_from([8, 16]), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_diagonals_hold_every_weight_once(features, inputs, outputs):
    weight = np.random.default_rng(inputs).uniform(1, 2, (outputs, inputs))
    plan = BlockPlan(features, inputs, (outputs,))
    found = diagonals(weight, plan)
    np.testing.assert_allclose(np.sort(found[found != 0]), np.sort(weight.ravel()))


def test_gain_and_shift_fold_into_the_weights(lab):
    x, weight, bias = lab.states(), lab.random(32, 16), lab.random(32)
    waiting = F.linear(lab.encrypt(x), weight, bias)
    ct = waiting.operand.compute(3, gain=0.25, shift=-0.5)
    assert ct.level == 3
    lab.check(ct, 0.25 * F.linear(x, weight, bias) - 0.5)


def test_weights_are_encoded_once_until_they_change(lab):
    x, weight = lab.encrypt(lab.states()), lab.random(16, 16)
    lab.backend.log.reset()
    first = F.linear(x, weight).ciphertext
    encoded = lab.backend.log.operations()["encode"]
    _ = F.linear(x, weight).ciphertext
    assert lab.backend.log.operations()["encode"] == encoded
    weight.mul_(2)
    second = F.linear(x, weight).ciphertext
    torch.testing.assert_close(lab.decrypt(second, 16), 2 * lab.decrypt(first, 16), atol=3e-8, rtol=0)


def test_weights_changed_behind_autograd_are_encoded_again(lab):
    """`.data`, by which PEFT merges adapters, leaves a tensor's version as it is. What a change replaces is not kept."""
    x, weight, bias, kept = lab.states(), lab.random(16, 16).requires_grad_(), lab.random(16), set()
    for _ in range(3):
        lab.check(F.linear(lab.encrypt(x), weight, bias).ciphertext, F.linear(x, weight.detach(), bias))
        transposed = lab.session.derived(weight, "transposed", lambda w: w.detach().T)
        lab.check(F.linear(lab.encrypt(x), transposed).ciphertext, F.linear(x, weight.detach().T))
        kept.add(len(lab.session._plaintexts))
        weight.data.mul_(-0.5)
        bias.add_(1)
    assert kept == {3}


def test_maps_of_one_input_share_its_rotations(lab):
    x = lab.encrypt(lab.states())
    _ = F.linear(x, lab.random(16, 16)).ciphertext
    lab.backend.log.reset()
    _ = F.linear(x, lab.random(16, 16)).ciphertext
    plan = BlockPlan(16, 16, (16,))
    assert lab.backend.log.operations()["rotate"] == len(plan.giants) - 1


def test_an_exhausted_input_is_refreshed(lab):
    x, weight = lab.states(), lab.random(16, 16)
    y = F.linear(lab.encrypt(x, level=0), weight)
    lab.check(y.ciphertext, F.linear(x, weight))
    assert lab.session.refresh.count == 1


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 128), (128, 512), (512, 128), (128, 2)])
def test_steps_grow_like_the_square_root(inputs, outputs):
    plan = BlockPlan(128, inputs, (outputs,))
    count = plan.in_blocks * (plan.babies - 1) + plan.out_blocks * (len(plan.giants) - 1)
    assert count <= 32 * max(plan.in_blocks, plan.out_blocks)
