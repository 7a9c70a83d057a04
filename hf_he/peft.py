"""LoRA as encrypted training wants it: plain PEFT adapters whose scaling is 1.

`scaling` = lora_alpha / r multiplies every adapter's output; on ciphertexts that product costs a level of every adapted state. Folding
it into lora_B changes nothing but the learning rate of lora_B, so here lora_alpha = r. The adapter is stock LoRA: it saves as such, and
`PeftModel.from_pretrained` loads it on a plain model without this package.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_he.errors import ParameterError

INITIALISERS = (True, False, "gaussian", "orthogonal", "eva")
"""Of LoRA matrices, those that leave the weights of the model as they are."""


@dataclass
class HELoraConfig(LoraConfig):
    """A `peft.LoraConfig` that encrypted training can run: scaling 1, no dropout (it would need a fresh mask per ciphertext), no variant of LoRA.

    Everything else means what it does in peft; the targets default to those of the model (query and value for HEBert). Raises ParameterError for
    a setting that has no encrypted form.
    """

    lora_alpha: int | None = field(default=None, metadata={"help": "Must be r, the default: the scaling is folded into lora_B."})

    def __post_init__(self) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if self.lora_alpha != self.r:
            raise ParameterError(f"lora_alpha {self.lora_alpha} with r {self.r} scales every adapter, which costs a level: leave it out, and scale the rate")
        if self.r < 1:
            raise ParameterError(f"r must be at least 1, got {self.r}")
        refused = {
            "lora_dropout": bool(self.lora_dropout),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "bias": self.bias != "none",
            "rank_pattern": bool(self.rank_pattern),
            "alpha_pattern": bool(self.alpha_pattern),
            "init_lora_weights": self.init_lora_weights not in INITIALISERS,
            "target_parameters": bool(self.target_parameters),
            "trainable_token_indices": bool(self.trainable_token_indices),
            "layer_replication": bool(self.layer_replication),
            "alora_invocation_tokens": bool(self.alora_invocation_tokens),
            "use_qalora": self.use_qalora,
        }
        for name, wrong in refused.items():
            if wrong:
                raise ParameterError(f"{name} has no encrypted form: leave it at its default")
        super().__post_init__()


def with_fresh_adapter(model: nn.Module, config: LoraConfig) -> PeftModel:
    """`get_peft_model` in eval mode. Raises ValueError, as peft does, when `model` has no such modules."""
    with warnings.catch_warnings():  # peft reads a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config).eval()
