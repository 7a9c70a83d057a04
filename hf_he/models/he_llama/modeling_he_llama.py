# Copyright 2026 The hf-he authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""HELlama: Llama with Gaussian-kernel or power-softmax attention, RMSNorms and activations that have polynomial forms.

Module names are those of stock Llama, so that checkpoints convert without renaming. Finished embeddings are `inputs_embeds`: positions
only enter through the rotation of queries and keys.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_he._compat import LlamaRotaryEmbedding, slice_logits_to_keep
from hf_he.attention import causal_keep_mask
from hf_he.errors import ShapeError
from hf_he.models.he_llama.configuration_he_llama import HELlamaConfig
from hf_he.models.kernel_attention import KernelAttention
from hf_he.models.polynomial_mode import PolynomialModeMixin
from hf_he.nn import HERMSNorm, PolynomialActivation, apply_rotary


class HELlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: HELlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = PolynomialActivation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class HELlamaAttention(KernelAttention):
    """Causal attention with the kernel of the config; `num_key_value_heads` heads of keys and values serve groups of queries."""

    def __init__(self, config: HELlamaConfig, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size, key_value_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        heads = (batch, length, -1, self.head_dim)
        query = apply_rotary(self.q_proj(hidden_states).view(*heads).transpose(1, 2), *position_embeddings)
        key = apply_rotary(self.k_proj(hidden_states).view(*heads).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(*heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_output, attention_weights = self.attend(query, key, value, attention_mask, self.attention_dropout, **kwargs)
        return self.o_proj(attention_output.reshape(batch, length, -1)), attention_weights


class HELlamaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: HELlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HELlamaAttention(config, layer_idx)
        self.mlp = HELlamaMLP(config)
        self.input_layernorm = HERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HERMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = attention_output + hidden_states
        return self.mlp(self.post_attention_layernorm(hidden_states)) + hidden_states


class HELlamaPreTrainedModel(PolynomialModeMixin, PreTrainedModel):
    """What transformers needs to know about HELlama."""

    config: HELlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HELlamaDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {"hidden_states": HELlamaDecoderLayer, "attentions": HELlamaAttention}


class HELlamaModel(HELlamaPreTrainedModel):
    """The decoder with its final RMSNorm."""

    def __init__(self, config: HELlamaConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HELlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = HERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Exactly one of `input_ids` and `inputs_embeds`, each only the tokens after those in `past_key_values`.

        Args:
            attention_mask: [B, S] with 1 for real tokens, cached ones included, or [B, 1, T, S] with 1 for pairs to keep, used as it is.
            inputs_embeds: [B, T, d].

        Raises:
            ShapeError: none or both inputs.
            RangeError: polynomial mode and a value outside its fitted interval.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("Pass exactly one of input_ids and inputs_embeds.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        attention_mask = causal_keep_mask(hidden_states, attention_mask, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class HELlamaForCausalLM(HELlamaPreTrainedModel, GenerationMixin):
    """HELlama with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    create_masks_for_generate = staticmethod(causal_keep_mask)

    def __init__(self, config: HELlamaConfig):
        super().__init__(config)
        self.model = HELlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Inputs as for `HELlamaModel.forward`; `labels` [B, T], not shifted, -100 where there is no loss. Logits are [B, T, vocab_size],
        or of the last `logits_to_keep` positions only."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HELlamaForSequenceClassification(GenericForSequenceClassification, HELlamaPreTrainedModel):
    """HELlama with a linear classifier on the last token that is not padding."""


__all__ = ["HELlamaForCausalLM", "HELlamaForSequenceClassification", "HELlamaModel", "HELlamaPreTrainedModel"]
