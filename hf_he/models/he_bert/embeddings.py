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
"""HEBert's embeddings: what the client computes in the clear before it encrypts."""

import math

import torch
from torch import nn

from hf_he.errors import ShapeError
from hf_he.models.he_bert.configuration_he_bert import HEBertConfig


class HEBertSinusoidalPositions(nn.Module):
    """The fixed table of Vaswani et al. times one learned scale, initially 1 / sqrt(hidden_size)."""

    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.table = nn.Buffer(self.sinusoids(config.max_position_embeddings, config.hidden_size), persistent=False)
        self.scale = nn.Parameter(torch.full((1,), config.hidden_size**-0.5))

    @staticmethod
    def sinusoids(length: int, width: int) -> torch.Tensor:
        frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        angles = torch.arange(length).unsqueeze(1) * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return self.table[position_ids] * self.scale


class HEBertEmbeddings(nn.Module):
    """Word + position + type embeddings and their LayerNorm, exact in every mode."""

    def __init__(self, config: HEBertConfig):
        super().__init__()
        self.max_position_embeddings = config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if config.position_embedding_type == "sinusoidal":
            self.position_embeddings = HEBertSinusoidalPositions(config)
        else:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if length > self.max_position_embeddings:
            raise ShapeError(f"{length} tokens, but the model has {self.max_position_embeddings} positions. Truncate the input.")
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)
        if token_type_ids is None:
            token_type_ids = torch.zeros((batch, length), dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))
