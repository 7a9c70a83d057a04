"""The YAML recipe of `hf-he finetune`: what to train on, and the arguments of EncryptedTrainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_he.checkpoints import default_model
from hf_he.data import TASKS, TextDataset, load_dataset
from hf_he.errors import DataError
from hf_he.finetuning.arguments import EncryptedTrainingArguments


@dataclass(frozen=True)
class FinetuneRecipe:
    """`model`: a folder, or the name of one in model_cards; `eval_rows` of the dev half are scored before and after, in polynomial mode."""

    model: str = "he-bert-tiny-mr"
    task: str = "mr"
    data_dir: str | None = None
    train_rows: int | None = None
    eval_rows: int = 512
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"recipe: task {self.task!r} is not one of {', '.join(TASKS)}")

    @property
    def model_folder(self) -> Path:
        named = default_model().parent / self.model
        return named if (named / "config.json").is_file() else Path(self.model)

    def datasets(self) -> tuple[TextDataset, TextDataset]:
        """Training rows, and the dev rows that are scored."""
        train = load_dataset(self.task, "train", self.data_dir).spread(self.train_rows)
        return train, load_dataset(self.task, "dev", self.data_dir).spread(self.eval_rows)

    def training_arguments(self, **overrides: Any) -> EncryptedTrainingArguments:
        """The recipe's arguments with those of `overrides` that are not None. Raises DataError for an unknown name, ParameterError for a wrong value."""
        chosen = {"report_to": "none", **self.arguments, **{name: value for name, value in overrides.items() if value is not None}}
        known = {entry.name for entry in dataclasses.fields(EncryptedTrainingArguments)}
        if unknown := set(chosen) - known:
            raise DataError(f"recipe: unknown argument {sorted(unknown)[0]!r}: they are those of EncryptedTrainingArguments")
        return EncryptedTrainingArguments(**chosen)


def load_finetune_recipe(path: str | Path, **overrides: Any) -> FinetuneRecipe:
    """Read a recipe; `overrides` that are not None replace top-level keys. Raises DataError for a missing file or an unknown key."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise DataError(f"cannot read the recipe {path} ({error.strerror}): give one such as recipes/finetune_mr/config.yaml") from None
    except yaml.YAMLError:
        raise DataError(f"{path} is not YAML: see recipes/finetune_mr/config.yaml") from None
    known = {entry.name for entry in dataclasses.fields(FinetuneRecipe)}
    if not isinstance(values, dict) or set(values) - known or not isinstance(values.get("arguments", {}), dict):
        raise DataError(f"{path}: the keys of a recipe are {', '.join(sorted(known))}, `arguments` being a table")
    return FinetuneRecipe(**{**values, **{name: value for name, value in overrides.items() if value is not None}})
