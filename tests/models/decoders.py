"""Shared by the tests of the decoders: calibration entries around what a model does with given inputs, and a language model's test batch."""

import torch

from hf_he.nn import RangeTracker


def tokens(batch=4, length=8):
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def scaled(model, factor=3.0):
    """Larger weights, so that every approximated function leaves its linear part."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model.eval()


def calibrated(model, sequences, degree=31):
    """Entries of `config.approximations` with a margin around the ranges seen on `sequences` [B, T]."""
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(sequences)
    entries = {}
    for name, seen in tracker.ranges.items():
        largest = 1.2 * max(abs(seen.minimum), abs(seen.maximum))
        around = [seen.minimum / 2, 2 * seen.maximum]
        entries[name] = {
            "variance": {"interval": around, "degree": degree, "newton_steps": 2},
            "input": {"interval": [-largest, largest], "degree": degree},
            "exponent": {"interval": [-largest, 0.0], "squarings": 14},
            "power_mean": {"interval": around, "degree": degree, "goldschmidt_steps": 5},
            "score": {"interval": [-largest, largest]},
        }[seen.statistic]
    return entries
