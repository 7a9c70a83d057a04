"""What decoders have beyond encoders: RMSNorm, rotary embeddings, causal masks, projections that are cut into queries, keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache

from hf_he import autograd
from hf_he import nn as he_nn
from hf_he.attention import causal_keep_mask
from hf_he.errors import ShapeError
from hf_he.ops.rotary import Rotation
from hf_he.tensor import HEADS, MASK, EncryptedTensor, handler, state_operand, unsupported


@handler(he_nn.rms_norm)
def _rms_norm(hidden_states: Any, module: he_nn.HERMSNorm) -> EncryptedTensor:
    operand = state_operand(hidden_states, he_nn.rms_norm)
    if module.approximation is None:
        raise unsupported(he_nn.rms_norm, " in exact mode: call model.set_mode('polynomial') first")
    layer = (module.weight, None, module.eps, module.approximation, operand.context.levels(module), False)
    return autograd.call(autograd.Norm, hidden_states, layer)


@handler(he_nn.apply_rotary)
def _apply_rotary(states: Any, cos: torch.Tensor, sin: torch.Tensor) -> EncryptedTensor:
    if not isinstance(states, EncryptedTensor) or states.kind != HEADS:
        raise unsupported(he_nn.apply_rotary, " of anything but encrypted heads [B, heads, T, head_dim] at public positions")
    return autograd.call(autograd.Rotary, states, Rotation.of(cos, sin, states.shape[-1]))


@handler(torch.Tensor.chunk, torch.chunk)
def _chunk(tensor: EncryptedTensor, chunks: int, dim: int = 0) -> tuple[EncryptedTensor, ...]:
    if tensor.kind != HEADS or dim % 4 != 3:
        raise unsupported(torch.chunk, f" on {tensor.kind} along dimension {dim}: only the features of heads can be cut")
    batch, heads, tokens, width = tensor.shape
    if width % chunks:
        raise ShapeError(f"heads of {width} features cannot be cut into {chunks} equal parts")
    rows = np.arange(heads * width).reshape(heads, chunks, width // chunks)
    shape = (batch, heads, tokens, width // chunks)
    return tuple(autograd.call(autograd.Select, tensor, np.ascontiguousarray(rows[:, i]).reshape(-1), shape) for i in range(chunks))


@handler(causal_keep_mask)
def _causal_keep_mask(
    inputs_embeds: Any, attention_mask: Any, past_key_values: Cache | None = None, position_ids: torch.Tensor | None = None
) -> EncryptedTensor | None:
    """The padding mask alone: attention knows that its module is causal."""
    if type(past_key_values) is DynamicCache:
        raise unsupported(causal_keep_mask, " with a cache of plain tensors: pass use_cache=False")
    if attention_mask is not None and (not isinstance(attention_mask, EncryptedTensor) or attention_mask.kind != MASK):
        raise unsupported(causal_keep_mask, " with a plaintext mask: make it with session.attention_mask(ciphertext), or pass None without padding")
    return attention_mask
