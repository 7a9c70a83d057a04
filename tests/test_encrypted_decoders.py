"""Decoders on ciphertexts: the same logits as in polynomial mode, for both architectures and every kernel, with grouped heads and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laboratory import Lab

from hf_he import HEGPTNeoXConfig, HEGPTNeoXForCausalLM, HELlamaConfig, HELlamaForCausalLM
from hf_he.backends import available_backends
from hf_he.ckks.parameters import parameter_set
from hf_he.errors import ShapeError, UnsupportedEncryptedOperation
from hf_he.nn import RangeTracker
from hf_he.packing import Packing
from hf_he.planner import make_plan
from hf_he.tensor import required_rotations

TOKENS = 8
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
NEOX, LLAMA = (HEGPTNeoXConfig, HEGPTNeoXForCausalLM), (HELlamaConfig, HELlamaForCausalLM)
KERNELS = {
    "gaussian": {"attention_kernel": "gaussian_kernel"},
    "power 4": {"attention_kernel": "power_softmax", "power_softmax_eps": 0.1},
    "power 6, mean": {"attention_kernel": "power_softmax", "power_softmax_degree": 6, "power_softmax_eps": 0.1, "power_softmax_length_agnostic": True},
    "normalized gaussian": {"attention_kernel": "normalized_gaussian_kernel", "power_softmax_eps": 0.02},
    "power, constant": {"attention_kernel": "power_softmax", "power_softmax_shift": 1.0, "power_softmax_divisor": 20.0},
}
VARIANTS = {
    "neox": (*NEOX, {}),
    "neox, sequential, full rotary": (
        *NEOX,
        {"use_parallel_residual": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    ),
    "llama, wide heads": (*LLAMA, {"head_dim": 16, "num_hidden_layers": 1}),
    "llama, grouped": (*LLAMA, {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": True}),
}


def small_decoder(config_class, model_class, **changes):
    """Random weights, large enough that every layer matters."""
    torch.manual_seed(1)
    model = model_class(config_class(**(SIZES | changes))).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(8)
            elif "embed" in name:
                parameter.mul_(30)
            elif "norm" in name and "bias" in name:
                parameter.normal_(0, 0.1)
    return model


def calibrated(model, embeddings, mask):
    """`model` in polynomial mode with the ranges it has on these inputs, and its logits."""
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    approximations = {}
    for name, seen in tracker.ranges.items():
        largest = 1.2 * max(-seen.minimum, seen.maximum)
        approximations[name] = {
            "variance": {"interval": [seen.minimum / 2, 2 * seen.maximum], "degree": 15, "newton_steps": 1},
            "exponent": {"interval": [min(1.2 * seen.minimum, -8.0), 0.0], "squarings": 5},
            "input": {"interval": [-largest, largest], "degree": 15},
            "power_mean": {"interval": [seen.minimum / 2, 2 * seen.maximum], "degree": 7, "goldschmidt_steps": 2},
            "kernel_mean": {"interval": [seen.minimum / 2, 2 * seen.maximum], "degree": 7, "goldschmidt_steps": 2},
            "score": {"interval": [-largest, largest]},
        }[seen.statistic]
    model.set_approximations(approximations)
    model.set_mode("polynomial")
    with torch.no_grad(), RangeTracker(model):
        return model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits


def inputs(model, packing, padded=False):
    ids = torch.randint(1, model.config.vocab_size, (packing.sequences, packing.tokens))
    lengths = torch.randint(2, packing.tokens + 1, (packing.sequences, 1)) if padded else packing.tokens
    return model.get_input_embeddings()(ids).detach(), (torch.arange(packing.tokens) < lengths).long().expand(packing.sequences, -1)


def run(lab, model, embeddings, mask=None, **changes):
    with torch.no_grad():
        keep = None if mask is None else lab.encrypt_mask(mask.double())
        logits = model(inputs_embeds=lab.encrypt(embeddings), attention_mask=keep, use_cache=False, **changes).logits
        assert logits.shape == (lab.packing.sequences, lab.packing.tokens, model.config.vocab_size)
        return lab.decrypt(logits.ciphertext, model.config.vocab_size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_encrypted_equals_polynomial(lab, variant, kernel):
    config_class, model_class, changes = VARIANTS[variant]
    model = small_decoder(config_class, model_class, **changes, **KERNELS[kernel])
    embeddings, mask = inputs(model, lab.packing)
    expected = calibrated(model, embeddings, mask)
    found = run(lab, model, embeddings)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (found.argmax(-1) == expected.argmax(-1)).double().mean() > 0.99


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", ["neox", "llama, grouped"])
def test_encrypted_padding(lab, variant, kernel):
    config_class, model_class, changes = VARIANTS[variant]
    model = small_decoder(config_class, model_class, **changes, **KERNELS[kernel], num_hidden_layers=1)
    embeddings, mask = inputs(model, lab.packing, padded=True)
    expected = calibrated(model, embeddings, mask)
    found = run(lab, model, embeddings, mask)
    real = mask[..., None].double()
    torch.testing.assert_close(found * real, expected * real, atol=1e-3, rtol=0)


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, TOKENS), min_size=8, max_size=8), kernel=st.sampled_from(sorted(KERNELS)))
def test_any_lengths_with_and_without_a_mask(lengths, kernel):
    """Padding on the right: a causal model gives its real positions the same logits with an encrypted mask, without one, and alone."""
    lab = Lab()
    model = small_decoder(*LLAMA, num_hidden_layers=1, **KERNELS[kernel])
    embeddings, _ = inputs(model, lab.packing)
    expected = calibrated(model, embeddings, torch.ones(lab.packing.sequences, TOKENS))
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    masked = run(lab, model, embeddings, mask)
    torch.testing.assert_close(masked * mask[..., None], expected * mask[..., None], atol=1e-3, rtol=0)


@pytest.mark.parametrize("levels", [7, 13])
@pytest.mark.parametrize("kernel", ["gaussian", "normalized gaussian", "power 4", "power, constant"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_does_what_the_plan_says(make_lab, variant, kernel, levels):
    config_class, model_class, changes = VARIANTS[variant]
    model = small_decoder(config_class, model_class, **(changes | KERNELS[kernel] | {"num_hidden_layers": 1}))
    packing = make_lab().packing
    lab = make_lab(rotations=required_rotations(model.config, packing), levels=levels)
    embeddings, mask = inputs(model, packing)
    expected = calibrated(model, embeddings, mask)
    plan = make_plan(model, lab.backend.parameters, packing)
    run(lab, model, embeddings)
    by_demand = lab.session.refresh.count

    lab.session.place(model, plan.levels)
    lab.backend.log.reset()
    lab.backend.rotations_used.clear()
    torch.testing.assert_close(run(lab, model, embeddings), expected, atol=1e-3, rtol=0)
    assert lab.session.refresh.count - by_demand == len(plan.refreshes) <= by_demand
    assert set(lab.backend.rotations_used) == set(plan.rotations) <= required_rotations(model.config, packing)
    counted = lab.backend.log.operations()
    assert {name: counted[name] for name in plan.operations} == plan.operations


@pytest.mark.parametrize(("decoder", "bootstraps"), [(NEOX, 4), (LLAMA, 6)], ids=["neox", "llama"])
@pytest.mark.parametrize("kernel", ["gaussian", "power 4"])
def test_bootstraps_of_two_layers(decoder, kernel, bootstraps):
    """Of one ciphertext each; deciding demand by demand takes 11 to 13, some of them of four."""
    config_class, model_class = decoder
    model = model_class(config_class(**(SIZES | {"hidden_size": 128, "intermediate_size": 512} | KERNELS[kernel]))).eval()
    entries = {
        ("interval", "squarings"): {"interval": [-19.0, 0.0], "squarings": 5},
        ("interval", "degree", "goldschmidt_steps"): {"interval": [0.05, 5.0], "degree": 7, "goldschmidt_steps": 2},
        ("interval", "degree", "newton_steps"): {"interval": [0.5, 20.0], "degree": 7, "newton_steps": 0},
        ("interval", "degree"): {"interval": [-6.0, 6.0], "degree": 7},
    }
    model.set_approximations({name: entries[layer.entry_keys] for name, layer in model.polynomial_layers().items()})
    model.set_mode("polynomial")
    parameters = parameter_set("n16-bootstrap")
    plan = make_plan(model, parameters, Packing.fit(parameters.slots, 128, 32))
    assert [count for _, count in plan.refreshes] == [1] * bootstraps


@pytest.mark.parametrize("backend", [name for name, (ok, _) in available_backends().items() if ok and name != "simulator"])
@pytest.mark.parametrize("kernel", ["gaussian", "power 4"])
def test_real_ciphertexts_level_for_level_as_simulated(make_lab, backend, kernel):
    model = small_decoder(*LLAMA, num_attention_heads=4, num_key_value_heads=2, **KERNELS[kernel])
    packing = make_lab().packing
    embeddings, mask = inputs(model, packing)
    expected = calibrated(model, embeddings, mask)
    labs = [make_lab(rotations=required_rotations(model.config, packing), backend=name) for name in ("simulator", backend)]
    for lab in labs:
        torch.testing.assert_close(run(lab, model, embeddings), expected, atol=1e-3, rtol=0)
    assert labs[0].backend.log.trace == labs[1].backend.log.trace


def test_more_tokens_than_a_head_has_features(make_lab):
    """Several score ciphertexts."""
    model = small_decoder(*NEOX, hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=200, **KERNELS["power 4"])
    lab = make_lab(features=64, tokens=32, log2_degree=12)
    embeddings, mask = inputs(model, lab.packing)
    expected = calibrated(model, embeddings, mask)
    torch.testing.assert_close(run(lab, model, embeddings), expected, atol=1e-3, rtol=0)


def test_refusals(lab):
    model = small_decoder(*LLAMA)
    embeddings, mask = inputs(model, lab.packing)
    with pytest.raises(UnsupportedEncryptedOperation, match="set_mode"):
        run(lab, model, embeddings)
    calibrated(model, embeddings, mask)
    x = lab.encrypt(embeddings)
    with torch.no_grad():
        with pytest.raises(UnsupportedEncryptedOperation, match="use_cache=False"):
            model(inputs_embeds=x)
        with pytest.raises(UnsupportedEncryptedOperation, match=r"attention_mask\(ciphertext\)"):
            model(inputs_embeds=x, attention_mask=mask, use_cache=False)
        with pytest.raises(UnsupportedEncryptedOperation, match="all positions"):
            model(inputs_embeds=x, use_cache=False, logits_to_keep=1)
        with pytest.raises(ShapeError, match="position_ids"):
            model(inputs_embeds=x, use_cache=False, position_ids=torch.arange(TOKENS).expand(3, -1))
        odd = small_decoder(*LLAMA, head_dim=4)
        calibrated(odd, embeddings, mask)
        with pytest.raises(ShapeError, match="whole blocks"):
            odd(inputs_embeds=x, use_cache=False)


def test_positions_per_sequence(lab):
    model = small_decoder(*NEOX, num_hidden_layers=1)
    embeddings, mask = inputs(model, lab.packing)
    positions = torch.arange(TOKENS) + torch.arange(lab.packing.sequences)[:, None]
    calibrated(model, embeddings, mask)
    with torch.no_grad(), RangeTracker(model):
        expected = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False, attention_mask=mask).logits
    torch.testing.assert_close(run(lab, model, embeddings, position_ids=positions), expected, atol=1e-3, rtol=0)
