"""From a stock transformers model to the HE model of the same shape: every weight keeps its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_he.errors import UnsupportedModelError
from hf_he.nn import EXACT_ACTIVATIONS

_ABOUT_THE_FILE = ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config", "_name_or_path")


@dataclass(frozen=True)
class StockFamily:
    """One stock architecture and its HE counterpart.

    `classes` maps the architecture in a stock config.json to the stock class that loads it and the HE class it becomes; `shared_fields`
    are the config fields carried over, None for all.
    """

    name: str
    model_type: str
    stock_base: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    classes: Mapping[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]]
    shared_fields: tuple[str, ...] | None = None

    def load(self, source: PreTrainedModel | str | os.PathLike) -> PreTrainedModel:
        """`source` itself, or the stock model of a checkpoint directory or Hub name, with nothing missing.

        Raises:
            UnsupportedModelError: another model type, an architecture without counterpart, or missing weights.
        """
        if isinstance(source, self.stock_base):
            return source
        if isinstance(source, PreTrainedModel):
            raise UnsupportedModelError(f"{type(source).__name__} is not a {self.model_type!r} model and has no {self.name} counterpart.")
        config = AutoConfig.from_pretrained(source)
        if config.model_type != self.model_type:
            raise UnsupportedModelError(f"{source} holds a {config.model_type!r} model; {self.name} is converted from a {self.model_type!r} one.")
        architecture = (config.architectures or [next(iter(self.classes))])[0]
        if architecture not in self.classes:
            raise UnsupportedModelError(f"{architecture} has no {self.name} counterpart; load it yourself and pass target_class.")
        model, report = self.classes[architecture][0].from_pretrained(source, output_loading_info=True)
        if report["missing_keys"]:
            raise UnsupportedModelError(f"{source} lacks weights: {', '.join(sorted(report['missing_keys']))}.")
        return model

    @torch.no_grad()
    def convert(
        self,
        source: PreTrainedModel,
        target_class: type[PreTrainedModel] | None,
        new_modules: tuple[str, ...],
        overrides: Mapping[str, Any],
    ) -> PreTrainedModel:
        """The HE model with the weights of `source`; see the converters for the arguments.

        Raises:
            UnsupportedModelError: no counterpart, an activation without polynomial, a weight of the target that the source lacks or has in another shape,
                or a weight of the source without a place in the target, unless a whole head or pooler is left behind.
        """
        if target_class is None:
            target_class = next((target for stock, target in self.classes.values() if isinstance(source, stock)), None)
            if target_class is None:
                raise UnsupportedModelError(f"{type(source).__name__} has no {self.name} counterpart; pass target_class.")
        fields = {k: v for k, v in source.config.to_dict().items() if k not in _ABOUT_THE_FILE}
        if self.shared_fields is not None:
            fields = {k: v for k, v in fields.items() if k in self.shared_fields}
        fields |= overrides
        if fields["hidden_act"] not in EXACT_ACTIVATIONS:
            raise UnsupportedModelError(
                f"No polynomial for hidden_act={fields['hidden_act']!r}; pass the closest of {', '.join(EXACT_ACTIVATIONS)} as hidden_act."
            )
        target = target_class._from_config(self.config_class(**fields), dtype=source.dtype)
        shapes = {name: value.shape for name, value in target.state_dict().items()}
        renamed, depth, modules = _renamed(source, target), 1 + (target.base_model is not target), dict(target.named_modules())
        lost = [name for name in renamed if name not in shapes and ".".join(name.split(".")[:-1][:depth]) in modules]
        if lost:
            raise UnsupportedModelError(f"{type(target).__name__} has no place for {', '.join(lost)}: leave out the config field that takes it away.")
        weights = {name: value for name, value in renamed.items() if name in shapes and value.shape == shapes[name]}
        missing = [name for name in shapes if name not in weights]
        unexplained = [name for name in missing if not name.startswith(new_modules)] if new_modules else missing
        if unexplained:
            raise UnsupportedModelError(
                f"{type(source).__name__} has no weights for {', '.join(unexplained)}, or in another shape. "
                "Name their modules in new_modules to leave them random."
            )
        target.load_state_dict(weights, strict=False)
        target.tie_weights()
        return target.eval()


def _renamed(source: PreTrainedModel, target: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The source's weights under the target's names: they only differ by the prefix of a bare base model."""
    weights, prefix = source.state_dict(), f"{target.base_model_prefix}."
    if source.base_model is source and target.base_model is not target:
        return {f"{prefix}{name}": value for name, value in weights.items()}
    if target.base_model is target and source.base_model is not source:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights
