"""What encrypted fine-tuning pays for quality: adapter rank, squarings of the kernel, degrees of LayerNorm's 1 / sqrt and of the activations.

Quality is that of a short run of the plaintext twin (the polynomials that would run under encryption) on real data. Cost is what the counting
backend finds for one training step and for one inference with an encrypted adapter: operations, refreshes, and seconds of one core.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from hf_he.checkpoints import load_classifier, model_fingerprint
from hf_he.ckks.parameters import parameter_set
from hf_he.data import TextDataset
from hf_he.errors import ApproximationError, CorruptFileError, LevelError, RangeError
from hf_he.evaluation import encode_texts, evaluate_model
from hf_he.finetuning.calibration import calibrate
from hf_he.finetuning.order import DataOrder
from hf_he.finetuning.plan import plan_step
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import PolynomialTraining
from hf_he.finetuning.step import TrainingRun, adapted_model
from hf_he.packing import Packing
from hf_he.planner import CountingSession
from hf_he.protocol import SEQUENCE_LENGTH

CALIBRATION_BATCHES = 16


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
    squarings: Sequence[int | None] = (None, 6, 8, 10)
    norm_degree: Sequence[int | None] = (None, 7, 15, 31)
    activation_degree: Sequence[int | None] = (None, 3, 7, 15)

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
    """One line of the results file. `score` is None where `error` says what did not fit.

    `train` and `infer`: operations, refreshes and seconds (of one core, estimated) of a step of `sequences` examples, and of one packed batch; None for
    polynomials that do not exist.
    """

    point: Point
    seed: int
    steps: int
    sequences: int
    score: float | None
    before: float | None
    last_loss: float | None
    train: Mapping[str, Any] | None
    infer: Mapping[str, Any] | None
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
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self._key = {"model": model_fingerprint(self.folder), "task": train.task, "rows": [len(train), len(dev)]}
        self._key |= {"parameters": parameters, "eps_ratio": eps_ratio}
        self._key |= {name: value for name, value in asdict(settings).items() if name in ("optimizer", "learning_rate", "schedule", "target_modules")}
        self._calibrated: TrainingSettings | None = None
        self._costs: dict[Point, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}

    def run(self, points: Sequence[Point]) -> Iterator[Measured]:
        """Each point with each seed, in order; finished ones come from the file."""
        finished = self._finished()
        self._costs = {entry.point: (entry.train, entry.infer) for entry in finished.values() if entry.train and entry.infer}
        for point in points:
            for seed in self.seeds:
                key = (point, seed, self.settings.steps, self.settings.sequences)
                if key not in finished:
                    finished[key] = self.measure(point, seed)
                    self._append(finished[key])
                yield finished[key]

    def measure(self, point: Point, seed: int) -> Measured:
        """Count the cost and train the twin; a polynomial that does not fit its interval, or a value that leaves one, is a result too."""
        settings = replace(self._settings(), rank=point.rank)
        score = before = loss = train = infer = None
        error = ""
        try:
            if point not in self._costs:
                self._costs[point] = self.cost(point, settings)
            train, infer = self._costs[point]
            score, before, loss = self.quality(point, settings, seed)
        except (ApproximationError, LevelError, RangeError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        return Measured(point, seed, settings.steps, settings.sequences, score, before, loss, train, infer, error)

    def quality(self, point: Point, settings: TrainingSettings, seed: int) -> tuple[float, float, float]:
        """Dev score after and before a run of the twin, and its mean loss over the last tenth. Raises RangeError or ApproximationError."""
        model = load_classifier(self.folder)
        point.apply(model)
        before = evaluate_model(model, self.tokenizer, self.dev).score
        torch.manual_seed(seed)
        training = PolynomialTraining(adapted_model(model, settings), settings)
        order = DataOrder(len(self.train), settings.sequences, seed)
        for number in range(1, settings.steps + 1):
            batch = self.train.select(order.step(number))
            training.step(encode_texts(self.tokenizer, batch), batch.labels)
        tail = training.losses[-max(1, settings.steps // 10) :]
        return evaluate_model(training.model.float(), self.tokenizer, self.dev).score, before, sum(tail) / len(tail)

    def cost(self, point: Point, settings: TrainingSettings) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a training step and of one packed batch of inference, on a backend that counts."""
        parameters = parameter_set(self.parameters)

        def prepared() -> nn.Module:
            model = load_classifier(self.folder)
            point.apply(model)
            return model

        packing = Packing.fit(parameters.slots, load_classifier(self.folder).config.hidden_size, SEQUENCE_LENGTH)
        batches = -(-settings.sequences // packing.sequences)
        plan = plan_step(prepared(), parameters, packing, settings)
        step = {"operations": plan.operations(batches), "refreshes": plan.refreshes(batches), "seconds": sum(plan.seconds(batches).values())}
        session = CountingSession(parameters, packing)
        run = TrainingRun(session, prepared(), settings)
        run.load(replace(session.backend.fresh(session.top), batch_shape=(run.layout.count,)))
        run.prepare()
        session.backend.reset()
        with torch.no_grad():
            run.model(embedding_output=session.state(session.top), attention_mask=session.mask()).logits.operand.ciphertext  # noqa: B018
        backend = session.backend
        infer = {"operations": backend.log.operations(), "refreshes": len(backend.refreshes), "seconds": backend.total_seconds}
        return step, infer

    def _settings(self) -> TrainingSettings:
        """The settings with divisor, eps and loss bound calibrated at the centre."""
        if self._calibrated is None:
            order = DataOrder(len(self.train), self.settings.sequences, self.seeds[0])
            batches = [order.step(number) for number in range(1, min(CALIBRATION_BATCHES, order.steps_per_epoch) + 1)]
            found = calibrate(self.folder, self.tokenizer, self.train, self.settings, batches, eps_ratio=self.eps_ratio)
            self._calibrated = replace(self.settings, **asdict(found) | {"loss_scale": 1.0})
        return self._calibrated

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


def summarise(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One entry per point: mean and spread of the scores over the seeds, the mean of the last losses (every point sees the same examples in the same
    order), the score before training, costs, and whether nothing measured is better at no more cost."""
    rows = []
    for point in dict.fromkeys(entry.point for entry in measured):
        runs = [entry for entry in measured if entry.point == point]
        scores = [entry.score for entry in runs if entry.score is not None]
        entry = runs[0]
        train, infer = entry.train or {}, entry.infer or {}
        rows.append(
            {
                **asdict(point),
                "score": statistics.mean(scores) if len(scores) == len(runs) else None,
                "lowest": min(scores, default=None),
                "highest": max(scores, default=None),
                "before": entry.before,
                "loss": sum(run.last_loss for run in runs) / len(runs) if len(scores) == len(runs) else None,
                "step_seconds": train.get("seconds"),
                "step_refreshes": train.get("refreshes"),
                "step_operations": dict(train.get("operations", {})),
                "inference_seconds": infer.get("seconds"),
                "inference_refreshes": infer.get("refreshes"),
                "error": next((run.error for run in runs if run.error), ""),
            }
        )
    for row in rows:
        row["pareto"] = row["score"] is not None and not any(_beats(other, row) for other in rows)
    return rows


def _beats(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether `other` is as good at less cost, or better at no more."""
    if other["score"] is None:
        return False
    gain, saved = round(other["score"] - row["score"], 9), row["step_seconds"] - other["step_seconds"]
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Score against the estimated time of a training step, one colour per axis, the Pareto front as a line; a PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    centre = rows[0]
    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    names = {"rank": "r", "squarings": "k", "norm_degree": "LN", "activation_degree": "act"}
    markers = {"rank": "o", "squarings": "s", "norm_degree": "^", "activation_degree": "D", "": "*"}
    costs = [row["step_seconds"] for row in rows if row["score"] is not None]
    middle = 0.5 * (min(costs) + max(costs))
    for row in rows:
        if row["score"] is None:
            continue
        changed = [name for name in names if row[name] != centre[name]]
        kind = changed[0] if len(changed) == 1 else ""
        label = ", ".join(f"{names[name]} = {row[name] or 'own'}" for name in changed) or "centre"
        spread = [[row["score"] - row["lowest"]], [row["highest"] - row["score"]]]
        axis.errorbar(row["step_seconds"], row["score"], yerr=spread, fmt=markers[kind], color=f"C{list(markers).index(kind)}", capsize=2)
        right = row["step_seconds"] > middle
        axis.annotate(
            label, (row["step_seconds"], row["score"]), textcoords="offset points", xytext=(-5 if right else 5, 5), ha="right" if right else "left", fontsize=8
        )
    front = sorted((row["step_seconds"], row["score"]) for row in rows if row["pareto"])
    axis.plot(*zip(*front, strict=True), "k--", linewidth=0.8, label="Pareto front")
    axis.set(title=title, xlabel="one training step, core seconds (planned)", ylabel="dev score, polynomial mode")
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
