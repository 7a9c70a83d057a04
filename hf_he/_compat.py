"""Names of transformers and peft that are not part of their documented API, gathered in one place. Checked with 5.23 and 0.21."""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, slice_logits_to_keep
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import maybe_autocast

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "GPTNeoXRotaryEmbedding",
    "LlamaRotaryEmbedding",
    "create_causal_mask",
    "inherit_checkpoint_renames",
    "maybe_autocast",
    "sdpa_mask",
    "set_default_lora_targets",
    "slice_logits_to_keep",
]


def set_default_lora_targets(model_type: str, targets: list[str]) -> None:
    """Let `LoraConfig` find its target modules for `model_type` when the caller names none. Does nothing without peft."""
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    except ModuleNotFoundError:
        return
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type] = targets


def inherit_checkpoint_renames(class_name: str, stock_class_name: str) -> None:
    """Load checkpoints of `stock_class_name` into `class_name` under the same weight renames, which transformers keys by class name."""
    register_checkpoint_conversion_mapping(class_name, get_checkpoint_conversion_mapping(stock_class_name), overwrite=True)
