"""The YAML recipe of `hf-he finetune`: what to train on, and the arguments of EncryptedTrainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_he.checkpoints import find_model, load_classifier, load_tokenizer
from hf_he.data import TASKS, TextDataset, load_dataset
from hf_he.errors import DataError, HEError
from hf_he.finetuning.arguments import EncryptedTrainingArguments


@dataclass(frozen=True)
class FinetuneRecipe:
    """`model`: a folder, or the name of one in model_cards, of whose config.approximations those in `approximations` replace what they
    name (an interval, a degree); `eval_rows` of the dev half (null: all) are scored before and after, in polynomial mode. Runs of at most
    `short_runs["steps"]` steps take the other entries of `short_runs` in place of those of `arguments`: a smaller learning rate, a warm-up."""

    model: str = "he-bert-tiny-mr"
    task: str = "mr"
    data_dir: str | None = None
    train_rows: int | None = None
    eval_rows: int | None = 512
    approximations: dict[str, dict[str, Any]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    short_runs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"recipe: task {self.task!r} is not one of {', '.join(TASKS)}")
        if self.short_runs and type(self.short_runs.get("steps")) is not int:
            raise DataError("recipe: short_runs needs `steps`, the number of steps up to which it holds")

    @property
    def model_folder(self) -> Path:
        return find_model(self.model)

    def start_model(self, output_dir: str | Path) -> Path:
        """The folder training starts from: the model's own, or with `approximations` a copy in `output_dir`/start. Raises DataError for a layer it lacks."""
        if not self.approximations:
            return self.model_folder
        folder, model = Path(output_dir) / "start", load_classifier(self.model_folder)
        entries = model.config.approximations
        if unknown := set(self.approximations) - set(entries):
            raise DataError(f"recipe: the model has no layer {sorted(unknown)[0]!r} with a polynomial: they are {', '.join(sorted(entries))}")
        model.set_approximations({name: {**entry, **self.approximations.get(name, {})} for name, entry in entries.items()})
        model.save_pretrained(folder)
        load_tokenizer(self.model_folder).save_pretrained(folder)
        return folder

    def datasets(self) -> tuple[TextDataset, TextDataset]:
        """Training rows, and the dev rows that are scored."""
        train = load_dataset(self.task, "train", self.data_dir).spread(self.train_rows)
        return train, load_dataset(self.task, "dev", self.data_dir).spread(self.eval_rows)

    def training_arguments(self, **overrides: Any) -> EncryptedTrainingArguments:
        """The recipe's arguments with those of `overrides` that are not None. Raises DataError for an unknown one, ParameterError for a wrong value."""
        given = {name: value for name, value in overrides.items() if value is not None}
        short, steps = dict(self.short_runs), given.get("max_steps", self.arguments.get("max_steps"))
        if type(steps) is not int or not 0 < steps <= short.pop("steps", 0):
            short.clear()
        chosen = {"report_to": "none", **self.arguments, **short, **given}
        known = {entry.name for entry in dataclasses.fields(EncryptedTrainingArguments)}
        if unknown := set(chosen) - known:
            raise DataError(f"recipe: unknown argument {sorted(unknown)[0]!r}: they are those of EncryptedTrainingArguments")
        try:
            return EncryptedTrainingArguments(**chosen)
        except HEError:
            raise
        except (TypeError, ValueError) as error:
            raise DataError(f"recipe: an argument is not what EncryptedTrainingArguments take ({error})") from None
