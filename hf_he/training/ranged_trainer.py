"""Training with a range penalty: the model's own loss plus the penalty, the mean of each term in the log, no step along a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from hf_he.nn import collect_ranges
from hf_he.training.range_penalty import RangePenalty


class RangedTrainer(Trainer):
    """transformers' Trainer whose loss is that of the model plus `penalty_weight` times `penalty`, which needs an hf_he model.

    The log has both as label_loss and penalty_loss. A step whose gradient is not finite is left out and counted in `skipped_steps`. A subclass with
    other terms computes them in `compute_loss` and hands them to `record_terms`.
    """

    def __init__(self, *args: Any, penalty: RangePenalty | None = None, penalty_weight: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # losses are means: with gradient accumulation Trainer divides them
        self.penalty = penalty
        self.penalty_weight = penalty_weight
        self.terms: dict[str, list[float]] = {}
        self.skipped_steps = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with collect_ranges(model) as statistics:
            outputs = model(**inputs)
        terms, loss = {"label": outputs.loss}, outputs.loss
        if self.penalty is not None:
            terms["penalty"] = self.penalty(statistics)
            loss = loss + self.penalty_weight * terms["penalty"]
        if model.training:
            self.record_terms(terms)
        return (loss, outputs) if return_outputs else loss

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
