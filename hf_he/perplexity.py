"""Perplexity of a causal language model over packed blocks, with the range of every approximated quantity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_he.errors import ShapeError
from hf_he.nn import RangeTracker


@dataclass(frozen=True)
class PerplexityResult:
    """`perplexity` = exp(mean negative log-likelihood) over `tokens` predictions, at most exp(700), which logits that are not finite get;
    `bits_per_token` is its base-2 logarithm."""

    mode: str
    perplexity: float
    tokens: int
    ranges: dict[str, dict[str, Any]] = field(repr=False)

    @property
    def bits_per_token(self) -> float:
        return math.log2(self.perplexity)

    @property
    def out_of_range(self) -> int:
        """Number of values outside their fitted interval, over all layers and tokens."""
        return sum(entry["out_of_range"] for entry in self.ranges.values())

    def to_dict(self) -> dict[str, Any]:
        """The stable part of `hf-he evaluate --task lm --json`."""
        return {
            "mode": self.mode,
            "perplexity": self.perplexity,
            "bits_per_token": self.bits_per_token,
            "tokens": self.tokens,
            "out_of_range": self.out_of_range,
            "ranges": self.ranges,
        }


@torch.no_grad()
def evaluate_perplexity(model: nn.Module, blocks: torch.Tensor, *, batch_size: int = 64, progress: bool = False) -> PerplexityResult:
    """Run `model` in the mode it is in over token ids `blocks` [rows, T]; within a block every token but the first is predicted from those
    before it, so that a token has (T - 1) / 2 tokens of context on average. Raises ShapeError where there is nothing to predict."""
    if blocks.ndim != 2 or not blocks.shape[0] or blocks.shape[1] < 2:
        raise ShapeError(f"token ids of shape {tuple(blocks.shape)} hold nothing to predict: give at least one block of two tokens")
    training = model.training
    model.eval()
    total = 0.0
    with RangeTracker(model) as tracker:
        for rows in tqdm(blocks.split(batch_size), desc="perplexity", disable=not progress):
            rows = rows.to(model.device)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    model.train(training)
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return PerplexityResult(getattr(model.config, "mode", "exact"), math.exp(min(700.0, total / tokens)), tokens, tracker.to_dict())
