"""States through linear layers, norms, activations, sums, products and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hf_he import nn as he_nn
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import activation, arithmetic, norm, reduce
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand
from hf_he.tensor import HIDDEN, EncryptedTensor, handler, state_operand, state_tensor, unsupported


def _like(operand: Operand, ciphertext: Ciphertext) -> EncryptedTensor:
    return state_tensor(Operand(operand.context, operand.features, ciphertext, operand.pooled))


@handler(F.linear)
def _linear(input: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> EncryptedTensor:
    if isinstance(weight, EncryptedTensor) or isinstance(bias, EncryptedTensor):
        raise unsupported(F.linear, " with encrypted weights yet: decrypt the adapter on the client and load it in the clear")
    source = state_operand(input, F.linear)
    if weight.shape[1] != source.features:
        raise ShapeError(f"a weight of shape {tuple(weight.shape)} does not fit an encrypted tensor of {source.features} features")
    return state_tensor(WaitingLinear(source, weight, bias))


@handler(he_nn.layer_norm)
def _layer_norm(hidden_states: Any, module: he_nn.HELayerNorm) -> EncryptedTensor:
    operand = state_operand(hidden_states, he_nn.layer_norm)
    if module.approximation is None:
        raise unsupported(he_nn.layer_norm, " in exact mode: call model.set_mode('polynomial') first")
    levels = operand.context.levels(module)
    return state_tensor(norm.WaitingNorm(operand, module.weight, module.bias, module.eps, module.approximation, levels))


@handler(he_nn.activation)
def _activation(hidden_states: Any, module: he_nn.PolynomialActivation) -> EncryptedTensor:
    operand = state_operand(hidden_states, he_nn.activation)
    if module.approximation is None:
        raise unsupported(he_nn.activation, " in exact mode: call model.set_mode('polynomial') first")
    levels = operand.context.levels(module) or activation.DEFAULT_LEVELS
    return _like(operand, activation.encrypted(operand.context, operand, module.approximation, levels))


@handler(torch.add, torch.Tensor.add)
def _add(a: Any, b: Any, *, alpha: float = 1) -> EncryptedTensor:
    if alpha != 1:
        raise unsupported(torch.add, " with alpha")
    return _binary(torch.add, a, b, arithmetic.WaitingSum, arithmetic.add_number)


@handler(torch.mul, torch.Tensor.mul)
def _multiply(a: Any, b: Any) -> EncryptedTensor:
    return _binary(torch.mul, a, b, arithmetic.multiply, arithmetic.multiply_number)


def _binary(func: Callable, a: Any, b: Any, pair: Callable, number: Callable) -> EncryptedTensor:
    if isinstance(a, EncryptedTensor) and isinstance(b, EncryptedTensor):
        x, y = state_operand(a, func), state_operand(b, func)
        if a.shape != b.shape or x.context is not y.context:
            raise ShapeError(f"{func.__name__} needs encrypted tensors of one shape and session, got {tuple(a.shape)} and {tuple(b.shape)}")
        return state_tensor(pair(x, y))
    if isinstance(b, EncryptedTensor):
        a, b = b, a
    if isinstance(b, (int, float)) or (isinstance(b, torch.Tensor) and b.ndim == 0):
        operand = state_operand(a, func)
        return _like(operand, number(operand.context, operand, float(b)))
    raise unsupported(func, " with a plaintext tensor: only numbers and encrypted tensors of the same shape")


@handler(torch.Tensor.__getitem__)
def _index(tensor: EncryptedTensor, index: Any) -> EncryptedTensor:
    if tensor.kind != HIDDEN or not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None) or index[1] != 0:
        raise unsupported(torch.Tensor.__getitem__, f" with index {index!r}: only the first token, hidden_states[:, 0]")
    return state_tensor(reduce.WaitingToken(tensor.operand))


@handler(F.dropout)
def _dropout(input: EncryptedTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> EncryptedTensor:
    if training and p:
        raise unsupported(F.dropout, " while training: call model.eval()")
    return input


for _name, _operation in (("add", _add), ("radd", _add), ("mul", _multiply), ("rmul", _multiply)):
    setattr(EncryptedTensor, f"__{_name}__", _operation)
