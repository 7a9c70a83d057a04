"""hf_he: private fine-tuning and generation with language models on CKKS ciphertexts.

Importing it registers the `gaussian_kernel` and `power_softmax` attention implementations and the HE models with transformers, so that
`AutoModelForSequenceClassification.from_pretrained` and its siblings load them. The encrypted side is imported on first use.
"""

from importlib import import_module
from typing import Any

from hf_he import attention as _attention  # noqa: F401  (registers the attention implementations)
from hf_he.attention import check_attention
from hf_he.models import (
    HEBertConfig,
    HEBertForMaskedLM,
    HEBertForSequenceClassification,
    HEBertModel,
    HEBertPreTrainedModel,
    HEGPTNeoXConfig,
    HEGPTNeoXForCausalLM,
    HEGPTNeoXForSequenceClassification,
    HEGPTNeoXModel,
    HEGPTNeoXPreTrainedModel,
    HELlamaConfig,
    HELlamaForCausalLM,
    HELlamaForSequenceClassification,
    HELlamaModel,
    HELlamaPreTrainedModel,
    convert_bert,
    convert_gpt_neox,
    convert_llama,
    save_hub_shim,
)
from hf_he.nn import RangeTracker, collect_ranges

__version__ = "0.1.0"

_LAZY = {
    "Client": "hf_he.client",
    "Degrees": "hf_he.training.range_penalty",
    "EncryptedTensor": "hf_he.tensor",
    "EncryptedTrainer": "hf_he.finetuning.trainer",
    "EncryptedTrainingArguments": "hf_he.finetuning.arguments",
    "FinetuneServer": "hf_he.finetuning.server",
    "GenerationClient": "hf_he.generation.client",
    "GenerationServer": "hf_he.generation.server",
    "HELoraConfig": "hf_he.peft",
    "RangePenalty": "hf_he.training.range_penalty",
    "RangeTargets": "hf_he.training.range_penalty",
    "RangedTrainer": "hf_he.training.ranged_trainer",
    "Server": "hf_he.server",
    "calibrated": "hf_he.training.conversion",
    "connect": "hf_he.remote",
    "encrypted_generate": "hf_he.generation.generate",
    "get_backend": "hf_he.backends",
    "set_default_device": "hf_he.backends",
    "track_ranges": "hf_he.training.range_penalty",
}

__all__ = [
    "Client",
    "Degrees",
    "EncryptedTensor",
    "EncryptedTrainer",
    "EncryptedTrainingArguments",
    "FinetuneServer",
    "GenerationClient",
    "GenerationServer",
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
    "HELoraConfig",
    "RangePenalty",
    "RangeTargets",
    "RangeTracker",
    "RangedTrainer",
    "Server",
    "calibrated",
    "check_attention",
    "collect_ranges",
    "connect",
    "convert_bert",
    "convert_gpt_neox",
    "convert_llama",
    "encrypted_generate",
    "get_backend",
    "save_hub_shim",
    "set_default_device",
    "track_ranges",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hf_he' has no attribute {name!r}")
