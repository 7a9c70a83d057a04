"""Encrypted operations. Each file has `reference` (torch, plaintext) beside `encrypted`, and says which rotations it needs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hf_he.errors import ShapeError
from hf_he.ops import attention, linear, reduce
from hf_he.packing import Packing

__all__ = ["required_rotations"]


def required_rotations(config: Any, packing: Packing, lora_rank: int = 0) -> set[int]:
    """Rotation steps (in 1 .. slots - 1) that an encrypted forward of a HEBert sequence classifier uses: what its evaluation keys must cover.

    `lora_rank`: of unmerged (plaintext) LoRA adapters on maps of the hidden state; merged ones need nothing more.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    if packing.features != hidden:
        raise ShapeError(f"the packing has {packing.features} features per ciphertext, the model {hidden}: use Packing.fit(slots, {hidden}, tokens)")
    steps = attention.rotations(packing, config.num_attention_heads) | reduce.rotations(packing)
    steps |= linear.rotations(packing, hidden, hidden, hidden, hidden) | linear.rotations(packing, hidden, hidden)
    steps |= linear.rotations(packing, hidden, wide) | linear.rotations(packing, wide, hidden)
    if lora_rank:
        steps |= linear.rotations(packing, hidden, lora_rank) | linear.rotations(packing, lora_rank, hidden)
    head = [hidden, *config.classifier_hidden_sizes, config.num_labels]
    for narrow, following in pairwise(head):
        steps |= linear.rotations(packing, narrow, following)
    return steps
