"""One folder per architecture: configuration, modeling, conversion from stock checkpoints, registration."""

from hf_he.models.he_bert import (
    HEBertConfig,
    HEBertForMaskedLM,
    HEBertForSequenceClassification,
    HEBertModel,
    HEBertPreTrainedModel,
    convert_bert,
)
from hf_he.models.hub_shim import save_hub_shim

__all__ = [
    "HEBertConfig",
    "HEBertForMaskedLM",
    "HEBertForSequenceClassification",
    "HEBertModel",
    "HEBertPreTrainedModel",
    "convert_bert",
    "save_hub_shim",
]
