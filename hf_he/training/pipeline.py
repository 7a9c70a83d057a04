"""The stages of `hf-he train`: teacher, soft labels, softmax student, kernel student, calibration and polynomial
student, refined polynomial student.

Every stage writes its folder under the recipe's output_dir together with `stage.json`, which records the settings it and all earlier
stages ran with. A second run skips finished stages whose settings have not changed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, set_seed

from hf_he import data
from hf_he.data import CHECKPOINTS, TextDataset, fetch_checkpoint, load_dataset
from hf_he.evaluation import EvaluationResult, evaluate_model
from hf_he.training.conversion import calibrated, convert_checkpoint
from hf_he.training.distillation import (
    DistillationDataset,
    DistillationTrainer,
    build_dataset,
    metric_function,
    predict_logits,
)
from hf_he.training.range_penalty import RangePenalty, track_ranges
from hf_he.training.recipe import Recipe, Stage
from hf_he.training.stages import refuse_other_run, run_stage, stage_digest, stage_report

STAGES = ("teacher", "soft_labels", "softmax", "kernel", "polynomial", "refine")


class Pipeline:
    """Runs a recipe. `max_steps` cuts every training stage, and the texts to as many batches, for a trial run.

    `announce` is told the stages as they start; without it there are no progress bars either. Under `accelerate launch` all processes
    train, the main one writes.
    """

    def __init__(self, recipe: Recipe, *, max_steps: int | None = None, announce: Callable[[str], None] | None = None):
        self.state = PartialState()
        self.announce = announce
        self.recipe = recipe
        self.max_steps = max_steps
        self.root = Path(recipe.output_dir)
        self.stages = STAGES if recipe.teacher != "none" else STAGES[2:]
        self.train = load_dataset(recipe.task, "train", recipe.data_dir).spread(recipe.train_rows)
        self.dev = load_dataset(recipe.task, "dev", recipe.data_dir)
        unlabelled = data.load_imdb_sentences() if recipe.unlabelled == "imdb" and recipe.unlabelled_rows else ()
        unlabelled = _shuffled(unlabelled, recipe.seed)
        self.unlabelled, self.unseen = unlabelled[: recipe.unlabelled_rows], unlabelled[recipe.unlabelled_rows :]
        if max_steps is not None:
            rows = max_steps * recipe.kernel_stage.batch_size
            self.train, self.unlabelled, self.unseen = self.train.spread(rows), self.unlabelled[:rows], self.unseen[:rows]
        self.digests = {"train": self.train.digest, "dev": self.dev.digest, "unlabelled": self._without_labels(self.unlabelled).digest}
        self.num_outputs = 1 if self.train.is_regression else max(2, len(set(self.train.labels)))

    def run(self) -> dict[str, Any]:
        """Run what is not done yet; returns {stage: its stage.json}. Raises DataError where that would replace the full run of another task or seed,
        or a full run by a trial."""
        refuse_other_run(self.root, task=self.recipe.task, seed=self.recipe.seed, max_steps=self.max_steps)
        for stage in self.stages:
            getattr(self, stage)()
        return {stage: stage_report(self.root / stage) for stage in self.stages}

    def result(self) -> tuple[nn.Module, Any]:
        """Model (polynomial mode, float32) and tokenizer: the weighted mean of the last two stages, with the intervals of the first."""
        model, tokenizer = _load(self.root / "polynomial")
        refined, _ = _load(self.root / "refine")
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), refined.parameters(), strict=True):
                ours.lerp_(theirs, self.recipe.refine_weight)
        return model, tokenizer

    def teacher(self) -> None:
        def work(folder: Path) -> dict[str, Any]:
            model, tokenizer = self._load_base(self.recipe.teacher)
            rows = build_dataset(tokenizer, self.train, num_outputs=self.num_outputs, max_length=self.recipe.teacher_max_length)
            return self._fit(folder, model, tokenizer, self.recipe.teacher_stage, rows)

        self._stage("teacher", {"settings": asdict(self.recipe.teacher_stage), "checkpoint": self.recipe.teacher}, work)

    def soft_labels(self) -> None:
        """The teacher's logits over the training rows, then over the unlabelled texts."""

        def work(folder: Path) -> dict[str, Any]:
            model, tokenizer = _load(self.root / "teacher", dtype=getattr(torch, self.recipe.teacher_dtype))
            parts = [self.train]
            if self.unlabelled:
                parts.append(self._without_labels(self.unlabelled))
            length = self.recipe.teacher_max_length
            logits = torch.cat([predict_logits(model, tokenizer, part, max_length=length, progress=self.announce is not None) for part in parts])
            if self.state.is_main_process:
                save_file({"logits": logits}, folder / "logits.safetensors")
            return {"rows": len(logits)}

        self._stage("soft_labels", {"dtype": self.recipe.teacher_dtype}, work)

    def softmax(self) -> None:
        """The student architecture with its softmax: the reference for the kernel, and the teacher of its hidden states."""

        def work(folder: Path) -> dict[str, Any]:
            model, tokenizer = self._load_base(self.recipe.student)
            return self._fit(folder, model, tokenizer, self.recipe.softmax_stage, self._rows(tokenizer, self.recipe.softmax_stage, 0))

        self._stage("softmax", {"settings": asdict(self.recipe.softmax_stage), "checkpoint": self.recipe.student}, work)

    def kernel(self) -> None:
        def work(folder: Path) -> dict[str, Any]:
            tokenizer = AutoTokenizer.from_pretrained(self.root / "softmax")
            model = convert_checkpoint(self.root / "softmax")
            return self._fit_ranged(folder, model, tokenizer, self.recipe.kernel_stage)

        self._stage("kernel", {"settings": asdict(self.recipe.kernel_stage), "targets": asdict(self.recipe.targets)}, work)

    def polynomial(self) -> None:
        """Calibrate on training rows of every kind, swap the polynomials in and train on."""
        self._polynomial_stage("polynomial", "kernel", self.recipe.polynomial_stage)

    def refine(self) -> None:
        """Calibrate again, now on what the polynomials let through, and train on with other texts."""
        self._polynomial_stage("refine", "polynomial", self.recipe.refine_stage)

    def _polynomial_stage(self, name: str, source: str, stage: Stage) -> None:
        def work(folder: Path) -> dict[str, Any]:
            model, tokenizer = _load(self.root / source)
            rows = self._rows(tokenizer, stage, self.recipe.random_rows)
            ranges = track_ranges(model, rows.batches(self.recipe.calibration_rows))
            model = calibrated(model, ranges, self.recipe.degrees, self.recipe.margin)
            report = self._fit_ranged(folder, model, tokenizer, stage)
            return report | {"calibration": {layer: asdict(entry) for layer, entry in ranges.items()}}

        settings = {
            "settings": asdict(stage),
            "degrees": asdict(self.recipe.degrees),
            "calibration": [self.recipe.calibration_rows, self.recipe.margin],
        }
        self._stage(name, settings, work)

    def _fit_ranged(self, folder: Path, model: nn.Module, tokenizer, stage: Stage) -> dict[str, Any]:
        rows = self._rows(tokenizer, stage, self.recipe.random_rows)
        penalty = RangePenalty.for_model(model, rows.batch(slice(0, 512)), self.recipe.targets)
        hidden_teacher = _load(self.root / "softmax")[0] if stage.loss.hidden else None
        return self._fit(folder, model, tokenizer, stage, rows, penalty, hidden_teacher)

    def _fit(
        self,
        folder: Path,
        model: nn.Module,
        tokenizer,
        stage: Stage,
        rows: DistillationDataset,
        penalty: RangePenalty | None = None,
        hidden_teacher: nn.Module | None = None,
    ) -> dict[str, Any]:
        """Train, save model and tokenizer into `folder`, and report the loss curve and the score on the dev split."""
        set_seed(self.recipe.seed)
        _set_dropout(model, stage.dropout)
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=stage.batch_size,
            per_device_eval_batch_size=256,
            num_train_epochs=stage.epochs,
            max_steps=self.max_steps or -1,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            warmup_steps=stage.warmup,
            lr_scheduler_type="linear",
            eval_strategy="no" if self.max_steps else "epoch",
            save_strategy="no",
            logging_steps=0.01,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            optim="adamw_torch_fused",
            disable_tqdm=self.announce is None,
            seed=self.recipe.seed,
        )
        blank = torch.full((len(self.dev), self.num_outputs), float("nan"))
        trainer = DistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=build_dataset(tokenizer, self.dev, teacher_logits=blank, max_length=rows.encoded["input_ids"].shape[1]),
            compute_metrics=metric_function(self.dev),
            processing_class=tokenizer,
            weights=stage.loss,
            penalty=penalty,
            hidden_teacher=hidden_teacher,
        )
        with redirect_stdout(sys.stderr):
            trainer.train()
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        if trainer.is_world_process_zero():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        result = evaluate_model(model, tokenizer, self.dev, max_length=rows.encoded["input_ids"].shape[1])
        return {
            "dev": _summary(result),
            "skipped_steps": trainer.skipped_steps,
            "targets": penalty.intervals if penalty else None,
            "log": trainer.state.log_history,
        }

    def _rows(self, tokenizer, stage: Stage, random_rows: int) -> DistillationDataset:
        stop = None if stage.unlabelled_rows is None else stage.unlabelled_start + stage.unlabelled_rows
        chosen = slice(stage.unlabelled_start, stop)
        logits = None
        if "soft_labels" in self.stages:
            found, count = load_file(self.root / "soft_labels" / "logits.safetensors")["logits"], len(self.train)
            logits = torch.cat([found[:count], found[count:][chosen]])
        return build_dataset(
            tokenizer,
            self.train,
            self.unlabelled[chosen],
            teacher_logits=logits,
            num_outputs=self.num_outputs,
            repeats=self.recipe.label_repeats,
            random_rows=random_rows,
            max_length=self.recipe.max_length,
            seed=self.recipe.seed,
        )

    def _without_labels(self, texts: tuple[str, ...]) -> TextDataset:
        return TextDataset(self.recipe.task, "train", texts, None, ())

    def _load_base(self, name: str):
        folder = fetch_checkpoint(name) if name in CHECKPOINTS else Path(name)
        set_seed(self.recipe.seed)
        return _load(folder, num_labels=self.num_outputs)

    def _stage(self, name: str, settings: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> None:
        settings = {
            "task": self.recipe.task,
            "data": self.digests,
            "seed": self.recipe.seed,
            "max_steps": self.max_steps,
            "lengths": [self.recipe.max_length, self.recipe.teacher_max_length],
            "rows": [len(self.train), self.recipe.label_repeats, self.recipe.random_rows],
            "previous": stage_digest(self.root / self.stages[self.stages.index(name) - 1]) if name != self.stages[0] else None,
            **settings,
        }
        title = f"stage {self.stages.index(name) + 1} of {len(self.stages)}: {name}"
        run_stage(self.root / name, settings, work, lambda: self.announce(title) if self.announce else None)


def _load(folder: Path, **kwargs: Any):
    return AutoModelForSequenceClassification.from_pretrained(folder, **kwargs), AutoTokenizer.from_pretrained(folder)


def _set_dropout(model: nn.Module, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _shuffled(texts: tuple[str, ...], seed: int) -> tuple[str, ...]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return tuple(texts[row] for row in order.tolist())


def _summary(result: EvaluationResult) -> dict[str, Any]:
    return {name: value for name, value in result.to_dict().items() if name != "ranges"}
