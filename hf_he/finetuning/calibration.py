"""Ranges of the polynomials that training adds, found in the clear on some of the client's own examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_he.checkpoints import load_classifier
from hf_he.data import TextDataset
from hf_he.evaluation import encode_texts
from hf_he.finetuning.loss import CrossEntropy
from hf_he.finetuning.optimizer import calibrate_divisor
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.step import adapted_model


@dataclass(frozen=True)
class Calibration:
    """`divisor` and `eps` of the optimiser, `loss_bound` of the softmax."""

    divisor: float
    eps: float
    loss_bound: float


def calibrate(
    model: str | Path, tokenizer: Any, dataset: TextDataset, settings: TrainingSettings, batches: Sequence[Sequence[int]], seed: int = 0
) -> Calibration:
    """From the logits of the start model and the gradients of its fresh adapter over `batches`, rows of `dataset`: best the first ones of the run."""
    torch.manual_seed(seed)
    adapted = adapted_model(load_classifier(model).double(), settings)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    largest, logits = 0.0, []
    for rows in batches:
        batch = dataset.select(rows)
        output = adapted(**encode_texts(tokenizer, batch), labels=torch.tensor(batch.labels))
        gradients = torch.autograd.grad(output.loss, trained)
        largest = max(largest, *(float(gradient.abs().max()) ** 2 for gradient in gradients))
        logits.append(output.logits.detach())
    divisor, eps = calibrate_divisor(largest)
    values = torch.cat(logits).numpy()
    bound = settings.loss_bound if values.shape[1] == 1 else CrossEntropy.calibrated(values).bound
    return Calibration(divisor, eps, bound)
