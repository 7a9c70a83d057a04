"""The YAML recipe of `hf-he train`, and how any recipe is read: dataclasses whose field names are the keys, unknown keys and other types refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from hf_he.data import TASKS
from hf_he.errors import DataError
from hf_he.training.distillation import LossWeights
from hf_he.training.range_penalty import Degrees, RangeTargets

AnyRecipe = TypeVar("AnyRecipe")
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "keys and values"}


@dataclass
class Stage:
    """Optimiser settings of one stage: AdamW, linear warm-up over `warmup` of the steps, then linear decay to 0.

    `unlabelled_rows`: how many of the recipe's unlabelled texts this stage uses, from number `unlabelled_start` on; all for None.
    """

    epochs: float = 3.0
    learning_rate: float = 3e-4
    batch_size: int = 64
    weight_decay: float = 0.01
    warmup: float = 0.1
    dropout: float = 0.1
    unlabelled_start: int = 0
    unlabelled_rows: int | None = None
    loss: LossWeights = field(default_factory=LossWeights)


@dataclass
class Recipe:
    """Everything a training run depends on.

    `name`: of the published checkpoint. `teacher`, `student`: a pinned checkpoint name of hf_he.data or a folder; with teacher "none" there are no
    soft labels, and the stages that make them are left out.
    `train_rows`: at most so many labelled rows, at equal distances. `teacher_dtype`: precision of the soft labels' forward passes
    (bfloat16 is three times as fast on CPUs that have it, and moves logits by less than 0.1). `unlabelled`: "imdb" or "none", `unlabelled_rows` of it.
    `label_repeats`: how often a labelled row appears per epoch of the distillation stages. `random_rows`: random token sequences for the
    range penalty. `calibration_rows`: how many training rows fix the intervals (`export` then checks them on all). `margin`: widening of the calibrated ranges.
    `refine_weight`: share of the refined weights in the result, the rest being those of the polynomial stage.
    """

    kind: str = "classifier"
    name: str = "he-bert-tiny-mr"
    task: str = "mr"
    data_dir: str | None = None
    student: str = "bert-tiny"
    teacher: str = "minilm-l6"
    output_dir: str = "out/he_bert_tiny"
    seed: int = 0
    max_length: int = 32
    teacher_max_length: int = 48
    teacher_dtype: str = "bfloat16"
    unlabelled: str = "imdb"
    unlabelled_rows: int = 150_000
    train_rows: int | None = None
    label_repeats: int = 3
    random_rows: int = 4_000
    calibration_rows: int = 20_000
    margin: float = 0.25
    targets: RangeTargets = field(default_factory=RangeTargets)
    degrees: Degrees = field(default_factory=Degrees)
    teacher_stage: Stage = field(default_factory=Stage)
    softmax_stage: Stage = field(default_factory=Stage)
    kernel_stage: Stage = field(default_factory=Stage)
    polynomial_stage: Stage = field(default_factory=Stage)
    refine_stage: Stage = field(default_factory=Stage)
    refine_weight: float = 0.25

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"recipe: task {self.task!r} is not one of {', '.join(TASKS)}.")
        if self.unlabelled not in ("imdb", "none"):
            raise DataError(f"recipe: unlabelled must be imdb or none, not {self.unlabelled!r}.")
        if self.teacher_dtype not in ("bfloat16", "float32"):
            raise DataError(f"recipe: teacher_dtype must be bfloat16 or float32, not {self.teacher_dtype!r}.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, recipe: type[AnyRecipe] = Recipe, **overrides: Any) -> AnyRecipe:
    """Read a recipe; `overrides` that are not None replace top-level fields. Raises DataError naming an unknown or ill-typed key."""
    values = _read(path) | {name: value for name, value in overrides.items() if value is not None}
    return _build(recipe, values, str(path))


def recipe_kind(path: str | Path) -> str:
    """What the recipe's key `kind` says, by default "classifier"."""
    return _read(path).get("kind", "classifier")


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a recipe such as those in recipes/.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (UnicodeDecodeError, yaml.YAMLError):
        raise DataError(f"{path} is not YAML: give a recipe such as those in recipes/.") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected keys and values, got {values!r}.")
    return values


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected keys and values, got {values!r}.")
    hints = get_type_hints(kind)
    if unknown := values.keys() - hints.keys():
        raise DataError(f"{where}: unknown key {sorted(unknown, key=str)[0]!r}; known: {', '.join(sorted(hints))}.")
    return kind(**{name: _checked(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _checked(hint: Any, value: Any, where: str, null: str = "") -> Any:
    """`value` as a field of this type takes it: dataclass, dict or list of such, one or None, a number, text or true or false."""
    if is_dataclass(hint):
        return _build(hint, value, where)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return None if value is None else _checked(inner[0], value, where, " or null")
    if hint is float and type(value) in (int, str):
        value = _number(value, where)
    if hint is not Any and type(value) is not (origin or hint):
        raise DataError(f"{where} must be {_NAMES[origin or hint]}{null}, got {value!r}.")
    if origin is dict:
        return {_checked(inner[0], name, where): _checked(inner[1], entry, f"{where}: {name}") for name, entry in value.items()}
    return [_checked(inner[0], entry, where) for entry in value] if origin is list else value


def _number(value: int | str, where: str) -> float:
    """YAML 1.1 reads 3e-4 as a string."""
    try:
        return float(value)
    except ValueError:
        raise DataError(f"{where} must be a number, got {value!r}.") from None
