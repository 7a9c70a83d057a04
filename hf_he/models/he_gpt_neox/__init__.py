"""HEGPTNeoX and its registration with transformers and peft."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPTNeoXTokenizer

from hf_he._compat import inherit_checkpoint_renames, set_default_lora_targets
from hf_he.models.he_gpt_neox.configuration_he_gpt_neox import HEGPTNeoXConfig
from hf_he.models.he_gpt_neox.convert_he_gpt_neox import convert_gpt_neox
from hf_he.models.he_gpt_neox.modeling_he_gpt_neox import HEGPTNeoXForCausalLM, HEGPTNeoXForSequenceClassification, HEGPTNeoXModel, HEGPTNeoXPreTrainedModel

AutoConfig.register(HEGPTNeoXConfig.model_type, HEGPTNeoXConfig, exist_ok=True)
AutoModel.register(HEGPTNeoXConfig, HEGPTNeoXModel, exist_ok=True)
AutoModelForCausalLM.register(HEGPTNeoXConfig, HEGPTNeoXForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HEGPTNeoXConfig, HEGPTNeoXForSequenceClassification, exist_ok=True)
AutoTokenizer.register(HEGPTNeoXConfig, fast_tokenizer_class=GPTNeoXTokenizer, exist_ok=True)
set_default_lora_targets(HEGPTNeoXConfig.model_type, ["query_key_value"])
inherit_checkpoint_renames(HEGPTNeoXForCausalLM.__name__, "GPTNeoXForCausalLM")

__all__ = [
    "HEGPTNeoXConfig",
    "HEGPTNeoXForCausalLM",
    "HEGPTNeoXForSequenceClassification",
    "HEGPTNeoXModel",
    "HEGPTNeoXPreTrainedModel",
    "convert_gpt_neox",
]
