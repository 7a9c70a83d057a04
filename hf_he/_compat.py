"""Names of transformers and peft that are not part of their documented API, gathered in one place. Checked with 5.23 and 0.21."""

from __future__ import annotations

from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

__all__ = ["ALL_ATTENTION_FUNCTIONS", "AttentionInterface", "AttentionMaskInterface", "sdpa_mask", "set_default_lora_targets"]


def set_default_lora_targets(model_type: str, targets: list[str]) -> None:
    """Let `LoraConfig` find its target modules for `model_type` when the caller names none. Does nothing without peft."""
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    except ModuleNotFoundError:
        return
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type] = targets
