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

_MEANS = ("power_mean", "kernel_mean")


@dataclass
class RangeTargets:
    """Where training should keep each quantity.

    `exponent`: lowest kernel exponent -||q - k||^2 / (2 sqrt(head_dim)) of any pair of tokens. `power_mean`: lowest and highest eps + mean x^p
    of a power-softmax row, `score`: largest magnitude of its scores where the divisor is constant. `kernel_mean`: eps + mean weight of a row of the
    normalized Gaussian kernel. `variance_ratio`: largest over smallest variance of a norm. `activations`: largest magnitude of the input, by function.
    """

    exponent: float = -16.0
    power_mean: list[float] = field(default_factory=lambda: [0.1, 1.0])
    kernel_mean: list[float] = field(default_factory=lambda: [0.01, 1.5])
    score: float = 4.0
    variance_ratio: float = 12.0
    activations: dict[str, float] = field(default_factory=lambda: {"gelu": 4.5, "tanh": 2.5})

    def interval(self, statistic: str, function: str | None, centre: float) -> tuple[float, float]:
        """Target interval of one layer; `centre` is the median variance, the only place where the data matter."""
        if statistic == "exponent":
            return self.exponent, 0.0
        if statistic == "power_mean":
            return self.power_mean[0], self.power_mean[1]
        if statistic == "kernel_mean":
            return self.kernel_mean[0], self.kernel_mean[1]
        if statistic == "score":
            return -self.score, self.score
        if statistic == "variance":
            half = math.sqrt(self.variance_ratio)
            return centre / half, centre * half
        if statistic == "input" and function in self.activations:
            return -self.activations[function], self.activations[function]
        raise ApproximationError(f"no range target for {statistic} of {function or 'attention'}: add it to `targets.activations` of the recipe.")


@dataclass
class Degrees:
    """Cost of each approximation: squarings of the Gaussian kernels, degree and Goldschmidt steps of the reciprocals of rows, degree and
    Newton steps of 1 / sqrt, degrees of the activations."""

    squarings: int = 5
    reciprocal_degree: int = 7
    goldschmidt_steps: int = 1
    norm_degree: int = 7
    norm_newton_steps: int = 0
    activations: dict[str, int] = field(default_factory=lambda: {"gelu": 7, "tanh": 7})


class RangePenalty:
    """Sum over layers of the mean over sentences of max(0, distance of the worst value from its target interval)^2.

    Variances and power means are compared by their logarithms, so that both ends of the interval weigh the same. The intervals of `centred`
    layers are factors of the median of each batch: in a training from scratch the scale of a variance settles late, its spread matters at once.
    """

    def __init__(self, intervals: Mapping[str, tuple[float, float]], logarithmic: Iterable[str] = (), centred: Iterable[str] = ()):
        self.intervals = dict(intervals)
        self.logarithmic = frozenset(logarithmic)
        self.centred = frozenset(centred)

    def __call__(self, statistics: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Penalty (scalar, differentiable) of what `hf_he.nn.collect_ranges` gathered in one forward pass."""
        terms = []
        for name, (low, high) in self.intervals.items():
            values = statistics[name].flatten(1)
            if name in self.centred:
                values = values / values.detach().median()
            if name in self.logarithmic:
                values, low, high = values.log(), math.log(low), math.log(high)
            terms += [F.relu(low - values.amin(1)).square().mean(), F.relu(values.amax(1) - high).square().mean()]
        return torch.stack(terms).sum()

    @classmethod
    def for_model(cls, model: nn.Module, batch: Batch, targets: RangeTargets, from_scratch: bool = False) -> RangePenalty:
        """A penalty for every approximated layer of `model`; `batch` (some hundred sentences) centres the variance intervals, which stay
        centred on whatever batch comes if the model is trained `from_scratch`."""
        functions = _activation_functions(model)
        with _evaluating(model), RangeTracker(model) as tracker, collect_ranges(model) as statistics:
            model(**batch)
        variances = [name for name, entry in tracker.ranges.items() if entry.statistic == "variance"]
        centres = dict.fromkeys(tracker.ranges, 1.0) if from_scratch else {name: float(values.median()) for name, values in statistics.items()}
        intervals = {name: targets.interval(entry.statistic, functions.get(name), centres[name]) for name, entry in tracker.ranges.items()}
        power_means = [name for name, entry in tracker.ranges.items() if entry.statistic in _MEANS]
        return cls(intervals, variances + power_means, variances if from_scratch else ())

    @classmethod
    def from_ranges(cls, ranges: Mapping[str, LayerRange]) -> RangePenalty:
        """A penalty that keeps every layer inside what it was seen to do, so that the margin of its calibrated interval stays free."""
        logarithmic = [name for name, entry in ranges.items() if entry.statistic in ("variance", *_MEANS)]
        return cls({name: (entry.minimum, entry.maximum) for name, entry in ranges.items()}, logarithmic)


def track_ranges(model: nn.Module, batches: Iterable[Batch]) -> dict[str, LayerRange]:
    """Smallest and largest value per layer over `batches`, in the model's mode, padding positions included."""
    with _evaluating(model), RangeTracker(model) as tracker:
        for batch in batches:
            model(**batch)
    return tracker.ranges


def calibrate(model: nn.Module, ranges: Mapping[str, LayerRange], degrees: Degrees, margin: float = 0.25) -> dict[str, dict[str, Any]]:
    """`config.approximations` for `model`: intervals wide enough for the observed `ranges` plus `margin`, with the given degrees.

    Variances get the margin as a factor on both sides, means of rows its p-th power, so that it is one of the scores (nothing is below eps, and no mean of
    Gaussian weights above 1 + eps), activations and scores a symmetric interval (which halves the work of an even or odd polynomial), exponents a
    lower end and, should it need them, more squarings. Ends are rounded outwards to two significant digits. Raises ApproximationError for values that
    were not finite, and for an activation without a degree.
    """
    modules = {getattr(module, "layer_name", "") or name: module for name, module in model.named_modules()}
    functions = _activation_functions(model)
    approximations: dict[str, dict[str, Any]] = {}
    for name, seen in ranges.items():
        if not (math.isfinite(seen.minimum) and math.isfinite(seen.maximum)):
            raise ApproximationError(
                f"{name}: {seen.statistic} was infinite or no number on the calibration data, which no interval covers: check the weights, and calibrate in "
                "mode='exact' where polynomials overflow."
            )
        if seen.statistic == "exponent":
            lowest = _round_up(-seen.minimum * (1.0 + margin))
            entry = {"interval": [-lowest, 0.0], "squarings": max(degrees.squarings, math.ceil(math.log2(lowest)))}
        elif seen.statistic == "variance":
            interval = [_round_down(seen.minimum / (1.0 + margin)), _round_up(seen.maximum * (1.0 + margin))]
            entry = {"interval": interval, "degree": degrees.norm_degree, "newton_steps": degrees.norm_newton_steps}
        elif seen.statistic in _MEANS:
            config = modules[name].config
            floor = config.power_softmax_eps if config.power_softmax_length_agnostic else 0.0
            factor = (1.0 + margin) ** config.power_softmax_degree
            ceiling = math.inf if seen.statistic == "power_mean" else 1.0 + config.power_softmax_eps
            interval = [max(floor, _round_down(seen.minimum / factor)), min(ceiling, _round_up(seen.maximum * factor))]
            entry = {"interval": interval, "degree": degrees.reciprocal_degree, "goldschmidt_steps": degrees.goldschmidt_steps}
        elif seen.statistic == "score":
            half = _round_up(max(-seen.minimum, seen.maximum) * (1.0 + margin))
            entry = {"interval": [-half, half]}
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
