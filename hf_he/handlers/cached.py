"""Attention of one token over the cached keys and values that `EncryptedCache.update` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_he.approximation import KernelExponential, Polynomial, Reciprocal
from hf_he.ops import decode
from hf_he.ops.operand import Operand
from hf_he.ops.power_softmax import PowerSoftmax
from hf_he.tensor import HEADS, SPLIT, EncryptedTensor, unsupported


def is_cached(key: Any) -> bool:
    return isinstance(key, EncryptedTensor) and isinstance(key.operand, decode.CachedStates)


def attend(
    name: Callable,
    module: torch.nn.Module,
    query: Any,
    key: EncryptedTensor,
    value: EncryptedTensor,
    scaling: float | None,
    approximation: KernelExponential | Reciprocal | Polynomial,
    form: PowerSoftmax | None = None,
) -> tuple[EncryptedTensor, None]:
    """Query [B, heads, 1, head_dim] over the whole cache: [B, 1, heads, head_dim]."""
    if module.training:
        raise unsupported(name, " while training: call model.eval()")
    if not isinstance(query, EncryptedTensor) or query.kind != HEADS or query.shape[2] != 1:
        raise unsupported(name, " of anything but one encrypted query per sequence over a cache: use session.single_token()")
    batch, heads, _, head_dim = query.shape
    context, cached = query.session, key.operand
    scaling = head_dim**-0.5 if scaling is None else scaling
    q = context.backend.reshape(decode.at_level(query.operand, cached.level), (1,))
    out = decode.encrypted(context, q, cached.chunks, value.operand.chunks, cached.valid, heads, scaling, approximation, form)
    return EncryptedTensor(Operand(context, heads * head_dim, out), (batch, 1, heads, head_dim), SPLIT), None
