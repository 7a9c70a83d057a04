"""Shapes: splitting and merging heads, and what leaves a tensor as it is."""

from __future__ import annotations

from typing import Any

import torch

from hf_he import autograd
from hf_he.tensor import HEADS, HIDDEN, LABELS, POOLED, SPLIT, EncryptedTensor, handler, unsupported


@handler(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def _reshape(tensor: EncryptedTensor, *shape: Any) -> EncryptedTensor:
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    total = tensor.shape.numel()
    if sizes.count(-1) == 1:
        known = -int(torch.tensor(sizes).prod())
        sizes[sizes.index(-1)] = total // known if known else 0
    packing, features = tensor.session.packing, tensor.operand.features
    if tuple(sizes) == tuple(tensor.shape):
        return tensor
    if tensor.kind in (HIDDEN, SPLIT) and sizes[:2] == [packing.sequences, tensor.session.tokens] and torch.Size(sizes).numel() == total:
        if len(sizes) == 4:
            return autograd.call(autograd.Reshape, tensor, tuple(sizes), SPLIT)
        if sizes[2:] == [features]:
            return autograd.call(autograd.Reshape, tensor, tuple(sizes), HIDDEN)
    raise unsupported(torch.Tensor.reshape, f" from {tuple(tensor.shape)} to {tuple(sizes)}: only heads can be split and merged")


@handler(torch.transpose, torch.Tensor.transpose)
def _transpose(tensor: EncryptedTensor, dim0: int, dim1: int) -> EncryptedTensor:
    if tensor.kind not in (SPLIT, HEADS) or {dim0 % 4, dim1 % 4} != {1, 2}:
        raise unsupported(torch.Tensor.transpose, f"({dim0}, {dim1}) on {tensor.kind}: only tokens and heads can be swapped")
    batch, first, second, width = tensor.shape
    return autograd.call(autograd.Reshape, tensor, (batch, second, first, width), HEADS if tensor.kind == SPLIT else SPLIT)


@handler(torch.squeeze, torch.Tensor.squeeze)
def _squeeze(tensor: EncryptedTensor) -> EncryptedTensor:
    if tensor.kind not in (POOLED, LABELS):
        raise unsupported(torch.squeeze, f" on {tensor.kind}: only of logits and labels")
    shape = tuple(size for size in tensor.shape if size != 1)
    if tensor.kind == LABELS:
        return EncryptedTensor(tensor.operand, shape, LABELS, dtype=tensor.dtype)
    return autograd.call(autograd.Reshape, tensor, shape, POOLED)


@handler(torch.Tensor.contiguous)
def _same(tensor: EncryptedTensor, **kwargs: Any) -> EncryptedTensor:
    return tensor


@handler(torch.Tensor.to)
def _to(tensor: EncryptedTensor, *args: Any, **kwargs: Any) -> EncryptedTensor:
    if any(target not in (tensor.dtype, tensor.device, "cpu") for target in (*args, *kwargs.values())):
        raise unsupported(torch.Tensor.to, ": it stays float32 on the CPU; load the model in float32")
    return tensor
