"""EncryptedTensor: a torch.Tensor without values, standing for ciphertexts, that flows through unmodified transformers models.

Functions with an encrypted form have a handler (`hf_he.handlers`): linear layers, `hf_he.nn.layer_norm`, `hf_he.nn.activation`, Gaussian-kernel
attention, sums and products, the reshapes around attention heads, the first token. Everything else raises UnsupportedEncryptedOperation:
nothing is decrypted, nothing falls back.

    session = EncryptedSession(backend, packing, ClientRefresh(callback))
    hidden = session.hidden_state(embeddings_ciphertext)
    mask = session.attention_mask(mask_ciphertext)
    logits = model(embedding_output=hidden, attention_mask=mask).logits.ciphertext
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import resolve_name

from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError, UnsupportedEncryptedOperation
from hf_he.ops import required_rotations
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand

__all__ = ["EncryptedSession", "EncryptedTensor", "handler", "required_rotations", "state_operand", "state_tensor", "unsupported"]

HIDDEN, POOLED, SPLIT, HEADS, MASK = "hidden state", "pooled state", "split heads", "attention heads", "attention mask"

_HANDLERS: dict[Any, Callable] = {}


def handler(*functions: Callable) -> Callable[[Callable], Callable]:
    """Decorator: what it decorates is the encrypted form of these torch or hf_he functions, called with their arguments whenever one of
    the tensors among them is an EncryptedTensor. It refuses what it cannot do with `unsupported`."""

    def register(function: Callable) -> Callable:
        _HANDLERS.update(dict.fromkeys(functions, function))
        return function

    return register


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
        encrypted = _HANDLERS.get(func)
        if encrypted is None:
            raise unsupported(func)
        return encrypted(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        raise unsupported(func)


class EncryptedSession(OperationContext):
    """Backend, packing and refresh policy of one server; makes EncryptedTensors out of the ciphertexts it receives."""

    def hidden_state(self, ciphertext: Ciphertext, features: int | None = None) -> EncryptedTensor:
        """[blocks] ciphertexts from `pack_embeddings` as a hidden state [B, T, features] (default: all features of the blocks)."""
        features = ciphertext.count * self.packing.features if features is None else features
        if ciphertext.batch_shape != (self.packing.blocks(features),):
            raise ShapeError(f"a state of {features} features is {self.packing.blocks(features)} ciphertexts, got a batch of {ciphertext.batch_shape}")
        return state_tensor(Operand(self, features, ciphertext))

    def attention_mask(self, ciphertext: Ciphertext) -> EncryptedTensor:
        """[1] ciphertext from `pack_attention_mask` as a mask [B, 1, T, T]."""
        packing = self.packing
        if ciphertext.batch_shape != (1,):
            raise ShapeError(f"an attention mask is a batch of one ciphertext, got a batch of {ciphertext.batch_shape}")
        return EncryptedTensor(Operand(self, packing.features, ciphertext), (packing.sequences, 1, packing.tokens, packing.tokens), MASK)


def state_tensor(operand: Operand) -> EncryptedTensor:
    """A hidden state [B, T, F], or [B, F] when the operand is pooled."""
    packing = operand.context.packing
    if operand.pooled:
        return EncryptedTensor(operand, (packing.sequences, operand.features), POOLED)
    return EncryptedTensor(operand, (packing.sequences, operand.context.tokens, operand.features), HIDDEN)


def unsupported(func: Any, why: str = "") -> UnsupportedEncryptedOperation:
    """The error of a function without an encrypted form (for what `why` says)."""
    name = resolve_name(func) or getattr(func, "__qualname__", None) or str(func)
    return UnsupportedEncryptedOperation(f"{name} has no encrypted form{why or ': use an HE model (hf_he.models), whose operations all have one'}")


def state_operand(tensor: Any, func: Callable) -> Operand:
    """The operand of a hidden or pooled state; anything else cannot be an input of `func`."""
    if not isinstance(tensor, EncryptedTensor):
        raise unsupported(func, " with a plaintext tensor here: encrypt it first")
    if tensor.kind not in (HIDDEN, POOLED):
        raise unsupported(func, f" on {tensor.kind}: it takes a state [B, T, F] or [B, F]")
    return tensor.operand


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

import hf_he.handlers  # noqa: E402, F401
