"""Classes of the hf-he package (pip install hf_he)."""

from hf_he import HEGPTNeoXConfig, HEGPTNeoXForCausalLM, HEGPTNeoXForSequenceClassification, HEGPTNeoXModel
