"""Layers with an exact and a polynomial mode, and the ranges of what goes into them.

`layer_norm`, `rms_norm`, `apply_rotary` and `activation` (and `hf_he.attention.gaussian_kernel_attention`) are the points where
`EncryptedTensor` takes over: they dispatch through `__torch_function__` like torch's own functions.

A polynomial is only right on the interval it was fitted on. In polynomial mode a value outside raises `RangeError`; inside a
`RangeTracker` or `collect_ranges` it is recorded instead.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from hf_he.approximation import (
    InverseSquareRoot,
    Polynomial,
    fit_inverse_square_root,
    fit_polynomial,
)
from hf_he.chebyshev import halve_series
from hf_he.errors import ApproximationError, RangeError

MODES = ("exact", "polynomial")
_BLOCK = 1 << 14

EXACT_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

_observers: list[_Observer] = []


class PolynomialLayer(nn.Module):
    """A layer whose non-polynomial part may be replaced by an approximation.

    `layer_name` is its name in the checkpoint's `approximations`; `interval` is the fitted interval, known in both modes once
    calibrated; `entry_keys` are the keys an entry of `approximations` must have. The approximation object is None in exact mode.
    """

    entry_keys: tuple[str, ...]
    layer_name: str = ""
    interval: tuple[float, float] | None = None

    def build_approximation(self, entry: Mapping[str, Any]) -> Any:
        """The approximation object described by one entry of `config.approximations`."""
        raise NotImplementedError

    def install_approximation(self, approximation: Any | None) -> None:
        """Use `approximation` from now on; None is exact mode."""
        self.approximation = approximation

    def prepare(self, mode: str, entry: Mapping[str, Any] | None) -> tuple[tuple[float, float] | None, Any | None]:
        """Interval and approximation of this layer in `mode` with its calibrated `entry`; nothing changes yet.

        Raises:
            ApproximationError: polynomial mode without an entry, an incomplete or unreadable entry, or no polynomial fits it.
        """
        if mode not in MODES:
            raise ApproximationError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        if entry is not None and set(entry) != set(self.entry_keys):
            raise ApproximationError(f"{self.layer_name}: the entry needs exactly {list(self.entry_keys)}, got {sorted(entry)}.")
        if mode == "polynomial" and entry is None:
            raise ApproximationError(
                f"{self.layer_name} has no entry in config.approximations. Run calibration (load with mode='exact', record ranges "
                "with RangeTracker on representative data, then model.set_approximations(...)) before switching to polynomial mode."
            )
        if entry is None:
            return None, None
        try:
            low, high = (float(end) for end in entry["interval"])
        except (TypeError, ValueError):
            raise ApproximationError(f"{self.layer_name}: the interval must be two numbers, not {entry['interval']!r}: calibrate again.") from None
        return (low, high), self.build_approximation(entry) if mode == "polynomial" else None

    def configure(self, mode: str, entry: Mapping[str, Any] | None) -> None:
        """Switch to `mode` with the calibrated `entry` of this layer. Errors as for `prepare`."""
        self.interval, approximation = self.prepare(mode, entry)
        self.install_approximation(approximation)


class HELayerNorm(PolynomialLayer):
    """LayerNorm over the last dimension; in polynomial mode 1 / sqrt(variance + eps) is an `InverseSquareRoot`.

    Entry: {"interval": [lo, hi] of variance + eps, "degree": of the guess, "newton_steps": int}.
    """

    entry_keys = ("interval", "degree", "newton_steps")

    def __init__(self, hidden_size: int, eps: float = 1e-12):
        super().__init__()
        self.normalized_shape = (hidden_size,)
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps
        self.approximation: InverseSquareRoot | None = None

    def build_approximation(self, entry: Mapping[str, Any]) -> InverseSquareRoot:
        return fit_inverse_square_root(tuple(entry["interval"]), entry["degree"], entry["newton_steps"])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return layer_norm(hidden_states, self)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, {_describe(self.approximation)}"


class HERMSNorm(PolynomialLayer):
    """RMSNorm over the last dimension (Zhang and Sennrich, 2019); in polynomial mode 1 / sqrt(mean(x^2) + eps) is an `InverseSquareRoot`.

    Entry: {"interval": [lo, hi] of mean(x^2) + eps, "degree": of the guess, "newton_steps": int}.
    """

    entry_keys = ("interval", "degree", "newton_steps")

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.normalized_shape = (hidden_size,)
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self.approximation: InverseSquareRoot | None = None

    def build_approximation(self, entry: Mapping[str, Any]) -> InverseSquareRoot:
        return fit_inverse_square_root(tuple(entry["interval"]), entry["degree"], entry["newton_steps"])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}, {_describe(self.approximation)}"


class PolynomialActivation(PolynomialLayer):
    """An elementwise activation by name (gelu, relu, silu, sigmoid, tanh); in polynomial mode its minimax polynomial.

    Entry: {"interval": [lo, hi] of the input, "degree": int}.
    """

    entry_keys = ("interval", "degree")

    def __init__(self, function: str):
        super().__init__()
        if function not in EXACT_ACTIVATIONS:
            raise ApproximationError(f"No activation named {function!r}; known: {', '.join(sorted(EXACT_ACTIVATIONS))}.")
        self.function = function
        self.approximation: Polynomial | None = None

    def build_approximation(self, entry: Mapping[str, Any]) -> Polynomial:
        return fit_polynomial(self.function, tuple(entry["interval"]), entry["degree"])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return activation(hidden_states, self)

    def extra_repr(self) -> str:
        return f"{self.function}, {_describe(self.approximation)}"


def layer_norm(hidden_states: torch.Tensor, module: HELayerNorm) -> torch.Tensor:
    """weight * (x - mean) / sqrt(mean((x - mean)^2) + eps) + bias over the last dimension, in the module's mode. Overridable."""
    if has_torch_function_unary(hidden_states):
        return handle_torch_function(layer_norm, (hidden_states,), hidden_states, module)
    if module.approximation is None and not is_observed(module):
        return F.layer_norm(hidden_states, module.normalized_shape, module.weight, module.bias, module.eps)
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    return centred * _inverse_root_mean_square(centred, module) * module.weight + module.bias


def rms_norm(hidden_states: torch.Tensor, module: HERMSNorm) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in the module's mode. Overridable."""
    if has_torch_function_unary(hidden_states):
        return handle_torch_function(rms_norm, (hidden_states,), hidden_states, module)
    if module.approximation is None and not is_observed(module):
        return F.rms_norm(hidden_states, module.normalized_shape, module.weight, module.eps)
    return hidden_states * _inverse_root_mean_square(hidden_states, module) * module.weight


def _inverse_root_mean_square(values: torch.Tensor, module: HELayerNorm | HERMSNorm) -> torch.Tensor:
    """1 / sqrt(mean(values^2) + eps) [..., 1] in the module's mode, its argument observed as "variance"."""
    variance = values.square().mean(-1, keepdim=True) + module.eps
    observe(module, "variance", variance, module.approximation)
    if module.approximation is None:
        return variance.rsqrt()
    return module.approximation.refine(variance, evaluate_polynomial(module.approximation.guess, variance))


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021), halves convention. Overridable.

    Args:
        states: [B, heads, T, head_dim]; features from `rotary_dim` on are left alone.
        cos: like `sin`, [B or 1, T, rotary_dim] of the tokens' positions.
    """
    if has_torch_function_unary(states):
        return handle_torch_function(apply_rotary, (states,), states, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = states.tensor_split((cos.shape[-1] // 2, cos.shape[-1]), dim=-1)
    rotated = torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((rotated, rest), -1)


def activation(hidden_states: torch.Tensor, module: PolynomialActivation) -> torch.Tensor:
    """The module's activation, elementwise, in the module's mode. Overridable."""
    if has_torch_function_unary(hidden_states):
        return handle_torch_function(activation, (hidden_states,), hidden_states, module)
    observe(module, "input", hidden_states, module.approximation)
    if module.approximation is None:
        return EXACT_ACTIVATIONS[module.function](hidden_states)
    return evaluate_polynomial(module.approximation, hidden_states)


class _PolynomialFunction(torch.autograd.Function):
    """p(x) keeping only x for the backward pass, which evaluates p'(x), instead of every Clenshaw step."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, polynomial: Polynomial) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.polynomial = polynomial
        return _blockwise_chebyshev(polynomial.coefficients, x, polynomial.interval)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        polynomial = ctx.polynomial
        return grad_output * _blockwise_chebyshev(polynomial.derivative_coefficients, x, polynomial.interval), None


def _blockwise_chebyshev(coefficients: tuple[float, ...], x: torch.Tensor, interval: tuple[float, float]) -> torch.Tensor:
    """Clenshaw in place over blocks that stay in the cache; same result as `evaluate_chebyshev` at the mapped input."""
    low, high = interval
    halved = halve_series(coefficients)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = x.detach().reshape(-1)
    for source, target in zip(flat.split(_BLOCK), result.view(-1).split(_BLOCK), strict=True):
        t = (source - 0.5 * (low + high)) * (2.0 / (high - low))
        if halved is None:
            _clenshaw_block(coefficients, t, target)
            continue
        reduced, odd = halved
        _clenshaw_block(reduced, 2.0 * t * t - 1.0, target)
        if odd:
            target.mul_(t).add_(coefficients[0])
        else:
            target.add_(t, alpha=coefficients[1])
    return result


def _clenshaw_block(coefficients: tuple[float, ...], t: torch.Tensor, out: torch.Tensor) -> None:
    twice = t + t
    current, previous = torch.full_like(t, coefficients[-1]), torch.zeros_like(t)
    for c in coefficients[-2:0:-1]:
        torch.sub(c, previous, out=previous).addcmul_(twice, current)
        current, previous = previous, current
    if len(coefficients) == 1:
        out.copy_(current)
    else:
        torch.sub(coefficients[0], previous, out=out).addcmul_(t, current)


def evaluate_polynomial(polynomial: Polynomial, x: torch.Tensor) -> torch.Tensor:
    """polynomial(x), differentiable once with memory independent of the degree."""
    return _PolynomialFunction.apply(x, polynomial)


@dataclass
class LayerRange:
    """What one layer's approximated quantity did: `statistic` is "variance" (what a norm takes the root of), "input", "exponent",
    "kernel_mean", "power_mean" or "score". NaN counts as both infinities; values that are not finite are out of range without an interval too."""

    statistic: str
    interval: tuple[float, float] | None
    minimum: float = float("inf")
    maximum: float = float("-inf")
    count: int = 0
    out_of_range: int = 0

    def update(self, values: torch.Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(values))
        if math.isnan(low):
            low, high = -math.inf, math.inf
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.count += values.numel()
        lowest, highest = self.interval or (torch.finfo(values.dtype).min, torch.finfo(values.dtype).max)
        if not _inside(low, high, (lowest, highest)):
            self.out_of_range += int(values.numel() - ((values >= lowest) & (values <= highest)).sum())


class _Observer(ABC):
    def __init__(self, model: nn.Module):
        self.names = {id(module): getattr(module, "layer_name", "") or name for name, module in model.named_modules()}

    @abstractmethod
    def record(self, name: str, module: nn.Module, statistic: str, values: torch.Tensor) -> None: ...


@dataclass
class RangeTracker:
    """Context manager that records, per layer of `model`, the range of every approximated quantity, in any mode.

    `ranges` maps layer names to `LayerRange`. Padding positions count, since they flow through the same ciphertexts; so does every
    query-key pair of an attention exponent, masked ones included, because all slots go through the squarings before the mask. With a
    calibrated interval (either mode), values outside are counted in `out_of_range`; while tracking they do not raise. Forward
    passes repeated by gradient checkpointing are counted again. Ranges accumulate over several `with` blocks.
    """

    model: nn.Module
    ranges: dict[str, LayerRange] = field(default_factory=dict)

    def __enter__(self) -> RangeTracker:
        self._observer = _Recorder(self.model, self.ranges)
        _observers.append(self._observer)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _observers.remove(self._observer)

    @property
    def out_of_range(self) -> int:
        return sum(r.out_of_range for r in self.ranges.values())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{layer: {statistic, interval, minimum, maximum, count, out_of_range}}, JSON-ready as long as minimum and maximum are finite."""
        return {name: asdict(r) for name, r in self.ranges.items()}


class _Recorder(_Observer):
    def __init__(self, model: nn.Module, ranges: dict[str, LayerRange]):
        super().__init__(model)
        self.ranges = ranges

    def record(self, name: str, module: nn.Module, statistic: str, values: torch.Tensor) -> None:
        if name not in self.ranges:
            self.ranges[name] = LayerRange(statistic, getattr(module, "interval", None))
        self.ranges[name].update(values.detach())


class _Collector(_Observer):
    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.statistics: dict[str, torch.Tensor] = {}

    def record(self, name: str, module: nn.Module, statistic: str, values: torch.Tensor) -> None:
        self.statistics[name] = values


@contextmanager
def collect_ranges(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dict that the forward passes inside fill with {layer name: live tensor of the approximated quantity}, for a range penalty.

    Tensors keep their graph: variances [B, T, 1], activation inputs [..., F], kernel exponents [B, heads, T, T]. A layer that runs
    twice keeps its last tensor. Values outside the fitted interval do not raise inside. Under gradient checkpointing use the
    non-reentrant kind (transformers' default; with the other the tensors carry no gradient) and call backward inside the block, so
    that the recomputation takes the same path.
    """
    observer = _Collector(model)
    _observers.append(observer)
    try:
        yield observer.statistics
    finally:
        _observers.remove(observer)


def is_observed(module: nn.Module) -> bool:
    return any(id(module) in observer.names for observer in _observers)


def observe(module: nn.Module, statistic: str, values: torch.Tensor, approximation: Any | None) -> None:
    """Hand `values`, the quantity that `module` approximates, to the active trackers; without one, check them against `approximation`.

    Raises:
        RangeError: nobody is tracking and a value is outside the interval of `approximation` (None: exact mode, no check).
        ApproximationError: 16-bit values for a polynomial, in which repeated squaring loses every digit.
    """
    if approximation is not None and values.dtype in (torch.float16, torch.bfloat16):
        raise ApproximationError(
            f"{_layer(module)}: polynomial mode needs float32 or float64, got {values.dtype}: use dtype=torch.float32, and no autocast, bf16 or fp16."
        )
    if not values.numel():
        return
    observed = False
    for observer in _observers:
        name = observer.names.get(id(module))
        if name is not None:
            observer.record(name, module, statistic, values)
            observed = True
    if observed or approximation is None:
        return
    low, high = (float(v) for v in torch.aminmax(values.detach()))
    if not _inside(low, high, approximation.interval):
        worst = high if low >= approximation.interval[0] else low
        raise RangeError(
            f"{_layer(module)}: {statistic} {worst:g} is outside the fitted interval "
            f"[{approximation.interval[0]:g}, {approximation.interval[1]:g}]. Calibrate on data like this, train with the range penalty, "
            "or count such values with RangeTracker."
        )


def _layer(module: nn.Module) -> str:
    return getattr(module, "layer_name", "") or type(module).__name__


def _inside(low: float, high: float, interval: tuple[float, float]) -> bool:
    return low >= interval[0] and high <= interval[1]


def _describe(approximation: Any | None) -> str:
    if approximation is None:
        return "exact"
    low, high = approximation.interval
    return f"polynomial on [{low:g}, {high:g}], depth {approximation.depth}"
