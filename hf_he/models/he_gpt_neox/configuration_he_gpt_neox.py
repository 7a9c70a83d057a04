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
"""HEGPTNeoX configuration."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig

from hf_he.models.kernel_attention import validate_kernel


@strict
class HEGPTNeoXConfig(GPTNeoXConfig):
    """Configuration of HEGPTNeoX: a GPT-NeoX whose every operation has a form under homomorphic encryption.

    Fields of `GPTNeoXConfig` mean the same. The others:

    Args:
        attention_kernel: "gaussian_kernel" (default), "normalized_gaussian_kernel", "power_softmax", or "softmax" (exact mode only: it has no
            polynomial form).
        power_softmax_degree: even p of x^p.
        power_softmax_eps: constant of the denominator, the normalized Gaussian kernel's too; 1 for PolySketchFormer's.
        power_softmax_length_agnostic: add eps to the mean over the valid keys of each row instead of the sum.
        power_softmax_shift: c of (x + c)^p.
        power_softmax_divisor: divide by this constant (times the number of valid keys if length-agnostic) instead of eps + sum.
        mode: "exact" or "polynomial".
        approximations: {layer name: entry} from calibration. LayerNorms {"interval", "degree", "newton_steps"} on variance + eps; activations
            {"interval", "degree"} on the input; attention {"interval", "squarings"} on the exponent (Gaussian kernels; "....attention.normalizer"
            {"interval", "degree", "goldschmidt_steps"} on eps + mean weight) or
            {"interval", "degree", "goldschmidt_steps"} on eps + mean x^p (power_softmax; with a divisor {"interval"} on x + c). Names are
            those of the modules in `HEGPTNeoXForCausalLM`, e.g. "gpt_neox.layers.0.attention".
    """

    model_type = "he_gpt_neox"

    attention_kernel: str = "gaussian_kernel"
    power_softmax_degree: int = 4
    power_softmax_eps: float = 1e-3
    power_softmax_length_agnostic: bool = False
    power_softmax_shift: float | int = 0.0
    power_softmax_divisor: float | int | None = None
    mode: str = "exact"
    approximations: dict[str, Any] = field(default_factory=dict)

    def validate_architecture(self) -> None:
        """Part of `@strict` validation. Raises ValueError with the allowed values."""
        super().validate_architecture()
        validate_kernel(self)


__all__ = ["HEGPTNeoXConfig"]
