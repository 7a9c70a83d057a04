"""States through linear layers, norms, activations, sums, products and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hf_he import autograd
from hf_he import nn as he_nn
from hf_he.errors import ShapeError
from hf_he.ops import activation
from hf_he.tensor import HIDDEN, EncryptedTensor, handler, state_operand, unsupported


@handler(F.linear)
def _linear(input: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> EncryptedTensor:
    source = state_operand(input, F.linear)
    if weight.shape[1] != source.features:
        raise ShapeError(f"a weight of shape {tuple(weight.shape)} does not fit an encrypted tensor of {source.features} features")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(f"a bias of shape {tuple(bias.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    if not isinstance(weight, EncryptedTensor) and not isinstance(bias, EncryptedTensor):
        return autograd.call(autograd.Linear, input, (weight, bias))
    if bias is not None and not isinstance(bias, EncryptedTensor):
        raise unsupported(F.linear, " with an encrypted weight and a plaintext bias: make the bias with session.bias(ciphertext, features)")
    if isinstance(weight, EncryptedTensor):
        out = autograd.call(autograd.EncryptedLinear, input, weight)
    else:
        out = autograd.call(autograd.Linear, input, (weight, None))
    return out if bias is None else autograd.call(autograd.AddBias, out, bias)


@handler(he_nn.layer_norm)
def _layer_norm(hidden_states: Any, module: he_nn.HELayerNorm) -> EncryptedTensor:
    operand = state_operand(hidden_states, he_nn.layer_norm)
    if module.approximation is None:
        raise unsupported(he_nn.layer_norm, " in exact mode: call model.set_mode('polynomial') first")
    layer = (module.weight, module.bias, module.eps, module.approximation, operand.context.levels(module), True)
    return autograd.call(autograd.Norm, hidden_states, layer)


@handler(he_nn.activation)
def _activation(hidden_states: Any, module: he_nn.PolynomialActivation) -> EncryptedTensor:
    operand = state_operand(hidden_states, he_nn.activation)
    if module.approximation is None:
        raise unsupported(he_nn.activation, " in exact mode: call model.set_mode('polynomial') first")
    levels = operand.context.levels(module) or activation.DEFAULT_LEVELS
    return autograd.call(autograd.Activation, hidden_states, module.approximation, levels)


@handler(torch.add, torch.Tensor.add)
def _add(a: Any, b: Any, *, alpha: float = 1) -> EncryptedTensor:
    if alpha != 1:
        raise unsupported(torch.add, " with alpha")
    return _binary(torch.add, a, b, autograd.Sum, autograd.AddNumber)


@handler(torch.mul, torch.Tensor.mul)
def _multiply(a: Any, b: Any) -> EncryptedTensor:
    for tensor, number in ((a, b), (b, a)):
        if isinstance(number, (int, float)) and number == 1:
            return tensor
    return _binary(torch.mul, a, b, autograd.Product, autograd.MultiplyNumber)


def _binary(func: Callable, a: Any, b: Any, pair: type, number: type) -> EncryptedTensor:
    if isinstance(a, EncryptedTensor) and isinstance(b, EncryptedTensor):
        x, y = state_operand(a, func), state_operand(b, func)
        if a.shape != b.shape or x.context is not y.context:
            raise ShapeError(f"{func.__name__} needs encrypted tensors of one shape and session, got {tuple(a.shape)} and {tuple(b.shape)}")
        return autograd.call(pair, a, b)
    if isinstance(b, EncryptedTensor):
        a, b = b, a
    if isinstance(b, (int, float)) or (isinstance(b, torch.Tensor) and b.ndim == 0):
        state_operand(a, func)
        return autograd.call(number, a, float(b))
    raise unsupported(func, " with a plaintext tensor: only numbers and encrypted tensors of the same shape")


@handler(torch.Tensor.__getitem__)
def _index(tensor: EncryptedTensor, index: Any) -> EncryptedTensor:
    if tensor.kind == HIDDEN and isinstance(index, tuple) and all(i in (slice(None), slice(0, None)) for i in index):
        return tensor
    if tensor.kind != HIDDEN or not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None) or index[1] != 0:
        raise unsupported(
            torch.Tensor.__getitem__,
            f" with index {index!r}: only all tokens (logits of all positions cost what those of one do) or the first, hidden_states[:, 0]",
        )
    return autograd.call(autograd.FirstToken, tensor)


@handler(F.dropout)
def _dropout(input: EncryptedTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> EncryptedTensor:
    if training and p:
        raise unsupported(F.dropout, " while training: set the model's dropout probabilities to 0, or call model.eval()")
    return input


for _name, _operation in (("add", _add), ("radd", _add), ("mul", _multiply), ("rmul", _multiply)):
    setattr(EncryptedTensor, f"__{_name}__", _operation)
