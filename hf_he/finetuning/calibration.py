"""Ranges of the polynomials that training adds, found in the clear on some of the client's own examples."""

from __future__ import annotations

import math
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

SCALED_GRADIENT = 4.0
"""What the largest entry of a state's gradient becomes, up to a factor of 2: hidden states with entries up to 30 and a root mean square of 3 are refreshed
within 1e-5 by a bootstrap, and gradients are as uneven."""
LARGEST_SCALE = 2.0**16


@dataclass(frozen=True)
class Calibration:
    """`divisor` and `eps` of the optimiser, `loss_bound` of the softmax, `loss_scale` for gradients that are bootstrapped."""

    divisor: float
    eps: float
    loss_bound: float
    loss_scale: float


def calibrate(
    model: str | Path, tokenizer: Any, dataset: TextDataset, settings: TrainingSettings, batches: Sequence[Sequence[int]], seed: int = 0
) -> Calibration:
    """From the logits of the start model and the gradients of its fresh adapter over `batches`, rows of `dataset`: best the first ones of the run."""
    torch.manual_seed(seed)
    adapted = adapted_model(load_classifier(model).double(), settings)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    largest, steepest, logits = 0.0, 0.0, []
    for rows in batches:
        batch = dataset.select(rows)
        output = adapted(**encode_texts(tokenizer, batch), labels=torch.tensor(batch.labels), output_hidden_states=True)
        states = [state for state in output.hidden_states if state.requires_grad]
        gradients = torch.autograd.grad(output.loss, trained + states)
        steepest = max(steepest, *(len(rows) * float(gradient.abs().max()) for gradient in gradients[len(trained) :]))
        gradients = gradients[: len(trained)]
        largest = max(largest, *(float(gradient.abs().max()) ** 2 for gradient in gradients))
        logits.append(output.logits.detach())
    divisor, eps = calibrate_divisor(largest)
    values = torch.cat(logits).numpy()
    bound = settings.loss_bound if values.shape[1] == 1 else CrossEntropy.calibrated(values).bound
    return Calibration(divisor, eps, bound, power_of_two(steepest))


def power_of_two(largest: float) -> float:
    """The loss scale, from 1 to 2^16, for gradients of states whose largest entry is `largest` when each sequence counts 1."""
    return min(max(2.0 ** math.floor(math.log2(SCALED_GRADIENT / largest)), 1.0), LARGEST_SCALE) if largest > 0.0 else 1.0
