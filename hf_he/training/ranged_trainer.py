"""What every training with a range penalty shares: the mean of each loss term in the log, and no step along a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from hf_he.training.range_penalty import RangePenalty


class RangedTrainer(Trainer):
    """transformers' Trainer; a subclass computes its terms in `compute_loss` and hands them to `record_terms`."""

    def __init__(self, *args: Any, penalty: RangePenalty | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.penalty = penalty
        self.terms: dict[str, list[float]] = {}
        self.skipped_steps = 0

    def record_terms(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Keep the unweighted terms of one training step for the next log."""
        for name, term in terms.items():
            self.terms.setdefault(name, []).append(float(term.detach()))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One step without an update when the gradient is not finite: a value far outside its interval overflows a polynomial."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            model.zero_grad()
            self.skipped_steps += 1
            for values in self.terms.values():
                values.pop()
            return torch.zeros_like(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term since the last log."""
        if "loss" in logs:
            logs |= {f"{name}_loss": float(np.mean(values)) for name, values in self.terms.items() if values}
            self.terms.clear()
        super().log(logs, start_time)
