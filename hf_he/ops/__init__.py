"""Encrypted operations. Each file has `reference` (torch, plaintext) beside `encrypted`, and says which rotations it needs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hf_he.errors import ShapeError
from hf_he.ops import (
    attention,
    attention_gradient,
    feature_major_attention,
    feature_major_attention_gradient,
    linear,
    power_softmax,
    power_softmax_gradient,
    reduce,
    rotary,
    weights,
)
from hf_he.packing import Packing

__all__ = ["DECODERS", "required_rotations"]

DECODERS = ("he_gpt_neox", "he_llama")
"""Model types with a causal forward."""


def required_rotations(config: Any, packing: Packing, lora_rank: int = 0, training: bool = False) -> set[int]:
    """Rotation steps (in 1 .. slots - 1) that an encrypted forward uses, of a HEBert sequence classifier or of a decoder with its language-model
    head: what its evaluation keys must cover.

    `lora_rank`: of unmerged LoRA adapters on maps of the hidden state; merged ones need nothing more. `training`: forward and backward with encrypted
    adapters, of a classifier with an encrypted head, of a decoder up to its last hidden states or its logits; plaintext ones are run with training=False.
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    if packing.features == 1 and config.model_type not in DECODERS and config.attention_kernel == "gaussian_kernel":
        if training:
            return feature_major_attention_gradient.rotations(packing) | weights.rotations(packing)
        return feature_major_attention.rotations(packing)
    if packing.features != hidden:
        raise ShapeError(f"the packing has {packing.features} features per ciphertext, the model {hidden}: use Packing.fit(slots, {hidden}, tokens)")
    steps = _attention(config, packing) | reduce.rotations(packing)
    inner = config.num_attention_heads * _head_dim(config)
    steps |= linear.rotations(packing, hidden, inner, inner, inner) | linear.rotations(packing, inner, hidden)
    steps |= linear.rotations(packing, hidden, wide) | linear.rotations(packing, wide, hidden)
    if training:
        return steps | _backward(config, packing, inner) | weights.rotations(packing)
    if lora_rank:
        steps |= linear.rotations(packing, hidden, lora_rank) | linear.rotations(packing, lora_rank, hidden)
    if config.model_type in DECODERS:
        return steps | linear.rotations(packing, hidden, config.vocab_size)
    head = [hidden, *config.classifier_hidden_sizes, config.num_labels]
    for narrow, following in pairwise(head):
        steps |= linear.rotations(packing, narrow, following)
    return steps


def _backward(config: Any, packing: Packing, inner: int) -> set[int]:
    """Of the backward, and of a forward whose projections are cut or have adapters and so are computed one by one."""
    hidden, heads = config.hidden_size, packing.features // _head_dim(config)
    if config.attention_kernel == "gaussian_kernel":
        steps = attention_gradient.rotations(packing, heads)
    else:
        steps = power_softmax_gradient.rotations(packing, heads, _divided_by_constant(config))
    if config.model_type in DECODERS:
        steps |= linear.rotations(packing, hidden, inner) | linear.rotations(packing, 2 * inner, hidden) | linear.rotations(packing, 3 * inner, hidden)
        steps |= linear.rotations(packing, hidden, config.vocab_size) | linear.rotations(packing, config.vocab_size, hidden)
    return steps


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _divided_by_constant(config: Any) -> bool:
    return config.attention_kernel == "power_softmax" and config.power_softmax_divisor is not None


def _attention(config: Any, packing: Packing) -> set[int]:
    head_dim = _head_dim(config)
    heads = packing.features // head_dim
    steps = attention.rotations(packing, heads)
    if config.attention_kernel != "gaussian_kernel":
        steps |= power_softmax.rotations(packing, heads, _divided_by_constant(config))
    if config.model_type in DECODERS:
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        steps |= rotary.rotations(packing, int(head_dim * share))
    return steps
