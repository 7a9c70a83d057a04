"""What an encrypted run is compared with and how it is shown: the plaintext twin, the JSON contract of `hf-he finetune`, the loss curve."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_he.checkpoints import load_classifier
from hf_he.data import TextDataset
from hf_he.errors import CheckpointError
from hf_he.evaluation import encode_texts, evaluate_model
from hf_he.finetuning.order import DataOrder
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import PolynomialTraining
from hf_he.finetuning.step import adapted_model
from hf_he.measurement import peak_memory_bytes

if TYPE_CHECKING:
    from hf_he.finetuning.arguments import EncryptedTrainingArguments
    from hf_he.finetuning.recipe import FinetuneRecipe
    from hf_he.finetuning.trainer import EncryptedTrainer


@dataclass(frozen=True)
class Twin:
    """The same run in the clear: losses before each update, the adapter after the last, seconds per step, the model."""

    losses: list[float]
    initial: Mapping[str, torch.Tensor]
    adapter: Mapping[str, torch.Tensor]
    seconds_per_step: float
    model: torch.nn.Module


@dataclass(frozen=True)
class Details:
    """What the tables and the plot show beyond the JSON contract. `update_error`: the adapter's error relative to what training changed."""

    update_error: float
    planned_seconds: Mapping[str, float]
    planned_refreshes: int
    refreshes_per_step: float
    rows: int


def twin_run(model: Path, tokenizer: Any, dataset: TextDataset, settings: TrainingSettings, rows: Callable[[int], list[int]], steps: int, seed: int) -> Twin:
    """`steps` steps of these settings in polynomial mode, from the adapter that the encrypted run had; `rows` gives each step's examples."""
    torch.manual_seed(seed)
    training = PolynomialTraining(adapted_model(load_classifier(model).double(), settings), settings)
    initial, start = training.adapter, time.perf_counter()
    for number in range(1, steps + 1):
        batch = dataset.select(rows(number))
        training.step(encode_texts(tokenizer, batch), batch.labels)
    return Twin(training.losses, initial, training.adapter, (time.perf_counter() - start) / max(steps, 1), training.model)


def relative_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], origin: Mapping[str, torch.Tensor] | None = None) -> float:
    """|found - expected| / |expected - origin| over all values (origin zero by default)."""
    difference = sum(float((found[name].double() - values).square().sum()) for name, values in expected.items())
    size = sum(float((values - (0.0 if origin is None else origin[name])).square().sum()) for name, values in expected.items())
    return (difference / size) ** 0.5 if size else 0.0


def report_of(trainer: EncryptedTrainer, announce: Callable[[str], None] = lambda text: None) -> tuple[dict[str, Any], Details]:
    """The JSON contract of `hf-he finetune --encrypted` for a finished run, and details beside it.

    Scores are those of the plaintext model in polynomial mode on the trainer's eval_dataset. `by_op` and `operations` are the server's seconds and
    operations per step, averaged over the steps of this process, as are `seconds_per_step` (the client's part included) and `bootstraps_per_step`.
    """
    training, steps = trainer.training, trainer.state.global_step
    announce("Running the plaintext twin")
    twin = twin_run(trainer.model_folder, training.client.tokenizer, trainer.train_dataset, training.settings, trainer.step_rows, steps, trainer.args.seed)
    adapter = training.layout.values(training.model)
    steps_here, report = len(trainer.reports) // trainer.ranks, trainer.report
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    client, server = peak_memory_bytes(), 0 if report is None else trainer.ranks * report["peak_memory_bytes"]
    batches = -(-training.settings.sequences // training.packing.sequences)

    def per_step(values: Mapping[str, float]) -> dict[str, float]:
        return {name: value / steps_here for name, value in values.items()}

    data = {
        "backend": training.backend.name,
        "steps": steps,
        "losses": [entry["loss"] for entry in logs],
        "losses_polynomial": twin.losses,
        "adapter_relative_error": relative_error(adapter, twin.adapter),
        "seconds_per_step": sum(entry["seconds"] for entry in logs) / max(len(logs), 1),
        "by_op": {} if report is None else per_step(report["by_op"]),
        "operations": {} if report is None else {name: round(count) for name, count in per_step(report["operations"]).items()},
        "bootstraps_per_step": sum(entry["bootstraps"] for entry in logs) / max(len(logs), 1),
        "peak_memory_gb": (client + server) / 1e9,
        "score_before": _score(_untrained(trainer), trainer),
        "score_after": _score(training.model, trainer),
    }
    details = Details(
        relative_error(adapter, twin.adapter, twin.initial),
        training.plan.seconds(batches),
        training.plan.refreshes(batches),
        sum(entry["refreshes"] for entry in logs) / max(len(logs), 1),
        len(trainer.eval_dataset),
    )
    return data, details


def plain_run(recipe: FinetuneRecipe, args: EncryptedTrainingArguments) -> dict[str, Any]:
    """The recipe in the clear and in polynomial mode: the same contract, null for what only an encrypted run has. Writes `output_dir`/adapter.

    Raises CheckpointError where that folder holds an encrypted run, whose decrypted adapter it would replace.
    """
    from hf_he.client import Client
    from hf_he.finetuning.calibration import calibrate
    from hf_he.finetuning.client_folder import RUN_FILE
    from hf_he.finetuning.examples import accepted

    if (Path(args.output_dir) / "client" / RUN_FILE).is_file():
        raise CheckpointError(f"{args.output_dir} holds an encrypted run, whose adapter this one would replace: choose another output folder (--output-dir)")
    (train, dev), model = recipe.datasets(), recipe.start_model(args.output_dir)
    client = Client.from_pretrained(model, backend="simulator")
    tokenizer = client.tokenizer
    draft = args.settings(len(train), divisor=1.0, eps=0.02, loss_bound=12.0)
    order = DataOrder(len(train), draft.sequences, args.seed if args.data_seed is None else args.data_seed)

    def rows(number: int) -> list[int]:
        return accepted(client, train, order.step(number))[0]

    calibrated = range(1, min(args.calibration_steps, order.steps_per_epoch) + 1)
    found = calibrate(model, tokenizer, train, draft, [rows(number) for number in calibrated], args.seed, args.calibrated_eps_ratio)
    settings = args.settings(len(train), **asdict(found))
    before = evaluate_model(load_classifier(model), tokenizer, dev).score
    twin = twin_run(model, tokenizer, train, settings, rows, settings.steps, args.seed)
    twin.model.save_pretrained(Path(args.output_dir) / "adapter")
    after = evaluate_model(twin.model, tokenizer, dev).score
    nothing = dict.fromkeys(("losses", "adapter_relative_error", "by_op", "operations", "bootstraps_per_step"))
    return {
        "backend": "plaintext", "steps": settings.steps, **nothing, "losses_polynomial": twin.losses, "seconds_per_step": twin.seconds_per_step,
        "peak_memory_gb": peak_memory_bytes() / 1e9, "score_before": before, "score_after": after,
    }  # fmt: skip


def plot_losses(losses: list[float], twin: list[float], path: Path) -> None:
    """The encrypted run's losses beside its twin's (means of a hundredth of a run longer than 200 steps), and their difference, as a PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, differences) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    steps, window = range(1, len(losses) + 1), max(1, len(losses) // 100)
    curves.plot(*_means(twin, window), "k-", linewidth=2.5, alpha=0.3, label="polynomial twin, in the clear")
    curves.plot(*_means(losses, window), "C0.-", linewidth=1, label="encrypted")
    curves.set(xlabel="step", ylabel="loss before the update", title="training loss" if window == 1 else f"training loss, means of {window} steps")
    curves.legend(fontsize=8)
    differences.semilogy(steps, [max(abs(a - b), 1e-12) for a, b in zip(losses, twin, strict=True)], "C3.-", linewidth=1)
    differences.set(xlabel="step", title="|encrypted - twin|")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _means(losses: list[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Last step and mean of each full window of `losses`."""
    ends = np.arange(window, len(losses) + 1, window)
    return ends, np.add.reduceat(np.asarray(losses)[: ends[-1]], ends - window) / window


def _untrained(trainer: EncryptedTrainer) -> torch.nn.Module:
    return load_classifier(trainer.model_folder).double()


def _score(model: torch.nn.Module, trainer: EncryptedTrainer) -> float:
    return evaluate_model(model, trainer.training.client.tokenizer, trainer.eval_dataset).score
