"""The plaintext twin of encrypted training: the same model polynomials, the same loss gradient, the same optimiser, in double precision.

It is what an encrypted run is compared with (losses and final adapter), what the trade-off study measures quality with, and what a client
may run beforehand on a few examples to see whether the ranges hold: a value outside of one raises RangeError with its layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_he.finetuning.adapter import scaled
from hf_he.finetuning.optimizer import PlainState
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.schedule import learning_rate
from hf_he.finetuning.step import make_loss, make_optimizer


class PolynomialTraining:
    """Training of `model`'s parameters that require a gradient, a PEFT model in polynomial mode (made double precision and kept in eval mode).

    Every call of `step` is one step of an encrypted run with these settings. `losses` are the exact losses of the logits before each update, as the
    client of an encrypted run computes them from decrypted logits.
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings) -> None:
        self.model = model.double().eval()
        self.settings = settings
        self.loss = make_loss(settings, model.config.num_labels)
        self.optimizer = make_optimizer(settings)
        self.losses: list[float] = []
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._state: dict[str, PlainState] = {name: {} for name in self._trained}

    def step(self, inputs: Mapping[str, torch.Tensor], labels: Any) -> float:
        """One update on a batch; `inputs` are the model's, `labels` [rows] classes or numbers. Returns the mean loss before it."""
        logits = self.model(**{name: _double(values) for name, values in inputs.items()}).logits
        values, labels = logits.detach().numpy(), np.asarray(labels)
        self.losses.append(mean_loss(logits.detach(), labels))
        gradient = torch.from_numpy(self.loss.reference(values, labels) / len(labels))
        gradients = torch.autograd.grad(logits, list(self._trained.values()), gradient)
        self._update(dict(zip(self._trained, gradients, strict=True)))
        return self.losses[-1]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name, as `AdapterLayout.pack` takes them."""
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def _update(self, gradients: Mapping[str, torch.Tensor]) -> None:
        settings, step = self.settings, len(self.losses)
        rate = learning_rate(settings.schedule, settings.learning_rate, step, settings.steps, settings.warmup_steps)
        factors = scaled(tuple(self._trained), self.optimizer.gradient_gain, settings.gradient_scales)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                gradient = factors[name] * gradients[name].numpy()
                values, self._state[name] = self.optimizer.reference(parameter.numpy(), gradient, self._state[name], rate, step)
                parameter.copy_(torch.from_numpy(values))


def mean_loss(logits: torch.Tensor, labels: np.ndarray) -> float:
    """Cross-entropy of logits [rows, classes], squared error of a single output."""
    targets = torch.from_numpy(labels)
    return float(F.mse_loss(logits[:, 0], targets.to(logits.dtype)) if logits.shape[1] == 1 else F.cross_entropy(logits, targets))


def _double(values: torch.Tensor) -> torch.Tensor:
    return values.double() if values.is_floating_point() else values
