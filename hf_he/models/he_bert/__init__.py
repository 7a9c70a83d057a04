"""HEBert and its registration with transformers and peft."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from hf_he._compat import set_default_lora_targets
from hf_he.models.he_bert.configuration_he_bert import HEBertConfig
from hf_he.models.he_bert.convert_he_bert import convert_bert
from hf_he.models.he_bert.modeling_he_bert import (
    HEBertForMaskedLM,
    HEBertForSequenceClassification,
    HEBertModel,
    HEBertPreTrainedModel,
)

AutoConfig.register(HEBertConfig.model_type, HEBertConfig, exist_ok=True)
AutoModel.register(HEBertConfig, HEBertModel, exist_ok=True)
AutoModelForMaskedLM.register(HEBertConfig, HEBertForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(HEBertConfig, HEBertForSequenceClassification, exist_ok=True)
AutoTokenizer.register(HEBertConfig, fast_tokenizer_class=BertTokenizer, exist_ok=True)
set_default_lora_targets(HEBertConfig.model_type, ["query", "value"])

__all__ = [
    "HEBertConfig",
    "HEBertForMaskedLM",
    "HEBertForSequenceClassification",
    "HEBertModel",
    "HEBertPreTrainedModel",
    "convert_bert",
]
