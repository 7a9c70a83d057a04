"""What torch's autograd engine itself asks of gradients: starting, accumulating and storing them."""

from __future__ import annotations

from typing import Any

import torch

from hf_he.ops.arithmetic import WaitingSum
from hf_he.ops.gathered import Gathered
from hf_he.ops.operand import Operand
from hf_he.ops.weights import WeightGradient
from hf_he.tensor import LOSS, EncryptedTensor, handler, unsupported

aten = torch.ops.aten


@handler(torch.Tensor.backward)
def _backward(tensor: EncryptedTensor, gradient: Any = None, **kwargs: Any) -> None:
    _start(tensor, gradient, **kwargs)


@handler(torch.autograd.backward)
def _start(tensors: Any, grad_tensors: Any = None, **kwargs: Any) -> None:
    """A loss needs no gradient of itself, anything else does."""
    with torch._C.DisableTorchFunctionSubclass():
        torch.autograd.backward(tensors, grad_tensors, **kwargs)


@handler(torch.Tensor.detach, aten.detach.default, aten.alias.default)
def _detach(tensor: EncryptedTensor) -> EncryptedTensor:
    return EncryptedTensor(tensor.operand, tuple(tensor.shape), tensor.kind, dtype=tensor.dtype)


@handler(aten.ones_like.default)
def _ones_like(tensor: EncryptedTensor, **kwargs: Any) -> torch.Tensor:
    """The gradient of a loss in itself."""
    if tensor.kind != LOSS:
        raise unsupported(torch.autograd.backward, f" from {tensor.kind} without its gradient: torch.autograd.backward([tensor], [gradient])")
    return torch.ones(())


@handler(aten.add.Tensor)
def _accumulate(a: EncryptedTensor, b: EncryptedTensor) -> EncryptedTensor:
    return EncryptedTensor(_sum(a.operand, b.operand), tuple(a.shape), a.kind)


@handler(aten.add_.Tensor)
def _accumulate_in_place(a: EncryptedTensor, b: EncryptedTensor) -> EncryptedTensor:
    a.operand = _sum(a.operand, b.operand)
    return a


def _sum(a: Operand, b: Operand) -> Operand:
    return a.plus(b) if type(a) is type(b) and isinstance(a, WeightGradient | Gathered) else WaitingSum(a, b)
