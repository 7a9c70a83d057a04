"""Stock GPT-NeoX checkpoints to HEGPTNeoX, by name."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXModel, GPTNeoXPreTrainedModel

from hf_he.models.conversion import StockFamily
from hf_he.models.he_gpt_neox.configuration_he_gpt_neox import HEGPTNeoXConfig
from hf_he.models.he_gpt_neox.modeling_he_gpt_neox import HEGPTNeoXForCausalLM, HEGPTNeoXForSequenceClassification, HEGPTNeoXModel, HEGPTNeoXPreTrainedModel

_FAMILY = StockFamily(
    "HEGPTNeoX",
    "gpt_neox",
    GPTNeoXPreTrainedModel,
    HEGPTNeoXConfig,
    {
        "GPTNeoXModel": (GPTNeoXModel, HEGPTNeoXModel),
        "GPTNeoXForCausalLM": (GPTNeoXForCausalLM, HEGPTNeoXForCausalLM),
        "GPTNeoXForSequenceClassification": (GPTNeoXForSequenceClassification, HEGPTNeoXForSequenceClassification),
    },
)


def convert_gpt_neox(
    source: GPTNeoXPreTrainedModel | str | os.PathLike,
    attention_kernel: str = "gaussian_kernel",
    target_class: type[HEGPTNeoXPreTrainedModel] | None = None,
    new_modules: tuple[str, ...] = (),
    **config_overrides: Any,
) -> HEGPTNeoXPreTrainedModel:
    """Copy a stock GPT-NeoX into an HEGPTNeoX of the same shape; every weight keeps its name.

    With `attention_kernel="softmax"` the result computes the same function; with another kernel it needs training.

    Args:
        source: a stock model, or a checkpoint directory or Hub name.
        target_class: the HEGPTNeoX class; by default the counterpart of the source's class.
        new_modules: prefixes of modules that the source lacks and that may stay randomly initialised, e.g. ("score",) to put a classifier
            on a language model. Anything else missing is an error.
        config_overrides: further `HEGPTNeoXConfig` fields, e.g. `power_softmax_degree=6`.

    Returns:
        the model in eval mode, in the source's dtype, with the source's generation config.

    Raises:
        UnsupportedModelError: another model, an activation without a polynomial, or a weight of the target has no counterpart.
    """
    source = _FAMILY.load(source)
    model = _FAMILY.convert(source, target_class, new_modules, {"attention_kernel": attention_kernel, **config_overrides})
    if model.can_generate() and source.can_generate():
        model.generation_config = deepcopy(source.generation_config)
    return model


__all__ = ["convert_gpt_neox"]
