"""Losses of encrypted logits and labels. Their value is never computed; the sequences' weights say what each of them counts, so that mean and sum
are the same here."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from hf_he import autograd
from hf_he.tensor import LABELS, EncryptedTensor, handler, state_operand, unsupported


@handler(F.cross_entropy)
def _cross_entropy(
    logits: Any, labels: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> EncryptedTensor:  # fmt: skip
    if weight is not None or size_average is not None or reduce is not None or label_smoothing:
        raise unsupported(F.cross_entropy, " with class weights or label smoothing: weigh sequences by their encrypted weights")
    return _loss(F.cross_entropy, logits, labels, reduction)


@handler(F.mse_loss)
def _mse_loss(logits: Any, labels: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean", weight: Any = None) -> EncryptedTensor:
    if weight is not None or size_average is not None or reduce is not None:
        raise unsupported(F.mse_loss, " with weights: weigh sequences by their encrypted weights")
    return _loss(F.mse_loss, logits, labels, reduction)


def _loss(function: Any, logits: Any, labels: Any, reduction: str) -> EncryptedTensor:
    state_operand(logits, function)
    if not isinstance(labels, EncryptedTensor) or labels.kind != LABELS or labels.is_floating_point() != (function is F.mse_loss):
        raise unsupported(function, " of these labels: classes are session.labels(...), numbers have dtype float32")
    if labels.operand.loss is None or reduction not in ("mean", "sum"):
        raise unsupported(function, ": give session.labels a loss of hf_he.finetuning.loss, and reduce to the mean or the sum")
    return autograd.call(autograd.Loss, logits, labels, labels.operand.loss.gradient)
