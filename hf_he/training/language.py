"""The stages of a language-model recipe, per seed and attention kernel: pre-training with exact functions, then calibration, the polynomial swap
and training after it; and the same swap from a finished softmax model by continual training.

Every variant sees the same blocks of text in the same order. Every stage writes its folder under the recipe's output_dir, and a second run
skips finished stages whose settings have not changed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from hf_he.corpora import Document, load_documents
from hf_he.data import SPLITS
from hf_he.models import HEGPTNeoXConfig, HEGPTNeoXForCausalLM
from hf_he.perplexity import evaluate_perplexity
from hf_he.training.conversion import calibrated
from hf_he.training.language_data import BlockDataset, batches, stress_blocks, token_blocks, train_tokenizer
from hf_he.training.language_recipe import BASELINE, TRAINING_FIELDS, LanguageRecipe, LanguageStage
from hf_he.training.range_penalty import RangePenalty, track_ranges
from hf_he.training.ranged_trainer import RangedTrainer
from hf_he.training.stages import digest, refuse_other_run, run_stage, stage_digest, stage_report

_RECIPROCAL = {"reciprocal_degree", "goldschmidt_steps"}
_KERNEL_SETTINGS = {
    "gaussian_kernel": {"exponent", "squarings"},
    "normalized_gaussian_kernel": {"exponent", "squarings", "kernel_mean"} | _RECIPROCAL,
    "power_softmax": {"power_mean", "score"} | _RECIPROCAL,
}
BATCH = 64
DEV_BLOCKS = 512
TEST_BLOCKS = 1_024
_PENALTY_BLOCKS = 256
_STRESS_BLOCKS = 512


class LanguageTrainer(RangedTrainer):
    """Next-token cross-entropy plus `penalty_weight` times the range penalty, whose weight grows from 0 over `penalty_warmup` of the steps."""

    def __init__(self, *args: Any, penalty_weight: float, penalty_warmup: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.final_weight = penalty_weight
        self.penalty_steps = max(1.0, penalty_warmup * self.args.max_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.penalty_weight = self.final_weight * min(1.0, (self.state.global_step + 1) / self.penalty_steps)
        return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)


class LanguagePipeline:
    """Runs a recipe. `max_steps` cuts every stage and the calibration, for a trial run; `announce` is told the stages as they start.

    Under `accelerate launch` all processes train, the main one writes.
    """

    def __init__(self, recipe: LanguageRecipe, *, max_steps: int | None = None, announce: Callable[[str], None] | None = None):
        self.state = PartialState()
        self.recipe = recipe
        self.max_steps = max_steps
        self.announce = announce or (lambda _: None)
        self.root = Path(recipe.output_dir)

    def run(self) -> None:
        """Run what is not done yet. Raises DataError where a trial would replace a full run."""
        refuse_other_run(self.root, max_steps=self.max_steps)
        self.text()
        for seed in self.recipe.seeds:
            for name in self.recipe.variants:
                self.pretrain(seed, name)
                self.finish(seed, name)
                self.score(seed, name)
        for name in self.recipe.convert:
            self.convert(self.recipe.seeds[0], name)
            self.finish(self.recipe.seeds[0], f"{name}-converted")
            self.score(self.recipe.seeds[0], f"{name}-converted")

    def runs(self) -> dict[str, list[int]]:
        """{name: seeds} of the finished models: the variants, then the converted ones, of the first seed only."""
        converted = {f"{name}-converted": self.recipe.seeds[:1] for name in self.recipe.convert}
        return dict.fromkeys(self.recipe.variants, self.recipe.seeds) | converted

    def folder(self, seed: int, run: str, stage: str = "final") -> Path:
        return self.root / f"seed{seed}" / run / stage

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.root / "text")

    @cached_property
    def documents(self) -> dict[str, tuple[Document, ...]]:
        """The texts of each split."""
        return {split: load_documents(split, tuple(self.recipe.corpora), self.recipe.data_dir) for split in SPLITS}

    @cached_property
    def blocks(self) -> dict[str, torch.Tensor]:
        """Token ids [rows, block] of each split."""
        return load_file(self.root / "text" / "blocks.safetensors")

    @cached_property
    def stress(self) -> torch.Tensor:
        return stress_blocks(self.recipe.vocabulary, _STRESS_BLOCKS, self.recipe.block, seed=0)

    def text(self) -> None:
        """Tokenizer, trained on the train part, and the blocks of every split."""

        def work(folder: Path) -> dict[str, Any]:
            if not self.state.is_main_process:
                return {}
            tokenizer = train_tokenizer(self.documents["train"], self.recipe.vocabulary, self.recipe.block)
            tokenizer.save_pretrained(folder)
            blocks = {split: token_blocks(tokenizer, texts, self.recipe.block) for split, texts in self.documents.items()}
            save_file(blocks, folder / "blocks.safetensors")
            characters = {split: sum(len(document.text) for document in texts) for split, texts in self.documents.items()}
            return {"characters": characters, "tokens": {split: rows.numel() for split, rows in blocks.items()}}

        settings = {"corpora": self.recipe.corpora, "data_dir": self._own_texts(), "vocabulary": self.recipe.vocabulary, "block": self.recipe.block}
        self._stage(self.root / "text", settings, work)

    def pretrain(self, seed: int, name: str) -> None:
        """From scratch, exact functions, range penalty on (softmax, which has no polynomial form, trains without)."""
        stage, variant = self.recipe.pretrain_stage, self.recipe.variants[name]

        def work(folder: Path) -> dict[str, Any]:
            set_seed(seed)
            model = new_model(self.recipe, variant)
            penalty = None if name == BASELINE else RangePenalty.for_model(model, self._some_blocks(), self.recipe.targets, from_scratch=True)
            return self._fit(folder, model, stage, seed, 0, penalty, variant.get("penalty_warmup", 0.0))

        settings = {"architecture": asdict(self.recipe.architecture), "variant": variant, "targets": self._targets(name)}
        self._stage(self.folder(seed, name, "pretrain"), settings, work, self.root / "text", stage, seed)

    def convert(self, seed: int, name: str) -> None:
        """The finished softmax model of this seed with another kernel, trained on for a short while."""
        stage, variant = self.recipe.convert_stage, self.recipe.variants[name]
        source = self.folder(seed, BASELINE)

        def work(folder: Path) -> dict[str, Any]:
            set_seed(seed)
            model = new_model(self.recipe, variant)
            fresh = {key: tensor for key, tensor in model.state_dict().items() if key.endswith("query_key_value.bias")}
            model.load_state_dict(HEGPTNeoXForCausalLM.from_pretrained(source).state_dict())
            with torch.no_grad():
                for key, tensor in fresh.items():
                    model.get_parameter(key).add_(tensor)
            penalty = RangePenalty.for_model(model, self._some_blocks(), self.recipe.targets)
            seen = self.recipe.pretrain_stage.tokens + self.recipe.polynomial_stage.tokens
            return self._fit(folder, model, stage, seed, seen, penalty)

        settings = {"variant": variant, "targets": self._targets(name)}
        self._stage(self.folder(seed, f"{name}-converted", "pretrain"), settings, work, source, stage, seed)

    def finish(self, seed: int, run: str) -> None:
        """Calibrate on training blocks, swap the polynomials in and train on; the softmax model only trains on."""
        stage, source = self.recipe.polynomial_stage, self.folder(seed, run, "pretrain")

        def work(folder: Path) -> dict[str, Any]:
            model = HEGPTNeoXForCausalLM.from_pretrained(source)
            if run == BASELINE:
                return self._fit(folder, model, stage, seed, self.recipe.pretrain_stage.tokens, None)
            rows = self.recipe.calibration_rows if self.max_steps is None else self.max_steps * stage.batch_size
            seen = torch.cat([self.blocks["train"][:: max(1, len(self.blocks["train"]) // rows)], self.stress])
            ranges = track_ranges(model, batches(seen, BATCH))
            model = calibrated(model, ranges, self.recipe.degrees, self.recipe.margin)
            report = self._fit(folder, model, stage, seed, self.recipe.pretrain_stage.tokens, RangePenalty.from_ranges(ranges))
            return report | {"calibration": {layer: asdict(entry) for layer, entry in ranges.items()}}

        settings: dict[str, Any] = {}
        if run != BASELINE:
            degrees = self._relevant(asdict(self.recipe.degrees), run.removesuffix("-converted"))
            settings = {"calibration": [self.recipe.calibration_rows, self.recipe.margin], "degrees": degrees}
        self._stage(self.folder(seed, run), settings, work, source, stage, seed)

    def score(self, seed: int, run: str) -> None:
        """Perplexities on dev and test in the modes the finished model has, and its ranges on test text and on stress blocks of another seed. Test
        blocks are read here and nowhere earlier."""

        def work(folder: Path) -> dict[str, Any]:
            if not self.state.is_main_process:
                return {}
            model = HEGPTNeoXForCausalLM.from_pretrained(self.folder(seed, run))
            step = max(1, len(self.blocks["test"]) // (TEST_BLOCKS if self.max_steps is None else BATCH))
            parts = {"dev": self._dev_blocks(), "test": self.blocks["test"][::step]}
            report: dict[str, Any] = {part: {} for part in parts}
            for mode in ("exact",) if run == BASELINE else ("exact", "polynomial"):
                model.set_mode(mode)
                results = {part: evaluate_perplexity(model, rows, batch_size=BATCH) for part, rows in parts.items()}
                for part, result in results.items():
                    report[part][mode] = round(result.perplexity, 4)
            if run != BASELINE:
                results["stress"] = evaluate_perplexity(
                    model, stress_blocks(self.recipe.vocabulary, _STRESS_BLOCKS, self.recipe.block, seed=1), batch_size=BATCH
                )
                report["out_of_range"] = {part: result.out_of_range for part, result in results.items()}
                report |= {"ranges": results["test"].ranges, "stress_ranges": results["stress"].ranges}
            stages = [stage_report(self.folder(seed, run, stage)) for stage in ("pretrain", "final")]
            return report | {"tokens": sum(stage["tokens"] for stage in stages), "training_seconds": sum(stage["seconds"] for stage in stages)}

        settings = {"previous": stage_digest(self.folder(seed, run)), "max_steps": self.max_steps}
        self._stage(self.folder(seed, run, "scores"), settings, work)

    def _own_texts(self) -> str | None:
        """A digest of what `data_dir` holds, so that other texts there are other settings; None for the pinned corpora."""
        if self.recipe.data_dir is None:
            return None
        return digest({split: [asdict(document) for document in texts] for split, texts in self.documents.items()})

    def _dev_blocks(self) -> torch.Tensor:
        return self.blocks["dev"][: DEV_BLOCKS if self.max_steps is None else BATCH]

    def _targets(self, name: str) -> dict[str, Any] | None:
        return None if name == BASELINE else self._relevant(asdict(self.recipe.targets), name) | {"stress_rows": self.recipe.stress_rows}

    def _relevant(self, settings: dict[str, Any], name: str) -> dict[str, Any]:
        """Without what only the other kernels' polynomials need."""
        needed = _KERNEL_SETTINGS[self.recipe.variants[name]["attention_kernel"]]
        return {key: value for key, value in settings.items() if key in needed or not any(key in others for others in _KERNEL_SETTINGS.values())}

    def _some_blocks(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks["train"][:_PENALTY_BLOCKS]}

    def _fit(
        self, folder: Path, model: HEGPTNeoXForCausalLM, stage: LanguageStage, seed: int, skip: int, penalty: RangePenalty | None, warmup: float = 0.0
    ) -> dict[str, Any]:
        """Train on `stage.tokens` of the seed's order of blocks after the first `skip` ones, save the model, and report on the dev part."""
        set_seed(seed)
        processes, block = self.state.num_processes, self.recipe.block
        text_rows = max(1, stage.batch_size // processes)
        stress_rows = math.ceil(self.recipe.stress_rows / processes) if penalty else 0
        steps = self.max_steps or max(1, stage.tokens // (text_rows * processes * block))
        rows = self._ordered(seed, skip // block, steps * text_rows * processes)
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=text_rows + stress_rows,
            max_steps=steps,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            adam_beta2=0.95,
            warmup_steps=stage.warmup,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": stage.final_rate},
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_steps=0.05,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            remove_unused_columns=False,
            optim="adamw_torch_fused",
            disable_tqdm=True,
            seed=seed,
        )
        dataset = BlockDataset(rows, self.stress, text_rows, stress_rows)
        trainer = LanguageTrainer(model=model, args=arguments, train_dataset=dataset, penalty=penalty, penalty_weight=stage.penalty, penalty_warmup=warmup)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        if self.state.is_main_process:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        result = evaluate_perplexity(model, self._dev_blocks(), batch_size=BATCH)
        return {
            "dev_perplexity": result.perplexity,
            "tokens": steps * text_rows * processes * block,
            "skipped_steps": trainer.skipped_steps,
            "targets": penalty.intervals if penalty else None,
            "log": trainer.state.log_history,
        }

    def _ordered(self, seed: int, start: int, count: int) -> torch.Tensor:
        """`count` training blocks from number `start` on, in the shuffled order of the seed; the order is gone through again when it ends."""
        blocks = self.blocks["train"]
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        return blocks[order[torch.arange(start, start + count) % len(blocks)]]

    def _stage(
        self,
        folder: Path,
        settings: dict[str, Any],
        work: Callable[[Path], dict[str, Any]],
        previous: Path | None = None,
        stage: LanguageStage | None = None,
        seed: int | None = None,
    ) -> None:
        if stage is not None:
            settings = settings | {"stage": asdict(stage), "seed": seed, "max_steps": self.max_steps, "previous": stage_digest(previous)}
        run_stage(folder, settings, work, lambda: self.announce(str(folder.relative_to(self.root))))


def new_model(recipe: LanguageRecipe, variant: dict[str, Any]) -> HEGPTNeoXForCausalLM:
    """A random decoder of the recipe's shape with the variant's kernel, its scores set to start around `initial_score`."""
    shape = recipe.architecture
    fields = {key: value for key, value in variant.items() if key not in TRAINING_FIELDS}
    initial_score = variant.get("initial_score")
    config = HEGPTNeoXConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=recipe.block,
        use_parallel_residual=shape.parallel_residual,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        **fields,
    )
    model = HEGPTNeoXForCausalLM(config)
    if initial_score is not None:
        set_initial_score(model, initial_score)
    return model


@torch.no_grad()
def set_initial_score(model: HEGPTNeoXForCausalLM, score: float) -> None:
    """Shift all scores of a fresh model by `score`: equal biases of queries and keys on the features that rotary embedding leaves alone, opposite
    ones for the Gaussian kernel, whose exponent is meant (score < 0).

    x^p is flat around x = 0, where a fresh model's scores are, but near x = 1 it behaves like exp(p (x - 1)), which `power_softmax_shift` gives as well; an
    exponent below 0 keeps the sum of un-normalised weights near 1. Raises ValueError for a score of the wrong sign.
    """
    gaussian = model.config.attention_kernel.endswith("gaussian_kernel")
    if (score < 0) != gaussian:
        raise ValueError(f"initial_score {score} has the wrong sign for {model.config.attention_kernel}: exponents are negative, scores positive.")
    rotary = 2 * len(model.gpt_neox.rotary_emb.inv_freq)
    for layer in model.gpt_neox.layers:
        attention = layer.attention
        free = attention.scaling * (attention.head_size - rotary)
        bias = attention.query_key_value.bias.view(-1, 3, attention.head_size)[..., rotary:]
        size = math.sqrt(-score / (2.0 * free) if gaussian else score / free)
        bias[:, 0] += size
        bias[:, 1] += -size if gaussian else size
