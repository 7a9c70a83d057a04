"""Attention, activations and whole models with one ciphertext per feature, on the simulator, against polynomial mode."""

import numpy as np
import pytest
import torch
from test_tensor import TOKENS, VARIANTS, calibrated, inputs, run, small_model

from hf_he.approximation import fit_polynomial, kernel_exponential
from hf_he.errors import UnsupportedEncryptedOperation
from hf_he.ops import activation, feature_major_attention, required_rotations
from hf_he.ops.operand import Operand
from hf_he.packing import Packing
from hf_he.planner import make_plan


@pytest.fixture
def wide(make_lab):
    """1,024 slots as 8 tokens x 128 sequences, with the keys of this attention only."""
    return make_lab(rotations=feature_major_attention.rotations(Packing.fit(1024, 1, TOKENS)), features=1)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_against_its_reference(wide, heads, masked):
    head_dim, sequences = 4, wide.packing.sequences
    states = [wide.states(heads * head_dim) / 2 for _ in range(3)]
    approximation = kernel_exponential((-16.0, 0.0), 5)
    keep = (torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (sequences, 1))).double()
    mask = wide.encrypt_mask(keep).ciphertext if masked else None
    wide.backend.rotations_used.clear()
    operands = [wide.encrypt(state).operand for state in states]
    out = feature_major_attention.encrypted(wide.session, *operands, mask, heads, head_dim**-0.5, approximation)
    split = [state.view(sequences, TOKENS, heads, head_dim).transpose(1, 2) for state in states]
    pairs = keep[:, None, None, :].expand(-1, 1, TOKENS, -1) if masked else None
    expected = feature_major_attention.reference(*split, pairs, head_dim**-0.5, approximation)
    assert (out.batch_shape, out.level) == ((heads * head_dim,), 0)
    wide.check(out, expected.reshape(sequences, TOKENS, -1), tolerance=1e-6)
    assert set(wide.backend.rotations_used) == feature_major_attention.rotations(wide.packing)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_equal_polynomial_mode(wide, variant):
    model = small_model(**VARIANTS[variant])
    embeddings, mask = inputs(model, wide.packing.sequences, TOKENS)
    expected = calibrated(model, embeddings, mask)
    wide.backend.rotations_used.clear()
    np.testing.assert_allclose(run(wide, model, embeddings, mask), expected.numpy(), atol=5e-6)
    assert set(wide.backend.rotations_used) == required_rotations(model.config, wide.packing)


def test_the_plan_says_what_a_run_does(wide):
    model = small_model()
    embeddings, mask = inputs(model, wide.packing.sequences, TOKENS)
    expected = calibrated(model, embeddings, mask)
    plan = make_plan(model, wide.backend.parameters, wide.packing)
    wide.session.place(model, plan.levels)
    wide.backend.log.reset()
    refreshed = wide.session.refresh.count
    np.testing.assert_allclose(run(wide, model, embeddings, mask), expected.numpy(), atol=5e-6)
    assert wide.session.refresh.count - refreshed == len(plan.refreshes)
    counted = wide.backend.log.operations()
    assert {name: counted[name] for name in plan.operations} == plan.operations


def test_causal_masks_are_refused(wide):
    operand = Operand(wide.session, 4, wide.encrypt(wide.states(4)).ciphertext)
    with pytest.raises(UnsupportedEncryptedOperation, match="causal"):
        feature_major_attention.encrypted(wide.session, operand, operand, operand, None, 1, 0.5, kernel_exponential((-16.0, 0.0), 5), causal=True)


def test_wide_states_are_activated_in_pieces(wide, monkeypatch):
    monkeypatch.setattr(activation, "LARGEST_BATCH", 8)
    states, approximation = wide.states(12), fit_polynomial("gelu", (-6.0, 6.0), 15)
    wide.backend.log.reset()
    out = activation.encrypted(wide.session, wide.encrypt(states).operand, approximation)
    assert {entry.count for entry in wide.backend.log.trace if entry.primitive == "multiply"} == {4}
    wide.check(out, activation.reference(states, approximation), tolerance=1e-6)
