"""Stock BERT checkpoints to HEBert, by name."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, BertPreTrainedModel

from hf_he.errors import UnsupportedModelError
from hf_he.models.he_bert.configuration_he_bert import HEBertConfig
from hf_he.models.he_bert.modeling_he_bert import (
    HEBertForMaskedLM,
    HEBertForSequenceClassification,
    HEBertModel,
    HEBertPreTrainedModel,
)
from hf_he.nn import EXACT_ACTIVATIONS

# BertForPreTraining's next-sentence head has no place in HEBert and is dropped.
_SOURCES: dict[str, type[BertPreTrainedModel]] = {
    "BertModel": BertModel,
    "BertForMaskedLM": BertForMaskedLM,
    "BertForPreTraining": BertForMaskedLM,
    "BertForSequenceClassification": BertForSequenceClassification,
}
_TARGETS: dict[type[BertPreTrainedModel], type[HEBertPreTrainedModel]] = {
    BertModel: HEBertModel,
    BertForMaskedLM: HEBertForMaskedLM,
    BertForSequenceClassification: HEBertForSequenceClassification,
}
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "classifier_dropout",
    "tie_word_embeddings",
    "id2label",
    "label2id",
    "problem_type",
)


@torch.no_grad()
def convert_bert(
    source: BertPreTrainedModel | str | os.PathLike,
    attention_kernel: str = "gaussian_kernel",
    target_class: type[HEBertPreTrainedModel] | None = None,
    new_modules: tuple[str, ...] = (),
    **config_overrides: Any,
) -> HEBertPreTrainedModel:
    """Copy a stock BERT into an HEBert of the same shape; every weight keeps its name.

    With `attention_kernel="softmax"` the result computes the same function; with another kernel it needs training.

    Args:
        source: a stock model, or a checkpoint directory or Hub name.
        target_class: the HEBert class; by default the counterpart of the source's class.
        new_modules: prefixes of modules that the source lacks and that may stay randomly initialised, e.g. ("bert.pooler",
            "classifier") to put a classifier on a masked language model. Anything else missing is an error.
        config_overrides: further `HEBertConfig` fields, e.g. `num_labels=2`.

    Returns:
        the model in eval mode, in the source's dtype.

    Raises:
        UnsupportedModelError: not an encoder-only BERT, or a weight of the target has no counterpart.
    """
    if not isinstance(source, BertPreTrainedModel):
        source = _load(source)
    config = source.config
    if config.is_decoder or config.add_cross_attention:
        raise UnsupportedModelError("HEBert is an encoder: a BERT with is_decoder or cross-attention cannot be converted.")
    if target_class is None:
        target_class = next((t for s, t in _TARGETS.items() if isinstance(source, s)), None)
        if target_class is None:
            raise UnsupportedModelError(f"{type(source).__name__} has no HEBert counterpart; pass target_class.")
    fields = {k: v for k, v in config.to_dict().items() if k in _SHARED_FIELDS}
    fields |= {"attention_kernel": attention_kernel, **config_overrides}
    if fields["hidden_act"] not in EXACT_ACTIVATIONS:
        raise UnsupportedModelError(f"No polynomial for hidden_act={fields['hidden_act']!r}; pass the closest of {', '.join(EXACT_ACTIVATIONS)} as hidden_act.")
    target_config = HEBertConfig(**fields)
    target = target_class(target_config).to(source.dtype)
    weights = _renamed(source, target)
    missing = [name for name in target.state_dict() if name not in weights]
    unexplained = [name for name in missing if not name.startswith(new_modules)] if new_modules else missing
    if unexplained:
        raise UnsupportedModelError(
            f"{type(source).__name__} has no weights for {', '.join(unexplained)}. Name their modules in new_modules to leave them random."
        )
    target.load_state_dict({name: value for name, value in weights.items() if name in target.state_dict()}, strict=False)
    target.tie_weights()
    return target.eval()


def _load(directory: str | os.PathLike) -> BertPreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    if config.model_type != "bert":
        raise UnsupportedModelError(f"{directory} holds a {config.model_type!r} model; convert_bert needs a 'bert' one.")
    architecture = (config.architectures or ["BertModel"])[0]
    if architecture not in _SOURCES:
        raise UnsupportedModelError(f"{architecture} has no HEBert counterpart; load it yourself and pass target_class.")
    model, report = _SOURCES[architecture].from_pretrained(directory, output_loading_info=True)
    if report["missing_keys"]:
        raise UnsupportedModelError(f"{directory} lacks weights: {', '.join(sorted(report['missing_keys']))}.")
    return model


def _renamed(source: BertPreTrainedModel, target: HEBertPreTrainedModel) -> dict[str, torch.Tensor]:
    """The source's weights under the target's names: they only differ by the "bert." prefix of a bare encoder."""
    weights = source.state_dict()
    if source.base_model is source and target.base_model is not target:
        return {f"bert.{name}": value for name, value in weights.items()}
    if target.base_model is target and source.base_model is not source:
        return {name.removeprefix("bert."): value for name, value in weights.items() if name.startswith("bert.")}
    return weights


__all__ = ["convert_bert"]
