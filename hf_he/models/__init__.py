"""One folder per architecture: configuration, modeling, conversion from stock checkpoints, registration."""

from hf_he.models.he_bert import (
    HEBertConfig,
    HEBertForMaskedLM,
    HEBertForSequenceClassification,
    HEBertModel,
    HEBertPreTrainedModel,
    convert_bert,
)
from hf_he.models.he_gpt_neox import (
    HEGPTNeoXConfig,
    HEGPTNeoXForCausalLM,
    HEGPTNeoXForSequenceClassification,
    HEGPTNeoXModel,
    HEGPTNeoXPreTrainedModel,
    convert_gpt_neox,
)
from hf_he.models.he_llama import (
    HELlamaConfig,
    HELlamaForCausalLM,
    HELlamaForSequenceClassification,
    HELlamaModel,
    HELlamaPreTrainedModel,
    convert_llama,
)
from hf_he.models.hub_shim import save_hub_shim

__all__ = [
    "HEBertConfig",
    "HEBertForMaskedLM",
    "HEBertForSequenceClassification",
    "HEBertModel",
    "HEBertPreTrainedModel",
    "HEGPTNeoXConfig",
    "HEGPTNeoXForCausalLM",
    "HEGPTNeoXForSequenceClassification",
    "HEGPTNeoXModel",
    "HEGPTNeoXPreTrainedModel",
    "HELlamaConfig",
    "HELlamaForCausalLM",
    "HELlamaForSequenceClassification",
    "HELlamaModel",
    "HELlamaPreTrainedModel",
    "convert_bert",
    "convert_gpt_neox",
    "convert_llama",
    "save_hub_shim",
]
