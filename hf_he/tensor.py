"""EncryptedTensor: a torch.Tensor without values, standing for ciphertexts, that flows through unmodified transformers models.

It takes over linear layers, `hf_he.nn.layer_norm`, `hf_he.nn.activation`, Gaussian-kernel attention, sums and products, the reshapes around
attention heads, and the first token. Everything else raises UnsupportedEncryptedOperation: nothing is decrypted, nothing falls back.

    session = EncryptedSession(backend, packing, ClientRefresh(callback))
    hidden = session.hidden_state(embeddings_ciphertext)
    mask = session.attention_mask(mask_ciphertext)
    logits = model(embedding_output=hidden, attention_mask=mask).logits.ciphertext
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import resolve_name

from hf_he import nn as he_nn
from hf_he.approximation import KernelExponential
from hf_he.attention import gaussian_kernel_attention, power_softmax_attention
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError, UnsupportedEncryptedOperation
from hf_he.ops import activation, arithmetic, attention, norm, reduce, required_rotations
from hf_he.ops.context import OperationContext
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand

__all__ = ["EncryptedSession", "EncryptedTensor", "required_rotations"]

HIDDEN, POOLED, SPLIT, HEADS, MASK = "hidden state", "pooled state", "split heads", "attention heads", "attention mask"


class EncryptedTensor(torch.Tensor):
    """Logical shape [B, T, F] (a hidden state), [B, F] (its first token), [B, T, heads, head_dim] and [B, heads, T, head_dim] (the same
    ciphertexts, split into heads) or [B, 1, T, T] (an attention mask), B being the packing's sequences."""

    operand: Operand
    kind: str

    @staticmethod
    def __new__(cls, operand: Operand, shape: tuple[int, ...], kind: str) -> EncryptedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device="cpu", requires_grad=False)
        tensor.operand = operand
        tensor.kind = kind
        return tensor

    def __init__(self, operand: Operand, shape: tuple[int, ...], kind: str) -> None:
        pass

    @property
    def ciphertext(self) -> Ciphertext:
        """The batched ciphertext [blocks]; computes a linear map that was still waiting."""
        return self.operand.ciphertext

    @property
    def session(self) -> OperationContext:
        return self.operand.context

    @property
    def level(self) -> int:
        return self.operand.level

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return f"EncryptedTensor({self.kind} {tuple(self.shape)}, level {self.level}, {self.session.backend.name})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is None:
            raise _unsupported(func)
        return handler(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        raise _unsupported(func)


class EncryptedSession(OperationContext):
    """Backend, packing and refresh policy of one server; makes EncryptedTensors out of the ciphertexts it receives."""

    def hidden_state(self, ciphertext: Ciphertext, features: int | None = None) -> EncryptedTensor:
        """[blocks] ciphertexts from `pack_embeddings` as a hidden state [B, T, features] (default: all features of the blocks)."""
        features = ciphertext.count * self.packing.features if features is None else features
        if ciphertext.batch_shape != (self.packing.blocks(features),):
            raise ShapeError(f"a state of {features} features is {self.packing.blocks(features)} ciphertexts, got a batch of {ciphertext.batch_shape}")
        return _hidden(Operand(self, features, ciphertext))

    def attention_mask(self, ciphertext: Ciphertext) -> EncryptedTensor:
        """[1] ciphertext from `pack_attention_mask` as a mask [B, 1, T, T]."""
        packing = self.packing
        if ciphertext.batch_shape != (1,):
            raise ShapeError(f"an attention mask is a batch of one ciphertext, got a batch of {ciphertext.batch_shape}")
        return EncryptedTensor(Operand(self, packing.features, ciphertext), (packing.sequences, 1, packing.tokens, packing.tokens), MASK)


def _hidden(operand: Operand) -> EncryptedTensor:
    packing = operand.context.packing
    if operand.pooled:
        return EncryptedTensor(operand, (packing.sequences, operand.features), POOLED)
    return EncryptedTensor(operand, (packing.sequences, packing.tokens, operand.features), HIDDEN)


def _unsupported(func: Any, why: str = "") -> UnsupportedEncryptedOperation:
    name = resolve_name(func) or getattr(func, "__qualname__", None) or str(func)
    return UnsupportedEncryptedOperation(f"{name} has no encrypted form{why or ': use an HE model (hf_he.models), whose operations all have one'}")


def _state(tensor: Any, func: Callable) -> Operand:
    """The operand of a hidden or pooled state; anything else cannot be an input of `func`."""
    if not isinstance(tensor, EncryptedTensor):
        raise _unsupported(func, " with a plaintext tensor here: encrypt it first")
    if tensor.kind not in (HIDDEN, POOLED):
        raise _unsupported(func, f" on {tensor.kind}: it takes a state [B, T, F] or [B, F]")
    return tensor.operand


def _like(operand: Operand, ciphertext: Ciphertext) -> EncryptedTensor:
    return _hidden(Operand(operand.context, operand.features, ciphertext, operand.pooled))


def _linear(input: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> EncryptedTensor:
    if isinstance(weight, EncryptedTensor) or isinstance(bias, EncryptedTensor):
        raise _unsupported(F.linear, " with encrypted weights yet: decrypt the adapter on the client and load it in the clear")
    source = _state(input, F.linear)
    if weight.shape[1] != source.features:
        raise ShapeError(f"a weight of shape {tuple(weight.shape)} does not fit an encrypted tensor of {source.features} features")
    return _hidden(WaitingLinear(source, weight, bias))


def _layer_norm(hidden_states: Any, module: he_nn.HELayerNorm) -> EncryptedTensor:
    operand = _state(hidden_states, he_nn.layer_norm)
    if module.approximation is None:
        raise _unsupported(he_nn.layer_norm, " in exact mode: call model.set_mode('polynomial') first")
    levels = operand.context.levels(module)
    return _hidden(norm.WaitingNorm(operand, module.weight, module.bias, module.eps, module.approximation, levels))


def _activation(hidden_states: Any, module: he_nn.PolynomialActivation) -> EncryptedTensor:
    operand = _state(hidden_states, he_nn.activation)
    if module.approximation is None:
        raise _unsupported(he_nn.activation, " in exact mode: call model.set_mode('polynomial') first")
    levels = operand.context.levels(module) or activation.DEFAULT_LEVELS
    return _like(operand, activation.encrypted(operand.context, operand, module.approximation, levels))


def _attention(
    module: torch.nn.Module,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[EncryptedTensor, None]:
    name = gaussian_kernel_attention
    approximation = getattr(module, "kernel_approximation", None)
    if not isinstance(approximation, KernelExponential):
        raise _unsupported(name, " in exact mode: call model.set_mode('polynomial') first")
    if dropout or module.training:
        raise _unsupported(name, " while training: call model.eval()")
    if getattr(module, "is_causal", False):
        raise _unsupported(name, " in a causal model yet: only bidirectional attention has one")
    for tensor in (query, key, value):
        if not isinstance(tensor, EncryptedTensor) or tensor.kind != HEADS:
            raise _unsupported(name, " of anything but encrypted queries, keys and values [B, heads, T, head_dim]")
    if attention_mask is not None and (not isinstance(attention_mask, EncryptedTensor) or attention_mask.kind != MASK):
        raise _unsupported(name, " with a plaintext mask: make it with session.attention_mask(ciphertext)")
    batch, heads, tokens, head_dim = query.shape
    if key.shape != query.shape:
        raise _unsupported(name, " with grouped keys and values yet")
    context = query.session
    mask = None if attention_mask is None else attention_mask.ciphertext
    scaling = head_dim**-0.5 if scaling is None else scaling
    levels = context.levels(module) or attention.DEFAULT_LEVELS
    out = attention.encrypted(context, query.operand, key.operand, value.operand, mask, heads, scaling, approximation, levels)
    return EncryptedTensor(Operand(context, heads * head_dim, out), (batch, tokens, heads, head_dim), SPLIT), None


def _power_softmax(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise _unsupported(power_softmax_attention, " yet: convert the model to attention_kernel='gaussian_kernel'")


def _add(a: Any, b: Any, *, alpha: float = 1) -> EncryptedTensor:
    if alpha != 1:
        raise _unsupported(torch.add, " with alpha")
    return _binary(torch.add, a, b, arithmetic.WaitingSum, arithmetic.add_number)


def _multiply(a: Any, b: Any) -> EncryptedTensor:
    return _binary(torch.mul, a, b, arithmetic.multiply, arithmetic.multiply_number)


def _binary(func: Callable, a: Any, b: Any, pair: Callable, number: Callable) -> EncryptedTensor:
    if isinstance(a, EncryptedTensor) and isinstance(b, EncryptedTensor):
        x, y = _state(a, func), _state(b, func)
        if a.shape != b.shape or x.context is not y.context:
            raise ShapeError(f"{func.__name__} needs encrypted tensors of one shape and session, got {tuple(a.shape)} and {tuple(b.shape)}")
        return _hidden(pair(x, y))
    if isinstance(b, EncryptedTensor):
        a, b = b, a
    if isinstance(b, (int, float)) or (isinstance(b, torch.Tensor) and b.ndim == 0):
        operand = _state(a, func)
        return _like(operand, number(operand.context, operand, float(b)))
    raise _unsupported(func, " with a plaintext tensor: only numbers and encrypted tensors of the same shape")


def _reshape(tensor: EncryptedTensor, *shape: Any) -> EncryptedTensor:
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    total = tensor.shape.numel()
    if sizes.count(-1) == 1:
        known = -int(torch.tensor(sizes).prod())
        sizes[sizes.index(-1)] = total // known if known else 0
    packing, features = tensor.session.packing, tensor.operand.features
    if tuple(sizes) == tuple(tensor.shape):
        return tensor
    if tensor.kind in (HIDDEN, SPLIT) and sizes[:2] == [packing.sequences, packing.tokens] and torch.Size(sizes).numel() == total:
        if len(sizes) == 4:
            return EncryptedTensor(tensor.operand, tuple(sizes), SPLIT)
        if sizes[2:] == [features]:
            return _hidden(tensor.operand)
    raise _unsupported(torch.Tensor.reshape, f" from {tuple(tensor.shape)} to {tuple(sizes)}: only heads can be split and merged")


def _transpose(tensor: EncryptedTensor, dim0: int, dim1: int) -> EncryptedTensor:
    if tensor.kind not in (SPLIT, HEADS) or {dim0 % 4, dim1 % 4} != {1, 2}:
        raise _unsupported(torch.Tensor.transpose, f"({dim0}, {dim1}) on {tensor.kind}: only tokens and heads can be swapped")
    batch, first, second, width = tensor.shape
    return EncryptedTensor(tensor.operand, (batch, second, first, width), HEADS if tensor.kind == SPLIT else SPLIT)


def _index(tensor: EncryptedTensor, index: Any) -> EncryptedTensor:
    if tensor.kind != HIDDEN or not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None) or index[1] != 0:
        raise _unsupported(torch.Tensor.__getitem__, f" with index {index!r}: only the first token, hidden_states[:, 0]")
    return _hidden(reduce.WaitingToken(tensor.operand))


def _dropout(input: EncryptedTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> EncryptedTensor:
    if training and p:
        raise _unsupported(F.dropout, " while training: call model.eval()")
    return input


def _same(tensor: EncryptedTensor, **kwargs: Any) -> EncryptedTensor:
    return tensor


def _to(tensor: EncryptedTensor, *args: Any, **kwargs: Any) -> EncryptedTensor:
    if any(target not in (tensor.dtype, tensor.device, "cpu") for target in (*args, *kwargs.values())):
        raise _unsupported(torch.Tensor.to, ": it stays float32 on the CPU; load the model in float32")
    return tensor


_METADATA = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.grad_fn.__get__,
    torch.Tensor.is_floating_point,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
}

_HANDLERS: dict[Any, Callable] = {
    F.linear: _linear,
    F.dropout: _dropout,
    he_nn.layer_norm: _layer_norm,
    he_nn.activation: _activation,
    gaussian_kernel_attention: _attention,
    power_softmax_attention: _power_softmax,
    torch.add: _add,
    torch.Tensor.add: _add,
    torch.mul: _multiply,
    torch.Tensor.mul: _multiply,
    torch.Tensor.view: _reshape,
    torch.Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    torch.Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    torch.Tensor.__getitem__: _index,
    torch.Tensor.contiguous: _same,
    torch.Tensor.to: _to,
}


# torch's own operators turn a TypeError of __torch_function__ into NotImplemented, which would lose the reason.
# fmt: off
_REFUSED_OPERATORS = [
    "sub", "rsub", "isub", "truediv", "rtruediv", "itruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul",
    "and", "rand", "or", "ror", "xor", "rxor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert",
    "iadd", "imul", "bool", "float", "int", "index", "len", "iter", "contains", "setitem",
]
# fmt: on


def _refusal(name: str) -> Callable:
    def operator(self: EncryptedTensor, *args: Any) -> Any:
        raise _unsupported(operator)

    operator.__qualname__ = operator.__name__ = f"torch.Tensor.__{name}__"
    return operator


for _name in _REFUSED_OPERATORS:
    setattr(EncryptedTensor, f"__{_name}__", _refusal(_name))
for _name, _operation in (("add", _add), ("radd", _add), ("mul", _multiply), ("rmul", _multiply)):
    setattr(EncryptedTensor, f"__{_name}__", _operation)
