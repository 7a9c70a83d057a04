"""What the attention modules of every HE model share: the kernel named in the config and its polynomial form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_he._compat import ALL_ATTENTION_FUNCTIONS
from hf_he.approximation import KernelExponential, Polynomial, Reciprocal, fit_reciprocal, kernel_exponential, power_polynomial
from hf_he.attention import gaussian_kernel_attention, normalized_gaussian_kernel_attention, power_softmax_attention, softmax_attention
from hf_he.nn import EXACT_ACTIVATIONS, MODES, PolynomialLayer

KERNELS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "softmax": softmax_attention,
    "gaussian_kernel": gaussian_kernel_attention,
    "normalized_gaussian_kernel": normalized_gaussian_kernel_attention,
    "power_softmax": power_softmax_attention,
}


class RowReciprocal(PolynomialLayer):
    """What the normalized Gaussian kernel divides by. Entry: {"interval", "degree", "goldschmidt_steps"} on eps + mean weight of a row."""

    entry_keys = ("interval", "degree", "goldschmidt_steps")

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.approximation: Reciprocal | None = None

    def build_approximation(self, entry: Mapping[str, Any]) -> Reciprocal:
        return fit_reciprocal((float(entry["interval"][0]), float(entry["interval"][1])), entry["degree"], entry["goldschmidt_steps"])


class KernelAttention(PolynomialLayer):
    """Base of attention modules; subclasses have projections and call `attend`.

    Entry: {"interval", "squarings"} on the exponent (Gaussian kernels; the normalized one has a `normalizer` with an entry of its own), {"interval",
    "degree", "goldschmidt_steps"} on eps + mean x^p (power_softmax), {"interval"} on the shifted scores (power_softmax with a constant divisor).
    """

    is_causal: bool
    scaling: float

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.kernel_approximation: KernelExponential | Reciprocal | Polynomial | None = None
        if config.attention_kernel == "normalized_gaussian_kernel":
            self.normalizer = RowReciprocal(config)
        if config.attention_kernel != "power_softmax":
            self.entry_keys = ("interval", "squarings")
        elif config.power_softmax_divisor is None:
            self.entry_keys = ("interval", "degree", "goldschmidt_steps")
        else:
            self.entry_keys = ("interval",)

    def build_approximation(self, entry: Mapping[str, Any]) -> KernelExponential | Reciprocal | Polynomial:
        interval = (float(entry["interval"][0]), float(entry["interval"][1]))
        if self.config.attention_kernel != "power_softmax":
            return kernel_exponential(interval, entry["squarings"])
        if self.config.power_softmax_divisor is None:
            return fit_reciprocal(interval, entry["degree"], entry["goldschmidt_steps"])
        return power_polynomial(interval, self.config.power_softmax_degree)

    def install_approximation(self, approximation: KernelExponential | Reciprocal | Polynomial | None) -> None:
        self.kernel_approximation = approximation

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention with the config's kernel, or with the `attn_implementation` that was asked for explicitly; `dropout` applies while
        training. Shapes as for `gaussian_kernel_attention`."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, KERNELS[self.config.attention_kernel])
        dropout = dropout if self.training else 0.0
        return interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)


def validate_kernel(config: PreTrainedConfig) -> None:
    """The checks of the config fields that every HE model has. Raises ValueError with the allowed values."""
    for name, allowed in {"attention_kernel": KERNELS, "mode": MODES, "hidden_act": EXACT_ACTIVATIONS}.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}.")
    if config.power_softmax_degree < 2 or config.power_softmax_degree % 2:
        raise ValueError(f"power_softmax_degree must be even and positive, got {config.power_softmax_degree}.")
    for name in ("power_softmax_eps", "power_softmax_divisor"):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")
