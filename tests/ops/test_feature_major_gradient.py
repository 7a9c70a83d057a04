"""Gradients with one ciphertext per feature: attention, LayerNorm and whole models with encrypted adapters, against torch's autograd."""

import pytest
import torch
from encrypted_adapter import adapted, decrypted, install, relative_error
from gradients import encrypted_gradient
from test_attention_gradient import expected_gradients
from test_tensor import TOKENS, calibrated, inputs, small_model

from hf_he.approximation import KernelExponential, fit_inverse_square_root, kernel_exponential
from hf_he.errors import UnsupportedEncryptedOperation
from hf_he.ops import feature_major_attention_gradient, norm, norm_gradient, required_rotations
from hf_he.packing import Packing

HEADS, WIDTH = 2, 4


@pytest.fixture
def wide(make_lab):
    """1,024 slots as 8 tokens x 128 sequences, with the keys of this attention only."""
    return make_lab(rotations=feature_major_attention_gradient.rotations(Packing.fit(1024, 1, TOKENS)), features=1)


def problem(lab):
    tensors = [0.5 * lab.states(HEADS * WIDTH) for _ in range(3)]
    keep = (torch.rand(lab.packing.sequences, TOKENS, generator=lab.generator) < 0.7).double()
    return tensors, lab.states(HEADS * WIDTH), keep


def run(lab, tensors, do, keep, kernel, policy="recompute", needs=(True, True, True), output=1, level=None):
    operands = [lab.encrypt(x).operand for x in tensors]
    mask = None if keep is None else lab.encrypt_mask(keep).ciphertext
    out, saved = feature_major_attention_gradient.forward(lab.session, *operands, mask, HEADS, 0.3, kernel, policy=policy)
    return out, feature_major_attention_gradient.backward(lab.session, saved, lab.encrypt(do, level).operand, needs, output)


def check(lab, gradients, expected, output=1, tolerance=1e-3):
    for operand, gradient in zip(gradients, expected, strict=True):
        ct = operand.ciphertext
        assert ct.batch_shape == (HEADS * WIDTH,) and ct.level == output
        assert abs(ct.scale / lab.backend.parameters.scale_at(output) - 1) < 1e-9
        assert (lab.decrypt(ct, gradient.shape[-1]) - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize(("masked", "level", "output"), [(True, None, 1), (False, 0, 3)])
@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_attention_against_autograd(wide, policy, masked, level, output):
    tensors, do, keep = problem(wide)
    keep = keep if masked else None
    kernel = kernel_exponential((-8.0, 0.0), 5)
    out, gradients = run(wide, tensors, do, keep, kernel, policy, output=output, level=level)
    assert out.level == 1
    check(wide, gradients, expected_gradients(tensors, do, keep, HEADS, 0.3, kernel), output)
    assert set(wide.backend.rotations_used) == feature_major_attention_gradient.rotations(wide.packing)


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)], ids=str)
def test_only_what_is_needed(wide, needs, policy):
    tensors, do, keep = problem(wide)
    kernel = KernelExponential(9, (-3.0, 0.0), 1.0)
    _, gradients = run(wide, tensors, do, keep, kernel, policy, needs)
    assert [gradient is not None for gradient in gradients] == list(needs)
    wanted = [i for i in range(3) if needs[i]]
    expected = expected_gradients(tensors, do, keep, HEADS, 0.3, kernel)
    check(wide, [gradients[i] for i in wanted], [expected[i] for i in wanted])


def test_layer_norm(wide):
    approximation = fit_inverse_square_root((0.05, 6.0), 15, 1)
    weight, x, upstream = wide.random(12), wide.states(12), wide.states(12)
    plain = x.clone().requires_grad_()
    norm.reference(plain, weight, wide.random(12), 1e-6, approximation).backward(upstream)
    forward = norm.WaitingNorm(wide.encrypt(x).operand, weight, None, 1e-6, approximation, keep=True)
    gradient = norm_gradient.WaitingNormGradient(wide.encrypt(upstream).operand, forward.statistics(), weight, approximation)
    wide.check(gradient.ciphertext, plain.grad, tolerance=1e-6 * float(plain.grad.abs().max()))


@pytest.mark.parametrize(("policy", "variant"), [("keep", {}), ("recompute", {"norm_position": "pre", "gated_ffn": True, "use_pooler": False})])
def test_whole_model(make_lab, policy, variant):
    model = small_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=1, **variant)
    packing = Packing.fit(1024, 1, TOKENS)
    lab = make_lab(rotations=required_rotations(model.config, packing, 2, training=True), features=1)
    lab.session.activations = policy
    embeddings, mask = inputs(model, packing.sequences, TOKENS)
    calibrated(model, embeddings, mask)
    model = adapted(model, targets=("query", "key", "value"))
    upstream = lab.random(packing.sequences, model.config.num_labels)
    logits = model(embedding_output=embeddings, attention_mask=mask).logits
    logits.backward(upstream)
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    leaves = install(lab, model)
    model.float()
    found = model(embedding_output=lab.encrypt(embeddings), attention_mask=lab.encrypt_mask(mask.double())).logits
    torch.testing.assert_close(lab.decrypt(found.ciphertext, 2)[:, 0], logits.detach(), atol=5e-6, rtol=0)
    torch.autograd.backward([found], [encrypted_gradient(lab, upstream, pooled=True)])
    for name, weight in leaves.items():
        assert relative_error(decrypted(lab, weight.grad), expected[name]) <= 2e-5, name
    assert set(lab.backend.rotations_used) == required_rotations(model.config, packing, 2, training=True)


def test_causal_masks_are_refused(wide):
    kernel = feature_major_attention_gradient.FeatureMajorKernel(1, 0.5, kernel_exponential((-8.0, 0.0), 4), causal=True)
    with pytest.raises(UnsupportedEncryptedOperation, match="causal"):
        kernel.forward(wide.session, *(wide.encrypt(wide.states(4)).operand for _ in range(3)), None)
