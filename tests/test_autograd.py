"""Gradients of every encrypted operation and of whole models with PEFT LoRA against torch's autograd of the polynomial model."""

import copy

import pytest
import torch
from encrypted_adapter import adapted, decrypted, install, leaf, relative_error
from test_tensor import TOKENS, calibrated, inputs, small_model
from torch import nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from hf_he import nn as he_nn
from hf_he.approximation import kernel_exponential
from hf_he.attention import gaussian_kernel_attention
from hf_he.autograd import Loss
from hf_he.errors import ParameterError, ShapeError, UnsupportedEncryptedOperation
from hf_he.finetuning.loss import CrossEntropy, MeanSquaredError
from hf_he.ops.operand import Operand
from hf_he.tensor import EncryptedSession, handler, required_rotations, state_tensor

TOLERANCE = 1e-3


def encrypted_gradient(lab, values: torch.Tensor, pooled: bool):
    """Upstream gradients [B, T, F], or [B, F] of pooled states."""
    if not pooled:
        return lab.encrypt(values)
    spread = torch.zeros(lab.packing.sequences, lab.packing.tokens, values.shape[-1], dtype=torch.float64)
    spread[:, 0] = values
    return state_tensor(Operand(lab.session, values.shape[-1], lab.encrypt(spread).ciphertext, pooled=True))


def check(lab, function, *values, level=None, tolerance=TOLERANCE):
    """`function` of encrypted states [B, T, F], trained matrices [out, in] and vectors [features]: gradients of all of them."""
    plain = [value.clone().requires_grad_() for value in values]
    states = [lab.encrypt(value, level).requires_grad_() if value.ndim == 3 else leaf(lab, value) for value in values]
    expected, found = function(*plain), function(*states)
    assert found.shape == expected.shape
    upstream = lab.random(*expected.shape)
    expected.backward(upstream)
    torch.autograd.backward([found], [encrypted_gradient(lab, upstream, expected.ndim == 2)])
    for tensor, state in zip(plain, states, strict=True):
        if tensor.ndim == 3:
            gradient = lab.decrypt(state.grad.ciphertext, tensor.shape[-1]).numpy()
            assert abs(state.grad.ciphertext.scale / lab.backend.parameters.scale_at(state.grad.level) - 1) < 1e-9
        else:
            gradient = decrypted(lab, state.grad)
            assert state.grad.level >= 1
        assert relative_error(gradient, tensor.grad) <= tolerance


def in_polynomial_mode(module, entry):
    module.layer_name = "layer"
    module.configure("polynomial", entry)
    return module.double()


def norm(degree=15, newton_steps=1):
    module = in_polynomial_mode(he_nn.HELayerNorm(16), {"interval": [0.05, 6.0], "degree": degree, "newton_steps": newton_steps})
    with torch.no_grad():
        module.weight.uniform_(-1.0, 2.0)
        module.bias.normal_()
    return module


def activation(name="gelu", bound=8.0):
    return in_polynomial_mode(he_nn.PolynomialActivation(name), {"interval": [-bound, bound], "degree": 15})


# ---- operations ----


@pytest.mark.parametrize("out_features", [16, 64, 8])
@pytest.mark.parametrize("level", [7, 2, 0])
def test_linear(lab, out_features, level):
    weight, bias = lab.random(out_features, 16), lab.random(out_features)
    check(lab, lambda x: F.linear(x, weight, bias), lab.states(), level=level)


def test_narrowing_linear(lab):
    weight = lab.random(16, 40)
    check(lab, lambda x: F.linear(x, weight), lab.states(40))


def test_sums_products_and_numbers(lab):
    check(lab, lambda x, y: x + y, lab.states(), lab.states())
    check(lab, lambda x, y: x * y, lab.states(40), lab.states(40))
    check(lab, lambda x: x * x + x, lab.states())
    check(lab, lambda x: 0.5 * x + 1.0, lab.states())


def test_a_product_with_one_takes_no_level(lab):
    x = lab.encrypt(lab.states())
    assert x * 1.0 is x and 1 * x is x


@pytest.mark.parametrize("level", [7, 1])
@pytest.mark.parametrize("name", ["gelu", "tanh", "silu"])
def test_activation(lab, name, level):
    module = activation(name)
    check(lab, module, lab.states(40), level=level)


@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_feed_forward(lab, policy):
    lab.session.activations = policy
    first, bias, second, module = lab.random(64, 16) / 4, lab.random(64), lab.random(16, 64) / 8, activation()
    check(lab, lambda x: F.linear(module(F.linear(x, first, bias)), second), lab.states())


def test_gated_feed_forward(lab):
    gate, up, down, module = lab.random(40, 16) / 4, lab.random(40, 16) / 4, lab.random(16, 40) / 6, activation("silu")
    check(lab, lambda x: F.linear(module(F.linear(x, gate)) * F.linear(x, up), down), lab.states())


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize(("degree", "newton_steps"), [(15, 0), (7, 1), (15, 1), (5, 2)])
@pytest.mark.parametrize("level", [7, 3])
def test_layer_norm(lab, policy, degree, newton_steps, level):
    lab.session.activations = policy
    check(lab, norm(degree, newton_steps), lab.states(), level=level)


def test_norm_of_a_residual_sum(lab):
    module, weight = norm(), lab.random(16, 16) / 8
    check(lab, lambda x: F.linear(module(F.linear(x, weight) + x), weight), lab.states())


def test_first_token_and_pooler(lab):
    weight, module = lab.random(16, 16) / 4, activation("tanh")
    check(lab, lambda x: x[:, 0], lab.states())
    check(lab, lambda x: module(F.linear(x[:, 0], weight)), lab.states())


def test_heads(lab):
    def split_and_merge(x):
        return x.view(8, 8, 2, 8).transpose(1, 2).transpose(1, 2).reshape(8, 8, 16)

    check(lab, split_and_merge, lab.states())


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("shared", [False, True])
def test_attention(lab, policy, shared):
    lab.session.activations = policy
    module = nn.Module()
    module.is_causal, module.layer_name = False, "attention"
    module.kernel_approximation = kernel_exponential((-40.0, 0.0), 6)
    module.eval()
    kept = (torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (lab.packing.sequences, 1))).double()
    pairs = kept[:, None, None, :].expand(-1, 1, TOKENS, -1)

    def attend(q, k, v):
        mask = lab.encrypt_mask(kept) if isinstance(q, type(lab.encrypt(lab.states()))) else pairs
        heads = [x.view(8, 8, 2, 8).transpose(1, 2) for x in (q, k, v)]
        return gaussian_kernel_attention(module, *heads, mask)[0].reshape(8, 8, 16)

    if shared:
        check(lab, lambda x: attend(x, x, x), lab.states())
    else:
        check(lab, attend, lab.states(), lab.states(), lab.states())


# ---- encrypted weights ----


@pytest.mark.parametrize("shape", [(2, 16), (16, 2), (2, 40), (40, 3), (16, 16), (64, 16)])
@pytest.mark.parametrize("level", [7, 2])
def test_encrypted_weights(lab, shape, level):
    check(lab, F.linear, lab.states(shape[1]), lab.random(*shape), level=level)


@pytest.mark.parametrize("out_features", [16, 40])
@pytest.mark.parametrize("level", [7, 3, 0])
def test_low_rank_adapter(lab, out_features, level):
    weight, module = lab.random(out_features, 16), activation(bound=40.0)

    def adapter(x, a, b):
        return module(F.linear(x, weight) + F.linear(F.linear(x, a), b))

    check(lab, adapter, lab.states(), lab.random(2, 16), lab.random(out_features, 2), level=level)


def test_biases(lab):
    check(lab, F.linear, lab.states(), lab.random(3, 16), lab.random(3))
    check(lab, lambda x, w, b: F.linear(x[:, 0], w, b), lab.states(), lab.random(3, 16), lab.random(3))
    weight = lab.random(40, 16)
    check(lab, lambda x, b: F.linear(x, weight, b), lab.states(), lab.random(40))


def test_deep_head(lab):
    module = activation("tanh", bound=20.0)
    shapes = [(8, 16), (8,), (32, 8), (32,), (3, 32), (3,)]

    def head(x, a, b, c, d, e, f):
        return F.linear(module(F.linear(F.linear(x[:, 0], a, b), c, d)), e, f)

    check(lab, head, lab.states(), *(lab.random(*shape) / 4 for shape in shapes))


def test_shapes_of_encrypted_weights_are_checked(lab):
    ciphertext = leaf(lab, lab.random(2, 16)).ciphertext
    with pytest.raises(ShapeError, match="3 ciphertexts"):
        lab.session.weight(ciphertext, (3, 16))
    with pytest.raises(ShapeError, match="bias of 3 features"):
        lab.session.bias(ciphertext, 3)
    with pytest.raises(ShapeError, match="16 features"):
        F.linear(lab.encrypt(lab.states()), leaf(lab, lab.random(2, 40)))
    with pytest.raises(UnsupportedEncryptedOperation, match=r"session\.bias"):
        F.linear(lab.encrypt(lab.states()), leaf(lab, lab.random(2, 16)), torch.zeros(2))


# ---- whole models ----


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

    def check(self, tolerance=TOLERANCE, factor=1.0):
        assert len(self.leaves) == len(self.expected) > 2
        for name, weight in self.leaves.items():
            assert relative_error(decrypted(self.lab, weight.grad), factor * self.expected[name]) <= tolerance, name


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("layers", [1, 2])
def test_whole_model(make_lab, policy, layers):
    run = Run(make_lab, policy, num_hidden_layers=layers)
    logits = run.forward()
    torch.testing.assert_close(run.lab.decrypt(logits.ciphertext, 2)[:, 0], run.logits.detach(), atol=1e-5, rtol=0)
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
    torch.testing.assert_close(run.lab.decrypt(logits.ciphertext, 2)[:, 0], run.logits.detach(), atol=1e-5, rtol=0)


def test_native_gradients(make_lab):
    run = Run(make_lab, backend="native", num_hidden_layers=1, intermediate_size=16)
    run.backward(run.forward())
    run.check(tolerance=1e-2)


# ---- loss and engine ----


def half_squares(context, logits, labels):
    """Gradient of weights / 2 (logits - targets)^2."""
    backend = context.backend
    ct, targets, weights = context.ensure_levels([(logits.ciphertext, 2), (labels.one_hot, 2), (labels.weights, 2)])
    difference = backend.subtract(backend.match_level(ct, 2), backend.match_level(targets, 2))
    return Operand(context, logits.features, context.product(difference, backend.match_level(weights, 2)), pooled=True)


def encrypted_labels(lab, targets, weights, **settings):
    """[B, labels] targets and [B] weights."""
    slots = [torch.zeros(lab.packing.sequences, lab.packing.tokens, targets.shape[1], dtype=torch.float64) for _ in range(2)]
    slots[0][:, 0], slots[1][:, 0] = targets, weights[:, None]
    return lab.session.labels(*(lab.encrypt(values).ciphertext for values in slots), targets.shape[1], **settings)


def test_a_loss_without_value(lab):
    values, weight = lab.states(), lab.random(3, 16)
    targets, sequences = lab.random(8, 3), torch.tensor([1.0] * 6 + [0.0] * 2, dtype=torch.float64)
    plain = weight.clone().requires_grad_()
    (0.5 * sequences[:, None] * (F.linear(values[:, 0], plain) - targets).square()).sum().backward()
    trained, labels = leaf(lab, weight), encrypted_labels(lab, targets, sequences, dtype=torch.float32)
    loss = Loss.apply(F.linear(lab.encrypt(values)[:, 0], trained), labels, half_squares)
    assert loss.shape == () and loss.requires_grad and "loss" in repr(loss)
    loss.backward()
    assert relative_error(decrypted(lab, trained.grad), plain.grad) <= TOLERANCE


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


def test_a_loss_without_its_polynomials_is_refused(lab):
    labels = encrypted_labels(lab, lab.random(8, 2), torch.ones(8, dtype=torch.float64))
    logits = F.linear(lab.encrypt(lab.states())[:, 0], leaf(lab, lab.random(2, 16)))
    with pytest.raises(UnsupportedEncryptedOperation, match=r"give session\.labels a loss"):
        F.cross_entropy(logits, labels)
    with pytest.raises(UnsupportedEncryptedOperation, match="of these labels"):
        F.mse_loss(logits, labels)
    with pytest.raises(UnsupportedEncryptedOperation, match="of these labels"):
        F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(UnsupportedEncryptedOperation, match="label smoothing"):
        F.cross_entropy(logits, labels, label_smoothing=0.1)


def test_labels(lab):
    labels = encrypted_labels(lab, lab.random(8, 3), torch.ones(8, dtype=torch.float64))
    assert labels.shape == (8,) and labels.dtype == torch.int64 and labels.view(-1) is labels
    numbers = encrypted_labels(lab, lab.random(8, 1), torch.ones(8, dtype=torch.float64), dtype=torch.float32)
    assert numbers.shape == (8, 1) and numbers.squeeze().shape == (8,) and numbers.is_floating_point()
    with pytest.raises(ShapeError, match="at most 16 features"):
        lab.session.labels(labels.operand.one_hot, labels.operand.weights, 17)


def test_only_a_loss_starts_without_a_gradient(lab):
    x = lab.encrypt(lab.states()).requires_grad_()
    with pytest.raises(RuntimeError, match="scalar outputs"):
        (x + x).backward()


def test_what_has_no_backward_is_refused(lab):
    def negative(tensor):
        return tensor

    @handler(negative)
    def _negative(tensor):
        return lab.session.hidden_state(lab.backend.negate(tensor.ciphertext))

    x = lab.encrypt(lab.states())
    assert handle_torch_function(negative, (x,), x).shape == x.shape
    x.requires_grad_()
    with pytest.raises(UnsupportedEncryptedOperation, match="differentiated"):
        handle_torch_function(negative, (x,), x)
    with torch.no_grad():
        assert handle_torch_function(negative, (x,), x).shape == x.shape


def test_dropout_in_training_is_refused(make_lab):
    run = Run(make_lab, num_hidden_layers=1)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    run.model.train()
    with pytest.raises(UnsupportedEncryptedOperation, match="dropout probabilities to 0"):
        run.forward()


def test_policies_are_checked(lab):
    with pytest.raises(ParameterError, match="keep or recompute"):
        EncryptedSession(lab.backend, lab.packing, activations="none")
