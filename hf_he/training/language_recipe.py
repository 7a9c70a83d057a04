"""The YAML recipe of a language-model run: one architecture, several attention kernels, several seeds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hf_he.corpora import CORPORA
from hf_he.errors import DataError
from hf_he.models.kernel_attention import KERNELS
from hf_he.training.range_penalty import Degrees, RangeTargets

BASELINE = "softmax"
TRAINING_FIELDS = ("initial_score", "penalty_warmup")
_KERNEL_FIELDS = ("power_softmax_degree", "power_softmax_eps", "power_softmax_length_agnostic", "power_softmax_shift", "power_softmax_divisor")


@dataclass
class Architecture:
    """Shape of the HEGPTNeoX decoders; `parallel_residual`: attention and feed-forward side by side, as in Pythia, or one after the other."""

    num_layers: int = 2
    hidden_size: int = 128
    num_heads: int = 2
    intermediate_size: int = 512
    parallel_residual: bool = True
    tie_embeddings: bool = False


@dataclass
class LanguageStage:
    """AdamW with linear warm-up over `warmup` of the steps, then a cosine down to `final_rate` of the learning rate.

    `tokens`: text tokens seen. `batch_size`: text blocks per step, over all processes. `penalty`: weight of the range penalty (no term for softmax).
    """

    tokens: int = 1_000_000
    learning_rate: float = 2e-3
    final_rate: float = 0.1
    batch_size: int = 32
    warmup: float = 0.05
    weight_decay: float = 0.1
    penalty: float = 0.1


@dataclass
class LanguageRecipe:
    """Everything a run depends on.

    `corpora`: names of hf_he.corpora, or `data_dir`: a folder of .txt files, one document each. `variants`: {name: {"attention_kernel", its
    `power_softmax_*` fields, "initial_score": see `language.set_initial_score`, "penalty_warmup": share of the pre-training over
    which the penalty grows to its weight}}; "softmax" must be one of them, the baseline that spends
    the same tokens without a swap. `convert`: variants also obtained from the first seed's finished baseline, in `convert_stage` and the polynomial
    stage.
    `stress_rows`: blocks unlike text per batch that only the penalty sees. `calibration_rows`: training blocks that fix the intervals, widened
    by `margin`. `publish`: variants whose first seed is exported.
    """

    kind: str = "language-model"
    corpora: list[str] = field(default_factory=lambda: list(CORPORA))
    data_dir: str | None = None
    output_dir: str = "out/lm"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    vocabulary: int = 1024
    block: int = 64
    architecture: Architecture = field(default_factory=Architecture)
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {BASELINE: {"attention_kernel": BASELINE}})
    convert: list[str] = field(default_factory=list)
    publish: list[str] = field(default_factory=list)
    stress_rows: int = 2
    calibration_rows: int = 4_000
    margin: float = 0.25
    targets: RangeTargets = field(default_factory=RangeTargets)
    degrees: Degrees = field(default_factory=Degrees)
    pretrain_stage: LanguageStage = field(default_factory=LanguageStage)
    polynomial_stage: LanguageStage = field(default_factory=lambda: LanguageStage(tokens=300_000, learning_rate=5e-4))
    convert_stage: LanguageStage = field(default_factory=lambda: LanguageStage(tokens=300_000, learning_rate=1e-3))

    def __post_init__(self) -> None:
        if unknown := set(self.corpora) - set(CORPORA):
            raise DataError(f"recipe: corpus {sorted(unknown)[0]!r} is not one of {', '.join(CORPORA)}.")
        if self.variants.get(BASELINE, {}).get("attention_kernel") != BASELINE:
            raise DataError(f"recipe: variants need {BASELINE!r} with attention_kernel {BASELINE}, the baseline of the comparison.")
        for name, variant in self.variants.items():
            if str(variant.get("attention_kernel")) not in KERNELS:
                raise DataError(f"recipe: variant {name} needs an attention_kernel out of {', '.join(KERNELS)}.")
            if unknown := set(variant) - {"attention_kernel", *TRAINING_FIELDS, *_KERNEL_FIELDS}:
                raise DataError(f"recipe: variant {name}: unknown key {sorted(unknown)[0]!r}; known: {', '.join((*TRAINING_FIELDS, *_KERNEL_FIELDS))}.")
        for key in ("convert", "publish"):
            if unknown := set(getattr(self, key)) - (set(self.variants) - {BASELINE}):
                raise DataError(f"recipe: {key} names {sorted(unknown)[0]!r}, which is no variant with a polynomial form.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
