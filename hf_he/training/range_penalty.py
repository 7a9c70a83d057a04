"""Keep the input of every polynomial inside a narrow interval: a differentiable hinge for training, and calibration afterwards.

The width of an interval decides the degree of its polynomial, hence the levels and the time of an encrypted run. Rho et al. (ICLR 2025)
push ranges down with an indicator penalty, whose gradient is zero; this one is a squared hinge on the worst value of each sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hf_he.errors import ApproximationError
from hf_he.nn import LayerRange, PolynomialActivation, RangeTracker, collect_ranges

Batch = Mapping[str, torch.Tensor]


@dataclass
class RangeTargets:
    """Where training should keep each quantity.

    `exponent`: lowest kernel exponent -||q - k||^2 / (2 sqrt(head_dim)) of any pair of tokens. `variance_ratio`: largest over smallest
    LayerNorm variance of a layer. `activations`: largest magnitude of the input, by function.
    """

    exponent: float = -16.0
    variance_ratio: float = 12.0
    activations: dict[str, float] = field(default_factory=lambda: {"gelu": 4.5, "tanh": 2.5})

    def interval(self, statistic: str, function: str | None, centre: float) -> tuple[float, float]:
        """Target interval of one layer; `centre` is the median variance, the only place where the data matter."""
        if statistic == "exponent":
            return self.exponent, 0.0
        if statistic == "variance":
            half = math.sqrt(self.variance_ratio)
            return centre / half, centre * half
        if statistic == "input" and function in self.activations:
            return -self.activations[function], self.activations[function]
        raise ApproximationError(f"no range target for {statistic} of {function or 'attention'}: add it to `targets.activations` of the recipe.")


@dataclass
class Degrees:
    """Cost of each approximation: squarings of the kernel, degree and Newton steps of 1 / sqrt, degrees of the activations."""

    squarings: int = 5
    norm_degree: int = 7
    norm_newton_steps: int = 0
    activations: dict[str, int] = field(default_factory=lambda: {"gelu": 7, "tanh": 7})


class RangePenalty:
    """Sum over layers of the mean over sentences of max(0, distance of the worst value from its target interval)^2.

    Variances are compared by their logarithms, so that both ends of the interval weigh the same.
    """

    def __init__(self, intervals: Mapping[str, tuple[float, float]], logarithmic: Iterable[str] = ()):
        self.intervals = dict(intervals)
        self.logarithmic = frozenset(logarithmic)

    def __call__(self, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Penalty (scalar, differentiable) of what `hf_he.nn.collect_ranges` gathered in one forward pass."""
        terms = []
        for name, (low, high) in self.intervals.items():
            values = statistics[name].flatten(1)
            if name in self.logarithmic:
                values, low, high = values.log(), math.log(low), math.log(high)
            terms += [F.relu(low - values.amin(1)).square().mean(), F.relu(values.amax(1) - high).square().mean()]
        return torch.stack(terms).sum()

    @classmethod
    def for_model(cls, model: nn.Module, batch: Batch, targets: RangeTargets) -> RangePenalty:
        """A penalty for every approximated layer of `model`; `batch` (some hundred sentences) centres the variance intervals."""
        functions = _activation_functions(model)
        with _evaluating(model), RangeTracker(model) as tracker, collect_ranges(model) as statistics:
            model(**batch)
        intervals = {name: targets.interval(entry.statistic, functions.get(name), float(statistics[name].median())) for name, entry in tracker.ranges.items()}
        return cls(intervals, [name for name, entry in tracker.ranges.items() if entry.statistic == "variance"])


def track_ranges(model: nn.Module, batches: Iterable[Batch]) -> dict[str, LayerRange]:
    """Smallest and largest value per layer over `batches`, in the model's mode, padding positions included."""
    with _evaluating(model), RangeTracker(model) as tracker:
        for batch in batches:
            model(**batch)
    return tracker.ranges


def calibrate(model: nn.Module, ranges: Mapping[str, LayerRange], degrees: Degrees, margin: float = 0.25) -> dict[str, dict[str, Any]]:
    """`config.approximations` for `model`: intervals wide enough for the observed `ranges` plus `margin`, with the given degrees.

    Variances get the margin as a factor on both sides, activations a symmetric interval (which halves the work of an even or odd
    polynomial), exponents a lower end and, should it need them, more squarings. Ends are rounded outwards to two significant digits.
    """
    functions = _activation_functions(model)
    approximations: dict[str, dict[str, Any]] = {}
    for name, seen in ranges.items():
        if seen.statistic == "exponent":
            lowest = _round_up(-seen.minimum * (1.0 + margin))
            entry = {"interval": [-lowest, 0.0], "squarings": max(degrees.squarings, math.ceil(math.log2(lowest)))}
        elif seen.statistic == "variance":
            interval = [_round_down(seen.minimum / (1.0 + margin)), _round_up(seen.maximum * (1.0 + margin))]
            entry = {"interval": interval, "degree": degrees.norm_degree, "newton_steps": degrees.norm_newton_steps}
        elif seen.statistic == "input" and functions[name] in degrees.activations:
            half = _round_up(max(-seen.minimum, seen.maximum) * (1.0 + margin))
            entry = {"interval": [-half, half], "degree": degrees.activations[functions[name]]}
        else:
            raise ApproximationError(f"{name}: no degree for {seen.statistic} of {functions.get(name)}: add it to `degrees` of the recipe.")
        approximations[name] = entry
    return approximations


def _activation_functions(model: nn.Module) -> dict[str, str]:
    return {module.layer_name or name: module.function for name, module in model.named_modules() if isinstance(module, PolynomialActivation)}


def _round_up(value: float) -> float:
    step = _two_digits(value)
    return round(math.ceil(value / step - 1e-9) * step, 12)


def _round_down(value: float) -> float:
    step = _two_digits(value)
    return round(math.floor(value / step + 1e-9) * step, 12)


def _two_digits(value: float) -> float:
    return 10.0 ** (math.floor(math.log10(value)) - 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
