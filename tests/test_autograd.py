"""Gradients of every encrypted operation against torch's autograd of the polynomials."""

import pytest
import torch
from encrypted_adapter import decrypted, leaf, relative_error
from gradients import TOLERANCE, check, encrypted_labels, in_polynomial_mode
from test_tensor import TOKENS
from torch import nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function

from hf_he import nn as he_nn
from hf_he import ops
from hf_he.approximation import kernel_exponential
from hf_he.attention import gaussian_kernel_attention
from hf_he.autograd import Loss
from hf_he.errors import ParameterError, ShapeError, UnsupportedEncryptedOperation
from hf_he.ops.operand import Operand
from hf_he.tensor import EncryptedSession, handler


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


def test_wide_activations_in_pieces(lab, monkeypatch):
    monkeypatch.setattr(ops.activation, "LARGEST_BATCH", 2)
    widths, evaluate = [], ops.polynomial.evaluate
    monkeypatch.setattr(ops.polynomial, "evaluate", lambda backend, ct, coefficients: widths.append(ct.count) or evaluate(backend, ct, coefficients))
    check(lab, activation(), lab.states(96))
    assert max(widths) == 2 and sum(widths) == 2 * 96 // 16


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


# ---- loss and engine ----


def half_squares(context, logits, labels):
    """Gradient of weights / 2 (logits - targets)^2."""
    backend = context.backend
    ct, targets, weights = context.ensure_levels([(logits.ciphertext, 2), (labels.one_hot, 2), (labels.weights, 2)])
    difference = backend.subtract(backend.match_level(ct, 2), backend.match_level(targets, 2))
    return Operand(context, logits.features, context.product(difference, backend.match_level(weights, 2)), pooled=True)


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


def test_policies_are_checked(lab):
    with pytest.raises(ParameterError, match="keep or recompute"):
        EncryptedSession(lab.backend, lab.packing, activations="none")
