"""Gradients of an encoder with power-softmax attention, stock PEFT LoRA and an encrypted head against torch's autograd of the polynomial model."""

import pytest
import torch
from encrypted_adapter import adapted, decrypted, install, relative_error
from gradients import encrypted_gradient
from test_tensor import TOKENS, inputs, small_model

from hf_he.nn import RangeTracker
from hf_he.packing import pack_attention_mask
from hf_he.tensor import required_rotations

FORMS = {
    "mean, p = 4": {"power_softmax_length_agnostic": True, "power_softmax_eps": 0.1},
    "mean, p = 6": {"power_softmax_degree": 6, "power_softmax_length_agnostic": True, "power_softmax_eps": 0.1},
    "constant": {"power_softmax_shift": 1.0, "power_softmax_divisor": 20.0},
}


def calibrated(model, embeddings, mask):
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(embedding_output=embeddings, attention_mask=mask)
    entries = {}
    for name, seen in tracker.ranges.items():
        bound = 1.2 * max(-seen.minimum, seen.maximum)
        entries[name] = {
            "variance": {"interval": [seen.minimum / 2, 2 * seen.maximum], "degree": 15, "newton_steps": 1},
            "input": {"interval": [-bound, bound], "degree": 15},
            "power_mean": {"interval": [seen.minimum / 2, 2 * seen.maximum], "degree": 7, "goldschmidt_steps": 2},
            "score": {"interval": [-bound, bound]},
        }[seen.statistic]
    model.set_approximations(entries)
    model.set_mode("polynomial")


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("form", FORMS)
def test_whole_model(make_lab, form, policy):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = small_model(attention_kernel="power_softmax", num_hidden_layers=1, **dropout, **FORMS[form])
    packing = make_lab().packing
    lab = make_lab(rotations=required_rotations(model.config, packing, 2, training=True))
    lab.session.activations = policy
    embeddings, mask = inputs(model, packing.sequences, TOKENS)
    calibrated(model, embeddings, mask)
    model = adapted(model)
    logits = model(embedding_output=embeddings, attention_mask=mask).logits
    upstream = lab.random(*logits.shape)
    logits.backward(upstream)
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    leaves = install(lab, model)
    model.float()

    power = model.config.power_softmax_degree if model.config.power_softmax_length_agnostic else None
    packed = lab.session.attention_mask(lab.backend.encrypt(pack_attention_mask(mask.double().numpy(), packing, power), lab.secret))
    found = model(embedding_output=lab.encrypt(embeddings), attention_mask=packed).logits
    torch.testing.assert_close(lab.decrypt(found.ciphertext, 2)[:, 0], logits.detach(), atol=1e-7, rtol=0)
    torch.autograd.backward([found], [encrypted_gradient(lab, upstream, pooled=True)])
    assert len(leaves) == len(expected) > 2
    for name, weight in leaves.items():
        assert relative_error(decrypted(lab, weight.grad), expected[name]) <= 4e-5, name
