"""Stock BERT checkpoints to HEBert, by name."""

from __future__ import annotations

import os
from typing import Any

from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, BertPreTrainedModel

from hf_he.errors import UnsupportedModelError
from hf_he.models.conversion import StockFamily
from hf_he.models.he_bert.configuration_he_bert import HEBertConfig
from hf_he.models.he_bert.modeling_he_bert import (
    HEBertForMaskedLM,
    HEBertForSequenceClassification,
    HEBertModel,
    HEBertPreTrainedModel,
)

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
# BertForPreTraining's next-sentence head has no place in HEBert and is dropped.
_FAMILY = StockFamily(
    "HEBert",
    "bert",
    BertPreTrainedModel,
    HEBertConfig,
    {
        "BertModel": (BertModel, HEBertModel),
        "BertForMaskedLM": (BertForMaskedLM, HEBertForMaskedLM),
        "BertForPreTraining": (BertForMaskedLM, HEBertForMaskedLM),
        "BertForSequenceClassification": (BertForSequenceClassification, HEBertForSequenceClassification),
    },
    _SHARED_FIELDS,
)
_DIVIDING = ("normalized_gaussian_kernel", "power_softmax")


def convert_bert(
    source: BertPreTrainedModel | str | os.PathLike,
    attention_kernel: str = "gaussian_kernel",
    target_class: type[HEBertPreTrainedModel] | None = None,
    new_modules: tuple[str, ...] = (),
    **config_overrides: Any,
) -> HEBertPreTrainedModel:
    """Copy a stock BERT into an HEBert of the same shape; every weight keeps its name.

    With `attention_kernel="softmax"` the result computes the same function; with another kernel it needs training. Kernels that divide by a sum over the
    keys get `power_softmax_length_agnostic=True` unless told otherwise: the number of valid keys is encrypted.

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
    source = _FAMILY.load(source)
    if source.config.is_decoder or source.config.add_cross_attention:
        raise UnsupportedModelError("HEBert is an encoder: a BERT with is_decoder or cross-attention cannot be converted.")
    overrides: dict[str, Any] = {"attention_kernel": attention_kernel, **config_overrides}
    if attention_kernel in _DIVIDING and config_overrides.get("power_softmax_divisor") is None:
        overrides.setdefault("power_softmax_length_agnostic", True)
    return _FAMILY.convert(source, target_class, new_modules, overrides)


__all__ = ["convert_bert"]
