"""Ranges of the polynomials that training adds, found in the clear on some of the client's own examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_he.checkpoints import load_classifier
from hf_he.data import TextDataset
from hf_he.evaluation import encode_texts
from hf_he.finetuning.loss import CrossEntropy
from hf_he.finetuning.optimizer import calibrate_divisor
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.step import adapted_model

SCALED_GRADIENT = 8.0
"""What the largest entry of a state's gradient becomes, up to a factor of 2: hidden states with entries up to 30 and a root mean square of 3 are refreshed
within 1e-5 by a bootstrap, and gradients are more uneven. Scores have gradients a few times as large, and products of 512 overflow."""
LARGEST_SCALE = 2.0**16
LATE_MARGIN = 8.0
"""Times which the squared gradients of parameters that start without one may grow beyond those of the others."""


@dataclass(frozen=True)
class Calibration:
    """`divisor` and `eps` of the optimiser, `loss_bound` of the softmax, `loss_scale` for gradients that are bootstrapped; `gradient_scales` of AdamW-HE,
    one per trained parameter, powers of two."""

    divisor: float
    eps: float
    loss_bound: float
    loss_scale: float
    gradient_scales: tuple[float, ...] = ()


def calibrate(
    model: str | Path,
    tokenizer: Any,
    dataset: TextDataset,
    settings: TrainingSettings,
    batches: Sequence[Sequence[int]],
    seed: int = 0,
    eps_ratio: float = 1e-3,
) -> Calibration:
    """From the logits of the start model and the gradients of its fresh adapter over `batches`, rows of `dataset`: best the first ones of the run.

    For AdamW-HE these are steps of torch's AdamW in the clear: lora_A, whose first gradient is zero because lora_B is, shows the size of its
    gradients only once lora_B has moved. They go on growing with it, hence their own margin. eps is `eps_ratio` of the divisor.
    """
    torch.manual_seed(seed)
    adapted = adapted_model(load_classifier(model).double(), settings)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adam = settings.optimizer == "adamw"
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0) if adam else None
    largest, late, steepest, logits = np.zeros(len(trained)), np.zeros(len(trained), dtype=bool), 0.0, []
    for number, rows in enumerate(batches):
        batch = dataset.select(rows)
        output = adapted(**encode_texts(tokenizer, batch), labels=torch.tensor(batch.labels), output_hidden_states=True)
        states = [state for state in output.hidden_states if state.requires_grad]
        gradients = torch.autograd.grad(output.loss, trained + states)
        steepest = max(steepest, *(len(rows) * float(gradient.abs().max()) for gradient in gradients[len(trained) :]))
        gradients = gradients[: len(trained)]
        squares = np.array([float(gradient.abs().max()) ** 2 for gradient in gradients])
        late = squares == 0.0 if number == 0 else late
        largest = np.maximum(largest, squares)
        logits.append(output.logits.detach())
        if optimizer is not None:
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    scales: tuple[float, ...] = ()
    if adam:
        largest = np.where(late, LATE_MARGIN, 1.0) * largest
        scales = tuple(2.0 ** -round(math.log2(square) / 2) if square > 0.0 else 1.0 for square in largest)
        largest = largest * np.square(scales)
    divisor, eps = calibrate_divisor(float(largest.max()), eps_ratio)
    values = torch.cat(logits).numpy()
    bound = settings.loss_bound if values.shape[1] == 1 else CrossEntropy.calibrated(values).bound
    return Calibration(divisor, eps, bound, power_of_two(steepest), scales)


def power_of_two(largest: float) -> float:
    """The loss scale, from 1 to 2^16, for gradients of states whose largest entry is `largest` when each sequence counts 1."""
    return min(max(2.0 ** math.floor(math.log2(SCALED_GRADIENT / largest)), 1.0), LARGEST_SCALE) if largest > 0.0 else 1.0
