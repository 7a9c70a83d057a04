"""What encrypted fine-tuning pays for quality: adapter rank, squarings of the kernel, degrees of LayerNorm's 1 / sqrt and of the activations.

Quality is that of a run of the plaintext twin (the polynomials that would run under encryption) on real data, with several seeds. Cost is what the
counting backend finds for one training step and for one inference with an encrypted adapter: operations, refreshes, and seconds of one core.
hf_he.finetuning.study_report turns the results into rows and a plot.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_he.checkpoints import load_classifier, load_tokenizer, model_fingerprint
from hf_he.ckks.parameters import parameter_set
from hf_he.data import TextDataset
from hf_he.errors import ApproximationError, CorruptFileError, LevelError, RangeError
from hf_he.evaluation import evaluate_model
from hf_he.finetuning.calibration import calibrate
from hf_he.finetuning.order import DataOrder
from hf_he.finetuning.plan import plan_step
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import mean_loss
from hf_he.finetuning.report import twin_run
from hf_he.finetuning.step import TrainingRun
from hf_he.packing import Packing
from hf_he.planner import CountingSession, packing_widths
from hf_he.protocol import SEQUENCE_LENGTH

CALIBRATION_BATCHES = 16
SEEDLESS = ("before", "train", "infer")
"""What a point has of its own, whatever the seed."""


@dataclass(frozen=True)
class Point:
    """One setting: `rank` of the adapters, `squarings` k of (1 + x/2^k)^(2^k), `norm_degree` of 1 / sqrt (no Newton step), `activation_degree`.
    None leaves each layer its own."""

    rank: int = 2
    squarings: int | None = None
    norm_degree: int | None = None
    activation_degree: int | None = None

    def apply(self, model: nn.Module) -> None:
        """Give a calibrated model these polynomials on the intervals it has. Raises ApproximationError when one cannot be fitted."""
        approximations = {}
        for name, entry in model.config.approximations.items():
            if "squarings" in entry:
                entry = entry if self.squarings is None else entry | {"squarings": self.squarings}
            elif "newton_steps" in entry:
                entry = entry if self.norm_degree is None else entry | {"degree": self.norm_degree, "newton_steps": 0}
            elif self.activation_degree is not None:
                entry = entry | {"degree": self.activation_degree}
            approximations[name] = entry
        model.set_approximations(approximations)


@dataclass(frozen=True)
class Axes:
    """The values to study; the first of each is the centre that the others are varied about."""

    rank: Sequence[int] = (2, 1, 4, 8)
    squarings: Sequence[int | None] = (None, 7, 8, 10)
    norm_degree: Sequence[int | None] = (None, 7, 15, 31, 63)
    activation_degree: Sequence[int | None] = (None, 3, 7, 15, 63)

    def points(self) -> list[Point]:
        """The centre, then one axis at a time, then the lowest and the highest numbers of all axes together."""
        values = {name: tuple(getattr(self, name)) for name in asdict(Point())}
        centre = Point(**{name: choices[0] for name, choices in values.items()})
        found = [centre, *(replace(centre, **{name: value}) for name, choices in values.items() for value in choices[1:])]
        for pick in (min, max):
            found.append(Point(**{name: pick((value for value in choices if value is not None), default=None) for name, choices in values.items()}))
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Measured:
    """One line of the results file: one point with one seed. What could not be had is None, and `error` says why.

    `before` and `score`: the task's metric on the dev rows before and after training; `dev_loss`: the mean loss there after it; `last_loss`: the
    mean training loss of the last tenth of the steps. `train` and `infer`: operations, refreshes and seconds (of one core, estimated) of a step of
    `sequences` examples, and of one packed batch, whose `levels` are those that the polynomials of the forward take one after the other.
    """

    point: Point
    seed: int
    steps: int
    sequences: int
    before: float | None = None
    score: float | None = None
    dev_loss: float | None = None
    last_loss: float | None = None
    train: Mapping[str, Any] | None = None
    infer: Mapping[str, Any] | None = None
    error: str = ""


class Study:
    """Runs points on one model, task and parameter set; `results` (JSON lines) holds finished ones, which are not run again."""

    def __init__(
        self,
        model: Path,
        train: TextDataset,
        dev: TextDataset,
        settings: TrainingSettings,
        parameters: str,
        results: Path,
        seeds: Sequence[int] = (0,),
        eps_ratio: float = 1e-3,
    ) -> None:
        self.folder, self.train, self.dev, self.settings, self.results, self.seeds = Path(model), train, dev, settings, Path(results), tuple(seeds)
        self.parameters, self.eps_ratio = parameters, eps_ratio
        self.tokenizer = load_tokenizer(self.folder)
        self._key = {"model": model_fingerprint(self.folder), "task": train.task, "rows": [len(train), len(dev)]}
        training = ("optimizer", "learning_rate", "schedule", "warmup_steps", "target_modules")
        self._key |= {"parameters": parameters, "eps_ratio": eps_ratio} | {name: getattr(settings, name) for name in training}
        self._known: dict[Point, dict[str, Any]] = {}

    def run(self, points: Sequence[Point]) -> Iterator[Measured]:
        """Each seed with each point, seeds outermost, so that an interrupted study has whole seeds; finished ones come from the file."""
        finished = self._finished()
        for entry in finished.values():
            self._known.setdefault(entry.point, {}).update({name: value for name in SEEDLESS if (value := getattr(entry, name)) is not None})
        for seed in self.seeds:
            for point in points:
                key = (point, seed, self.settings.steps, self.settings.sequences)
                if key not in finished:
                    finished[key] = self.measure(point, seed)
                    self._append(finished[key])
                yield finished[key]

    def measure(self, point: Point, seed: int) -> Measured:
        """Count the cost and train the twin; a polynomial that does not fit its interval, or a value that leaves one, is a result too."""
        known, found = self._known.setdefault(point, {}), {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._model(point).save_pretrained(folder)
                order = DataOrder(len(self.train), self.settings.sequences, seed)
                settings = self._calibrated(Path(folder), point, order, seed)
                if "train" not in known:
                    known["train"], known["infer"] = self.cost(point, settings)
                if "before" not in known:
                    known["before"], _ = self._scored(self._model(point))
                twin = twin_run(Path(folder), self.tokenizer, self.train, settings, order.step, settings.steps, seed)
                found["score"], found["dev_loss"] = self._scored(twin.model.float())
                tail = twin.losses[-max(1, settings.steps // 10) :]
                found["last_loss"] = sum(tail) / len(tail)
            except (ApproximationError, LevelError, RangeError) as problem:
                found["error"] = f"{type(problem).__name__}: {problem}"
        return Measured(point, seed, self.settings.steps, self.settings.sequences, **known, **found)

    def cost(self, point: Point, settings: TrainingSettings) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a training step and of one packed batch of inference, on a backend that counts."""
        parameters, model = parameter_set(self.parameters), self._model(point)
        packing = Packing.fit(parameters.slots, packing_widths(model.config)[0], SEQUENCE_LENGTH)
        batches = -(-settings.sequences // packing.sequences)
        plan = plan_step(model, parameters, packing, settings)
        step = {"operations": plan.operations(batches), "refreshes": plan.refreshes(batches), "seconds": sum(plan.seconds(batches).values())}
        session, model = CountingSession(parameters, packing, model.config.hidden_size), self._model(point)
        levels = polynomial_levels(model)
        run = TrainingRun(session, model, settings)
        run.load(replace(session.backend.fresh(session.top), batch_shape=(run.layout.count,)))
        run.prepare()
        session.backend.reset()
        with torch.no_grad():
            run.model(embedding_output=session.state(session.top), attention_mask=session.mask()).logits.operand.ciphertext  # noqa: B018
        backend = session.backend
        infer = {"operations": backend.log.operations(), "refreshes": len(backend.refreshes), "seconds": backend.total_seconds, "levels": levels}
        return step, infer

    def _model(self, point: Point) -> nn.Module:
        model = load_classifier(self.folder)
        point.apply(model)
        return model

    def _calibrated(self, folder: Path, point: Point, order: DataOrder, seed: int) -> TrainingSettings:
        """The settings of a run of this point, its open ranges calibrated as EncryptedTrainer does."""
        settings = replace(self.settings, rank=point.rank)
        batches = [order.step(number) for number in range(1, min(CALIBRATION_BATCHES, order.steps_per_epoch) + 1)]
        found = calibrate(folder, self.tokenizer, self.train, settings, batches, seed, self.eps_ratio)
        return replace(settings, **asdict(found) | {"loss_scale": 1.0})

    def _scored(self, model: nn.Module) -> tuple[float, float]:
        """Metric and mean loss on the dev rows."""
        result = evaluate_model(model, self.tokenizer, self.dev)
        return result.score, mean_loss(torch.from_numpy(result.logits), np.asarray(self.dev.labels))

    def _finished(self) -> dict[tuple[Point, int, int, int], Measured]:
        found = {}
        if self.results.is_file():
            for number, line in enumerate(self.results.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    entry = json.loads(line)
                    of, point = entry.pop("of"), Point(**entry.pop("point"))
                    measured = Measured(point, **entry)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise CorruptFileError(f"{self.results}, line {number} is no result of a study ({error}): remove that line, or the file") from None
                if of == json.loads(json.dumps(self._key)):
                    found[point, measured.seed, measured.steps, measured.sequences] = measured
        return found

    def _append(self, measured: Measured) -> None:
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"of": self._key, **asdict(measured)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def polynomial_levels(model: nn.Module) -> int:
    """Levels that the polynomials of one forward take, one after the other: kernels, 1 / sqrt, activations."""
    fitted = (getattr(module, "kernel_approximation", None) or getattr(module, "approximation", None) for module in model.modules())
    return sum(approximation.depth for approximation in fitted if approximation is not None)
