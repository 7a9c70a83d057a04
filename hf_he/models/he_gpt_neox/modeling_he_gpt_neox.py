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
"""HEGPTNeoX: GPT-NeoX with Gaussian-kernel or power-softmax attention, LayerNorms and activations that have polynomial forms.

Module names are those of stock GPT-NeoX, so that checkpoints convert without renaming. Finished embeddings are `inputs_embeds`: positions
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

from hf_he._compat import GPTNeoXRotaryEmbedding, slice_logits_to_keep
from hf_he.attention import causal_keep_mask
from hf_he.errors import ShapeError
from hf_he.models.he_gpt_neox.configuration_he_gpt_neox import HEGPTNeoXConfig
from hf_he.models.kernel_attention import KernelAttention
from hf_he.models.polynomial_mode import PolynomialModeMixin
from hf_he.nn import HELayerNorm, PolynomialActivation, apply_rotary


class HEGPTNeoXMLP(nn.Module):
    def __init__(self, config: HEGPTNeoXConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = PolynomialActivation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_states)))


class HEGPTNeoXAttention(KernelAttention):
    """Causal attention with the kernel of the config; one projection gives query, key and value of each head in turn."""

    def __init__(self, config: HEGPTNeoXConfig, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        projected = self.query_key_value(hidden_states).view(batch, length, -1, 3 * self.head_size).transpose(1, 2)
        query, key, value = projected.chunk(3, dim=-1)
        query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_output, attention_weights = self.attend(query, key, value, attention_mask, self.attention_dropout, **kwargs)
        return self.dense(attention_output.reshape(batch, length, -1)), attention_weights


class HEGPTNeoXLayer(GradientCheckpointingLayer):
    """Attention and feed-forward side by side on the same input (`use_parallel_residual`) or one after the other."""

    def __init__(self, config: HEGPTNeoXConfig, layer_idx: int):
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = HELayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = HELayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = HEGPTNeoXAttention(config, layer_idx)
        self.mlp = HEGPTNeoXMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.attention(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        after_attention = self.post_attention_dropout(attention_output) + hidden_states
        mlp_input = hidden_states if self.use_parallel_residual else after_attention
        return self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(mlp_input))) + after_attention


class HEGPTNeoXPreTrainedModel(PolynomialModeMixin, PreTrainedModel):
    """What transformers needs to know about HEGPTNeoX."""

    config: HEGPTNeoXConfig
    base_model_prefix = "gpt_neox"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HEGPTNeoXLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"attention\.bias", r"attention\.masked_bias"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {"hidden_states": HEGPTNeoXLayer, "attentions": HEGPTNeoXAttention}


class HEGPTNeoXModel(HEGPTNeoXPreTrainedModel):
    """The decoder with its final LayerNorm."""

    def __init__(self, config: HEGPTNeoXConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([HEGPTNeoXLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_layer_norm = HELayerNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_in = value

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
        hidden_states = self.embed_in(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        attention_mask = causal_keep_mask(hidden_states, attention_mask, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.emb_dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.final_layer_norm(hidden_states), past_key_values=past_key_values)


class HEGPTNeoXForCausalLM(HEGPTNeoXPreTrainedModel, GenerationMixin):
    """HEGPTNeoX with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "gpt_neox.embed_in.weight"}
    create_masks_for_generate = staticmethod(causal_keep_mask)

    def __init__(self, config: HEGPTNeoXConfig):
        super().__init__(config)
        self.gpt_neox = HEGPTNeoXModel(config)
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
        """Inputs as for `HEGPTNeoXModel.forward`; `labels` [B, T], not shifted, -100 where there is no loss. Logits are [B, T, vocab_size],
        or of the last `logits_to_keep` positions only."""
        outputs = self.gpt_neox(
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


class HEGPTNeoXForSequenceClassification(GenericForSequenceClassification, HEGPTNeoXPreTrainedModel):
    """HEGPTNeoX with a linear classifier on the last token that is not padding."""

    base_model_prefix = "gpt_neox"


__all__ = ["HEGPTNeoXForCausalLM", "HEGPTNeoXForSequenceClassification", "HEGPTNeoXModel", "HEGPTNeoXPreTrainedModel"]
