"""Gradients of whole encrypted models with PEFT LoRA against torch's autograd of the polynomial model."""

import copy

import pytest
import torch
from encrypted_adapter import adapted, decrypted, install, relative_error
from gradients import encrypted_gradient, encrypted_labels
from test_tensor import TOKENS, calibrated, inputs, small_model
from torch import nn
from torch.nn import functional as F

from hf_he.errors import UnsupportedEncryptedOperation
from hf_he.finetuning.loss import CrossEntropy, MeanSquaredError
from hf_he.tensor import required_rotations


class Run:
    """One small model with an encrypted adapter, and the gradients torch gives of the polynomial model."""

    def __init__(self, make_lab, policy="keep", targets=("query", "key", "value"), backend="simulator", **changes):
        model = small_model(**({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | changes))
        packing = make_lab().packing
        self.lab = lab = make_lab(rotations=required_rotations(model.config, packing, 2, training=True), backend=backend)
        lab.session.activations = policy
        self.embeddings, self.mask = inputs(model, packing.sequences, TOKENS)
        calibrated(model, self.embeddings, self.mask)
        self.model = adapted(model, targets=targets)
        self.upstream = lab.random(packing.sequences, model.config.num_labels)
        self.logits = self.model(embedding_output=self.embeddings, attention_mask=self.mask).logits
        self.logits.backward(self.upstream)
        self.expected = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        self.plain = copy.deepcopy(self.model)
        self.leaves = install(lab, self.model)
        self.model.float()

    def forward(self):
        return self.model(embedding_output=self.lab.encrypt(self.embeddings), attention_mask=self.lab.encrypt_mask(self.mask.double())).logits

    def backward(self, logits):
        torch.autograd.backward([logits], [encrypted_gradient(self.lab, self.upstream, pooled=True)])

    def check(self, tolerance=5e-4, factor=1.0):
        assert len(self.leaves) == len(self.expected) > 2
        for name, weight in self.leaves.items():
            assert relative_error(decrypted(self.lab, weight.grad), factor * self.expected[name]) <= tolerance, name


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("layers", [1, 2])
def test_whole_model(make_lab, policy, layers):
    run = Run(make_lab, policy, num_hidden_layers=layers)
    logits = run.forward()
    torch.testing.assert_close(run.lab.decrypt(logits.ciphertext, 2)[:, 0], run.logits.detach(), atol=2e-7, rtol=0)
    run.backward(logits)
    run.check()
    assert set(run.lab.backend.rotations_used) == required_rotations(run.model.config, run.lab.packing, 2, training=True)


VARIANTS = {
    "pre-norm, gated": {"norm_position": "pre", "gated_ffn": True, "hidden_act": "relu"},
    "no pooler, deep head": {"use_pooler": False, "classifier_hidden_sizes": [8, 32]},
    "four heads, four labels": {"num_attention_heads": 4, "num_labels": 4},
    "odd feed-forward width": {"intermediate_size": 40},
    "adapters everywhere": {"targets": ("query", "value", "dense")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_variants(make_lab, variant):
    run = Run(make_lab, **({"num_hidden_layers": 1} | VARIANTS[variant]))
    run.backward(run.forward())
    run.check()


def test_training_mode_and_micro_batches(make_lab):
    """model.train() with dropout 0; gradients of two micro-batches add up, and are reduced once."""
    run = Run(make_lab, num_hidden_layers=1)
    run.model.train()
    run.backward(run.forward())
    once = sum(entry.count for entry in run.lab.backend.log.trace if entry.primitive == "relinearize")
    run.backward(run.forward())
    run.check(factor=2.0)
    assert sum(entry.count for entry in run.lab.backend.log.trace if entry.primitive == "relinearize") <= 2 * once + sum(
        weight.grad.ciphertext.count for weight in run.leaves.values()
    )


def test_gradient_checkpointing(make_lab):
    run = Run(make_lab)
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.train()
    run.backward(run.forward())
    run.check()


def test_nothing_below_the_lowest_adapter_is_differentiated(make_lab):
    run = Run(make_lab, targets=("value",), num_hidden_layers=2)
    first, second = ({name: weight for name, weight in run.leaves.items() if f"layer.{layer}." in name or "classifier" in name} for layer in (0, 1))
    for name, weight in run.leaves.items():
        weight.requires_grad_(name in second)
    run.lab.backend.log.reset()
    logits = run.forward()
    _ = logits.ciphertext
    forward = run.lab.backend.log.operations()["rotate"]
    run.backward(logits)
    upper = run.lab.backend.log.operations()["rotate"] - forward
    assert all(weight.grad is None for name, weight in first.items() if name not in second)
    for weight in run.leaves.values():
        weight.grad = None
        weight.requires_grad_(True)
    run.lab.backend.log.reset()
    logits = run.forward()
    _ = logits.ciphertext
    run.backward(logits)
    assert run.lab.backend.log.operations()["rotate"] - forward > 1.7 * upper


def test_without_gradients_an_encrypted_adapter_is_only_evaluated(make_lab):
    run = Run(make_lab, num_hidden_layers=1)
    with torch.no_grad():
        logits = run.forward()
    assert not logits.requires_grad
    torch.testing.assert_close(run.lab.decrypt(logits.ciphertext, 2)[:, 0], run.logits.detach(), atol=1e-7, rtol=0)


def test_native_gradients(make_lab):
    run = Run(make_lab, backend="native", num_hidden_layers=1, intermediate_size=16)
    run.backward(run.forward())
    run.check(tolerance=3e-5)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_stock_peft_model_and_its_loss(make_lab, num_labels):
    """PeftModel(labels=...).loss.backward() against torch's own loss of the polynomial model; the last two sequences count nothing."""
    run = Run(make_lab, num_hidden_layers=1, num_labels=num_labels)
    lab, n = run.lab, run.lab.packing.sequences
    classes = torch.arange(n) % 2
    targets = classes if num_labels == 2 else lab.random(n)
    kept = slice(0, n - 2)
    run.plain.zero_grad()
    run.plain(embedding_output=run.embeddings[kept], attention_mask=run.mask[kept], labels=targets[kept]).loss.backward()
    weights = torch.tensor([1.0 / (n - 2)] * (n - 2) + [0.0] * 2, dtype=torch.float64)
    loss = CrossEntropy(2, bound=8.0, degree=31) if num_labels == 2 else MeanSquaredError()
    values = F.one_hot(classes, 2).double() if num_labels == 2 else targets[:, None]
    labels = encrypted_labels(lab, values, weights, dtype=torch.int64 if num_labels == 2 else torch.float32, loss=loss)
    found = run.model(embedding_output=lab.encrypt(run.embeddings), attention_mask=lab.encrypt_mask(run.mask.double()), labels=labels)
    assert found.loss.shape == () and found.logits.shape == (n, num_labels)
    found.loss.backward()
    run.expected = {name: p.grad for name, p in run.plain.named_parameters() if p.requires_grad}
    run.check()


def test_dropout_in_training_is_refused(make_lab):
    run = Run(make_lab, num_hidden_layers=1)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    run.model.train()
    with pytest.raises(UnsupportedEncryptedOperation, match="dropout probabilities to 0"):
        run.forward()
