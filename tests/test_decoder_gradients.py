"""Gradients of decoders with stock PEFT LoRA on attention against torch's autograd of the polynomial model, and of what only decoders have."""

import peft
import pytest
import torch
from encrypted_adapter import decrypted, install, relative_error
from gradients import check, in_polynomial_mode
from test_encrypted_decoders import KERNELS, LLAMA, NEOX, SIZES, calibrated, inputs, small_decoder
from torch.nn import functional as F

from hf_he import nn as he_nn
from hf_he.ops.gathered import Gathered
from hf_he.tensor import EncryptedTensor, required_rotations

TOLERANCE = 1.5e-5
FUSED, SEPARATE = ("query_key_value",), ("q_proj", "k_proj", "v_proj")
VARIANTS = {
    "neox": (*NEOX, FUSED, {}),
    "neox, sequential, full rotary": (
        *NEOX,
        (*FUSED, "dense"),
        {"use_parallel_residual": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    ),
    "llama": (*LLAMA, SEPARATE, {}),
    "llama, grouped": (*LLAMA, SEPARATE, {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": True}),
    "llama, wide heads": (*LLAMA, (*SEPARATE, "o_proj", "gate_proj", "down_proj"), {"head_dim": 16, "num_hidden_layers": 1}),
}


def test_rms_norm(lab):
    module = in_polynomial_mode(he_nn.HERMSNorm(16), {"interval": [0.05, 6.0], "degree": 15, "newton_steps": 1})
    with torch.no_grad():
        module.weight.uniform_(-1.0, 2.0)
    for policy in ("keep", "recompute"):
        lab.session.activations = policy
        check(lab, module, lab.states())


@pytest.mark.parametrize("width", [8, 4])
def test_rotary(lab, width):
    """Halves of sin that differ, too."""
    cos, sin = lab.random(1, 8, width), lab.random(1, 8, width)

    def rotate(x):
        return he_nn.apply_rotary(x.view(8, 8, 2, 8).transpose(1, 2), cos, sin).transpose(1, 2).reshape(8, 8, 16)

    check(lab, rotate, lab.states())


@pytest.mark.parametrize("level", [7, 3])
def test_cut_projections(lab, level):
    """A fused projection with an adapter, of which two parts are used, one of them twice."""
    weight, bias = lab.random(48, 16) / 4, lab.random(48)

    def cut(x, a, b):
        fused = (F.linear(x, weight, bias) + F.linear(F.linear(x, a), b)).view(8, 8, 2, 24).transpose(1, 2)
        query, _, value = fused.chunk(3, dim=-1)
        query, value = (part.transpose(1, 2).reshape(8, 8, 16) for part in (query, value))
        return query * value + query

    check(lab, cut, lab.states(), lab.random(2, 16), lab.random(48, 2), level=level)


def test_a_matrix_used_cut_and_whole(lab):
    weight, back = lab.random(48, 16) / 4, lab.random(16, 48) / 7

    def shared(x, a, b):
        def fused():
            return F.linear(x, weight) + F.linear(F.linear(x, a), b)

        query = fused().view(8, 8, 2, 24).transpose(1, 2).chunk(3, dim=-1)[0].transpose(1, 2).reshape(8, 8, 16)
        return query + F.linear(fused(), back)

    check(lab, shared, lab.states(), lab.random(2, 16), lab.random(48, 2))


@pytest.mark.parametrize("level", [7, 1, 0])
def test_a_selection_for_whoever_takes_features_in_order(lab, level):
    """The gradient is moved by a linear map of 0 and 1."""
    gradient, rows = lab.states(16), torch.randperm(16, generator=lab.generator).numpy()
    gathered = Gathered([lab.encrypt(gradient, level).operand] * 2, [rows, rows], 16)
    expected = torch.zeros_like(gradient)
    expected[..., rows] = 2.0 * gradient
    lab.check(gathered.ciphertext, expected)


class Run:
    """A small decoder with LoRA on `targets`, encrypted, and the gradients of its next-token loss in the clear."""

    def __init__(self, lab, variant, kernel, policy="keep", padded=False, **changes):
        config_class, model_class, targets, own = VARIANTS[variant]
        model = small_decoder(config_class, model_class, **(own | KERNELS[kernel] | changes))
        self.lab, lab.session.activations = lab, policy
        self.embeddings, mask = inputs(model, lab.packing, padded)
        calibrated(model, self.embeddings, mask)
        self.labels = torch.randint(0, model.config.vocab_size, self.embeddings.shape[:2], generator=lab.generator).masked_fill(mask == 0, -100)
        self.mask = mask if padded else None
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(targets))
        self.model = peft.get_peft_model(model, config).double().eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * lab.random(*parameter.shape))
        self.loss = self.model(inputs_embeds=self.embeddings, attention_mask=self.mask, labels=self.labels, use_cache=False).loss
        self.loss.backward()
        self.expected = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        self.leaves = install(lab, self.model)
        self.model.float()

    def backward(self):
        """The client decrypts the logits and sends the gradient of the loss in them."""
        lab, mask = self.lab, None if self.mask is None else self.lab.encrypt_mask(self.mask.double())
        output = self.model(inputs_embeds=lab.encrypt(self.embeddings), attention_mask=mask, use_cache=False).logits
        logits = lab.decrypt(output.ciphertext, output.shape[-1]).requires_grad_()
        F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), self.labels[:, 1:].reshape(-1)).backward()
        torch.autograd.backward([output], [lab.encrypt(1000.0 * logits.grad)])

    def check(self):
        assert len(self.leaves) == len(self.expected) >= 2
        for name, weight in self.leaves.items():
            assert isinstance(weight.grad, EncryptedTensor)
            assert relative_error(decrypted(self.lab, weight.grad), 1000.0 * self.expected[name]) <= TOLERANCE, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_next_token_loss(make_lab, variant, kernel):
    """With the keys for the promised rotations only."""
    config_class, _, _, changes = VARIANTS[variant]
    packing = make_lab().packing
    lab = make_lab(rotations=required_rotations(config_class(**(SIZES | changes | KERNELS[kernel])), packing, 2, training=True))
    run = Run(lab, variant, kernel)
    run.backward()
    run.check()


@pytest.mark.parametrize("kernel", ["gaussian", "power 4"])
@pytest.mark.parametrize("variant", ["neox", "llama, grouped"])
def test_recomputed_and_padded(lab, variant, kernel):
    run = Run(lab, variant, kernel, "recompute", padded=True, num_hidden_layers=1)
    run.backward()
    run.check()


def test_micro_batches_and_checkpointing(lab):
    """Gradients of two backward passes add up in the leaves; gradient checkpointing runs the forward again."""
    run = Run(lab, "neox", "gaussian", num_hidden_layers=1)
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.train()
    run.backward()
    run.backward()
    run.expected = {name: 2.0 * gradient for name, gradient in run.expected.items()}
    run.check()
