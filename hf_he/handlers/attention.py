"""Attention."""

from __future__ import annotations

from typing import Any

import torch

from hf_he.approximation import KernelExponential
from hf_he.attention import gaussian_kernel_attention, power_softmax_attention
from hf_he.ops import attention
from hf_he.ops.operand import Operand
from hf_he.tensor import HEADS, MASK, SPLIT, EncryptedTensor, handler, unsupported


@handler(gaussian_kernel_attention)
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
        raise unsupported(name, " in exact mode: call model.set_mode('polynomial') first")
    if dropout or module.training:
        raise unsupported(name, " while training: call model.eval()")
    if getattr(module, "is_causal", False):
        raise unsupported(name, " in a causal model yet: only bidirectional attention has one")
    for tensor in (query, key, value):
        if not isinstance(tensor, EncryptedTensor) or tensor.kind != HEADS:
            raise unsupported(name, " of anything but encrypted queries, keys and values [B, heads, T, head_dim]")
    if attention_mask is not None and (not isinstance(attention_mask, EncryptedTensor) or attention_mask.kind != MASK):
        raise unsupported(name, " with a plaintext mask: make it with session.attention_mask(ciphertext)")
    batch, heads, tokens, head_dim = query.shape
    if key.shape != query.shape:
        raise unsupported(name, " with grouped keys and values yet")
    context = query.session
    mask = None if attention_mask is None else attention_mask.ciphertext
    scaling = head_dim**-0.5 if scaling is None else scaling
    levels = context.levels(module) or attention.DEFAULT_LEVELS
    out = attention.encrypted(context, query.operand, key.operand, value.operand, mask, heads, scaling, approximation, levels)
    return EncryptedTensor(Operand(context, heads * head_dim, out), (batch, tokens, heads, head_dim), SPLIT), None


@handler(power_softmax_attention)
def _power_softmax(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise unsupported(power_softmax_attention, " yet: convert the model to attention_kernel='gaussian_kernel'")
