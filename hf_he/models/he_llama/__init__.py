"""HELlama and its registration with transformers and peft."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_he._compat import set_default_lora_targets
from hf_he.models.he_llama.configuration_he_llama import HELlamaConfig
from hf_he.models.he_llama.convert_he_llama import convert_llama
from hf_he.models.he_llama.modeling_he_llama import HELlamaForCausalLM, HELlamaForSequenceClassification, HELlamaModel, HELlamaPreTrainedModel

AutoConfig.register(HELlamaConfig.model_type, HELlamaConfig, exist_ok=True)
AutoModel.register(HELlamaConfig, HELlamaModel, exist_ok=True)
AutoModelForCausalLM.register(HELlamaConfig, HELlamaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HELlamaConfig, HELlamaForSequenceClassification, exist_ok=True)
set_default_lora_targets(HELlamaConfig.model_type, ["q_proj", "v_proj"])

__all__ = [
    "HELlamaConfig",
    "HELlamaForCausalLM",
    "HELlamaForSequenceClassification",
    "HELlamaModel",
    "HELlamaPreTrainedModel",
    "convert_llama",
]
