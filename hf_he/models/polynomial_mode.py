"""What every HE model has beside transformers' `PreTrainedModel`: exact and polynomial mode, and the Hub shim on save."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from hf_he.errors import ApproximationError
from hf_he.models.hub_shim import save_hub_shim
from hf_he.nn import PolynomialLayer

_PEFT_COPY = re.compile(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)")
"""What peft puts into the name of a module that it trains beside its adapters; `config.approximations` has the name without it."""


class PolynomialModeMixin:
    """Goes before `PreTrainedModel` in the bases. The config has the fields `attention_kernel`, `mode` and `approximations`."""

    def post_init(self) -> None:
        super().post_init()
        self.set_mode(self.config.mode)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """transformers looks for its attention interface in the file of the model, which leaves it to kernel_attention.py."""
        return True

    def polynomial_layers(self) -> dict[str, PolynomialLayer]:
        """Every layer that needs an approximation, by its module name."""
        prefix = f"{self.base_model_prefix}." if self.base_model is self else ""
        return {f"{prefix}{name}": m for name, m in self.named_modules() if isinstance(m, PolynomialLayer)}

    def set_mode(self, mode: str) -> None:
        """Run with the exact functions ("exact") or with the polynomials of `config.approximations` ("polynomial"). An error changes nothing.

        Raises:
            ApproximationError: unknown mode, softmax attention, layers without an entry, or an entry that no polynomial fits.
        """
        self._configure(mode, self.config.approximations)
        self.config.mode = mode

    def set_approximations(self, approximations: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace `config.approximations` and rebuild what the current mode uses. Errors as for `set_mode`."""
        entries = {name: dict(entry) for name, entry in approximations.items()}
        self._configure(self.config.mode, entries)
        self.config.approximations = entries

    def _configure(self, mode: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Switch every layer, after all approximations have been fitted once; fits are cached."""
        if mode == "polynomial" and self.config.attention_kernel == "softmax":
            raise ApproximationError("softmax attention has no polynomial form. Convert the model to attention_kernel='gaussian_kernel'.")
        layers = [(_PEFT_COPY.sub("", name), layer) for name, layer in self.polynomial_layers().items()]
        missing = sorted({name for name, _ in layers if name not in entries})
        if mode == "polynomial" and missing:
            raise ApproximationError(
                f"{len(missing)} layers have no entry in config.approximations ({', '.join(missing)}). Run calibration (load with "
                "mode='exact', record ranges with RangeTracker on representative data, then set_approximations) before polynomial mode."
            )
        for name, layer in layers:
            layer.layer_name = name
            layer.prepare(mode, entries.get(name))
        for name, layer in layers:
            layer.configure(mode, entries.get(name))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained` plus the three-line module with which `trust_remote_code=True` finds this package."""
        save_hub_shim(save_directory, self.config)
        super().save_pretrained(save_directory, **kwargs)
