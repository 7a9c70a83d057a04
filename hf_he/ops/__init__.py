"""Encrypted operations. Each file has `reference` (torch, plaintext) beside `encrypted`, and says which rotations it needs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hf_he.errors import ShapeError, UnsupportedModelError
from hf_he.ops import attention, attention_gradient, feature_major_attention, feature_major_attention_gradient, linear, power_softmax, reduce, rotary, weights
from hf_he.packing import Packing

__all__ = ["DECODERS", "required_rotations"]

DECODERS = ("he_gpt_neox", "he_llama")
"""Model types with a causal forward."""


def required_rotations(config: Any, packing: Packing, lora_rank: int = 0, training: bool = False) -> set[int]:
    """Rotation steps (in 1 .. slots - 1) that an encrypted forward uses, of a HEBert sequence classifier or of a decoder with its language-model
    head: what its evaluation keys must cover.

    `lora_rank`: of unmerged LoRA adapters on maps of the hidden state; merged ones need nothing more. `training`: a sequence classifier's forward
    and backward with encrypted adapters and an encrypted head; plaintext ones are run with training=False.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    if packing.features == 1 and config.model_type not in DECODERS and config.attention_kernel == "gaussian_kernel":
        if training:
            return feature_major_attention_gradient.rotations(packing) | weights.rotations(packing)
        return feature_major_attention.rotations(packing)
    if packing.features != hidden:
        raise ShapeError(f"the packing has {packing.features} features per ciphertext, the model {hidden}: use Packing.fit(slots, {hidden}, tokens)")
    steps = _attention(config, packing) | reduce.rotations(packing)
    inner = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    steps |= linear.rotations(packing, hidden, inner, inner, inner) | linear.rotations(packing, inner, hidden)
    steps |= linear.rotations(packing, hidden, wide) | linear.rotations(packing, wide, hidden)
    if training:
        if config.model_type in DECODERS or config.attention_kernel != "gaussian_kernel":
            raise UnsupportedModelError("encrypted training has a backward of HEBert with Gaussian-kernel attention only")
        return steps | attention_gradient.rotations(packing, config.num_attention_heads) | weights.rotations(packing)
    if lora_rank:
        steps |= linear.rotations(packing, hidden, lora_rank) | linear.rotations(packing, lora_rank, hidden)
    if config.model_type in DECODERS:
        return steps | linear.rotations(packing, hidden, config.vocab_size)
    head = [hidden, *config.classifier_hidden_sizes, config.num_labels]
    for narrow, following in pairwise(head):
        steps |= linear.rotations(packing, narrow, following)
    return steps


def _attention(config: Any, packing: Packing) -> set[int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = packing.features // head_dim
    steps = attention.rotations(packing, heads)
    if config.attention_kernel != "gaussian_kernel":
        divisor = config.attention_kernel == "power_softmax" and config.power_softmax_divisor is not None
        steps |= power_softmax.rotations(packing, heads, divisor)
    if config.model_type in DECODERS:
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        steps |= rotary.rotations(packing, int(head_dim * share))
    return steps
