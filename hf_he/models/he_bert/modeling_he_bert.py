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
"""HEBert: BERT with Gaussian-kernel or power-softmax attention, LayerNorms and activations that have polynomial forms.

Module names are those of stock BERT, so that checkpoints convert without renaming. The encoder uses only operations that have an
encrypted form; it runs unchanged on `EncryptedTensor`.
"""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_he.errors import ShapeError
from hf_he.models.he_bert.configuration_he_bert import HEBertConfig
from hf_he.models.he_bert.embeddings import HEBertEmbeddings, HEBertSinusoidalPositions
from hf_he.models.kernel_attention import KernelAttention
from hf_he.models.polynomial_mode import PolynomialModeMixin
from hf_he.nn import HELayerNorm, PolynomialActivation

# trf-ignore: TRF041 config.norm_position, config.gated_ffn, config.attention_kernel
# trf-ignore: TRF041 config.use_pooler, config.classifier_hidden_sizes


class HEBertSelfAttention(KernelAttention):
    """Multi-head attention with the kernel of the config."""

    def __init__(self, config: HEBertConfig):
        super().__init__(config)
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, hidden_size = hidden_states.shape
        heads = (batch, length, self.num_attention_heads, self.attention_head_size)
        query = self.query(hidden_states).view(*heads).transpose(1, 2)
        key = self.key(hidden_states).view(*heads).transpose(1, 2)
        value = self.value(hidden_states).view(*heads).transpose(1, 2)
        attention_output, attention_weights = self.attend(query, key, value, attention_mask, self.dropout.p, **kwargs)
        return attention_output.reshape(batch, length, hidden_size), attention_weights


class HEBertResidual(nn.Module):
    """dense, dropout, residual sum and, in a post-norm model, LayerNorm: `output` of the attention and of the feed-forward."""

    def __init__(self, config: HEBertConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size, bias=config.use_bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = HELayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm_position == "post" else None

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.dense(hidden_states)) + residual
        return hidden_states if self.LayerNorm is None else self.LayerNorm(hidden_states)


class HEBertAttention(nn.Module):
    """Self-attention with its residual and its LayerNorm (here in a pre-norm model, in `output` in a post-norm one)."""

    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.LayerNorm = HELayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm_position == "pre" else None
        self.self = HEBertSelfAttention(config)
        self.output = HEBertResidual(config, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        normed = hidden_states if self.LayerNorm is None else self.LayerNorm(hidden_states)
        attention_output, _ = self.self(normed, attention_mask, **kwargs)
        return self.output(attention_output, hidden_states)


class HEBertIntermediate(nn.Module):
    """First half of the feed-forward: act(dense(x)), or act(gate(x)) * dense(x) with `gated_ffn`."""

    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.LayerNorm = HELayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm_position == "pre" else None
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias) if config.gated_ffn else None
        self.intermediate_act_fn = PolynomialActivation(config.hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.LayerNorm is not None:
            hidden_states = self.LayerNorm(hidden_states)
        if self.gate is None:
            return self.intermediate_act_fn(self.dense(hidden_states))
        return self.intermediate_act_fn(self.gate(hidden_states)) * self.dense(hidden_states)


class HEBertLayer(GradientCheckpointingLayer):
    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.attention = HEBertAttention(config)
        self.intermediate = HEBertIntermediate(config)
        self.output = HEBertResidual(config, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attention_output = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(self.intermediate(attention_output), attention_output)


class HEBertEncoder(nn.Module):
    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([HEBertLayer(config) for _ in range(config.num_hidden_layers)])
        self.LayerNorm = HELayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm_position == "pre" else None

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(hidden_states if self.LayerNorm is None else self.LayerNorm(hidden_states))


class HEBertPooler(nn.Module):
    """tanh(dense(token 0))."""

    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.activation = PolynomialActivation("tanh")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


class HEBertPredictionHeadTransform(nn.Module):
    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = PolynomialActivation(config.hidden_act)
        self.LayerNorm = HELayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class HEBertLMPredictionHead(nn.Module):
    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.transform = HEBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


class HEBertOnlyMLMHead(nn.Module):  # trf-ignore: TRF026 (stock BERT's name)
    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.predictions = HEBertLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


class HEBertClassificationHead(nn.Module):
    """Linear layers of `classifier_hidden_sizes`, one activation, output layer."""

    def __init__(self, config: HEBertConfig):
        super().__init__()
        sizes = [config.hidden_size, *config.classifier_hidden_sizes]
        self.dense = nn.ModuleList([nn.Linear(i, o, bias=config.use_bias) for i, o in pairwise(sizes)])
        self.activation = PolynomialActivation(config.classifier_act)
        self.out_proj = nn.Linear(sizes[-1], config.num_labels, bias=config.use_bias)

    def forward(self, pooled_output: torch.Tensor) -> torch.Tensor:
        for dense in self.dense:
            pooled_output = dense(pooled_output)
        return self.out_proj(self.activation(pooled_output))


class HEBertPreTrainedModel(PolynomialModeMixin, PreTrainedModel):
    """Weight initialisation and what transformers needs to know about HEBert."""

    config: HEBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HEBertEmbeddings", "HEBertLayer"]
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {"hidden_states": HEBertLayer, "attentions": HEBertSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HEBertLMPredictionHead):
            init.zeros_(module.bias)
        elif isinstance(module, HEBertSinusoidalPositions):
            init.copy_(module.table, module.sinusoids(*module.table.shape))
            init.constant_(module.scale, module.table.shape[1] ** -0.5)


class HEBertModel(HEBertPreTrainedModel):
    """The encoder, with a pooler unless `add_pooling_layer` or `config.use_pooler` is False."""

    def __init__(self, config: HEBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = HEBertEmbeddings(config)
        self.encoder = HEBertEncoder(config)
        self.pooler = HEBertPooler(config) if add_pooling_layer and config.use_pooler else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        embedding_output: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Exactly one of `input_ids`, `inputs_embeds` and `embedding_output`.

        Args:
            attention_mask: [B, T] with 1 for real tokens, or [B, 1, T, T] with 1 for pairs to keep, passed on as it is (an encrypted mask).
            inputs_embeds: [B, T, d] word embeddings.
            embedding_output: [B, T, d] finished embeddings (word + position + type, LayerNorm), as the client encrypts them; see
                `HEBertEmbeddings`.

        Raises:
            ShapeError: none or several inputs, too many tokens, or a mask of another rank.
            RangeError: polynomial mode and a value outside its fitted interval.
        """
        if sum(x is not None for x in (input_ids, inputs_embeds, embedding_output)) != 1:
            raise ShapeError("Pass exactly one of input_ids, inputs_embeds and embedding_output.")
        if embedding_output is None:
            embedding_output = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        if attention_mask is not None and attention_mask.dim() != 4:
            attention_mask = self._pairwise_mask(attention_mask, embedding_output.shape[1])
        sequence_output = self.encoder(embedding_output, attention_mask, **kwargs).last_hidden_state
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=sequence_output, pooler_output=pooled_output)

    @staticmethod
    def _pairwise_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
        if attention_mask.dim() != 2 or attention_mask.shape[1] != length:
            raise ShapeError(f"attention_mask must be [batch, {length}] or [batch, 1, {length}, {length}], got {list(attention_mask.shape)}.")
        return attention_mask[:, None, None, :].to(torch.bool).expand(-1, 1, length, -1)


class HEBertForMaskedLM(HEBertPreTrainedModel):
    """HEBert with the language-model head of stock BERT, tied to the word embeddings."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: HEBertConfig):
        super().__init__(config)
        self.bert = HEBertModel(config, add_pooling_layer=False)
        self.cls = HEBertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Inputs as for `HEBertModel.forward`; `labels` [B, T], -100 where there is no loss. Logits are [B, T, vocab_size]."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.cls(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


class HEBertForSequenceClassification(HEBertPreTrainedModel):
    """HEBert with a classifier on token 0: dropout and one linear layer, or `HEBertClassificationHead` with hidden sizes."""

    accepts_loss_kwargs = False

    def __init__(self, config: HEBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = HEBertModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        if config.classifier_hidden_sizes:
            self.classifier = HEBertClassificationHead(config)
        else:
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Inputs as for `HEBertModel.forward` (`embedding_output` too); `labels` [B]. Logits are [B, num_labels]."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        pooled_output = outputs.last_hidden_state[:, 0] if outputs.pooler_output is None else outputs.pooler_output
        logits = self.classifier(self.dropout(pooled_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


__all__ = ["HEBertForMaskedLM", "HEBertForSequenceClassification", "HEBertModel", "HEBertPreTrainedModel"]
