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
"""HEBert configuration."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_he.models.kernel_attention import validate_kernel
from hf_he.nn import EXACT_ACTIVATIONS


@strict
class HEBertConfig(PreTrainedConfig):
    """Configuration of HEBert: a BERT whose every operation has a form under homomorphic encryption.

    Fields shared with `BertConfig` mean the same. The others:

    Args:
        attention_kernel: "gaussian_kernel" (default), "normalized_gaussian_kernel", "power_softmax", or "softmax" (exact mode only: it has no
            polynomial form).
        power_softmax_degree: even p of x^p.
        power_softmax_eps: constant of the denominator, the normalized Gaussian kernel's too; 1 for PolySketchFormer's.
        power_softmax_length_agnostic: add eps to the mean over the valid keys instead of the sum.
        power_softmax_shift: c of (x + c)^p.
        power_softmax_divisor: divide by this constant (times the number of valid keys if length-agnostic) instead of eps + sum.
        norm_position: "post" (BERT) or "pre" (with a final LayerNorm after the last layer).
        gated_ffn: act(gate(x)) * dense(x) instead of act(dense(x)); each of the two is `intermediate_size` wide.
        use_bias: biases in the encoder, the pooler and a classification head with hidden sizes.
        position_embedding_type: "absolute" (learned) or "sinusoidal" (fixed table times a learned scale).
        use_pooler: tanh pooler between token 0 and the classifier.
        classifier_hidden_sizes: linear layers between the pooled token and the output layer, e.g. [32, 1024]; `classifier_act` is
            applied once, before the output layer.
        classifier_act: activation of that head.
        mode: "exact" or "polynomial".
        approximations: {layer name: entry} from calibration. LayerNorms {"interval", "degree", "newton_steps"} on variance + eps;
            activations {"interval", "degree"} on the input; attention {"interval", "squarings"} on the exponent (Gaussian kernels; "....attention.normalizer"
            {"interval", "degree", "goldschmidt_steps"} on eps + mean weight) or
            {"interval", "degree", "goldschmidt_steps"} on eps + mean x^p (power_softmax; with a divisor {"interval"} on x + c). Names are
            those of the modules in `HEBertForSequenceClassification` and `HEBertForMaskedLM`, e.g. "bert.encoder.layer.0.attention.self".

    The paper's encoder (Rho et al., ICLR 2025) is `hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536,
    gated_ffn=True, hidden_act="relu", norm_position="pre", use_bias=False, position_embedding_type="sinusoidal", use_pooler=False,
    classifier_hidden_sizes=[32, 1024], vocab_size=32768`.
    """

    model_type = "he_bert"

    vocab_size: int = 30522
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = True
    attention_kernel: str = "gaussian_kernel"
    power_softmax_degree: int = 4
    power_softmax_eps: float = 1e-3
    power_softmax_length_agnostic: bool = False
    power_softmax_shift: float | int = 0.0
    power_softmax_divisor: float | int | None = None
    norm_position: str = "post"
    gated_ffn: bool = False
    use_bias: bool = True
    position_embedding_type: str = "absolute"
    use_pooler: bool = True
    classifier_hidden_sizes: list[int] = field(default_factory=list)
    classifier_act: str = "tanh"
    mode: str = "exact"
    approximations: dict[str, Any] = field(default_factory=dict)

    def validate_architecture(self) -> None:
        """Part of `@strict` validation. Raises ValueError with the allowed values."""
        validate_kernel(self)
        choices = {
            "norm_position": ("post", "pre"),
            "position_embedding_type": ("absolute", "sinusoidal"),
            "classifier_act": tuple(EXACT_ACTIVATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}.")


__all__ = ["HEBertConfig"]
