"""Turn a finished recipe run into a publishable folder: fp16 weights that load as float32, model card, report and training curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_he.data import TextDataset, load_dataset
from hf_he.evaluation import baselines, evaluate_model
from hf_he.nn import LayerRange
from hf_he.training.distillation import random_sequences
from hf_he.training.model_card import model_card
from hf_he.training.pipeline import Pipeline
from hf_he.training.range_penalty import track_ranges

SENTENCE_BATCH = 512
CHECKED_SENTENCES = 20_000
RANDOM_SEQUENCES = 5_000


def export(pipeline: Pipeline, folder: Path) -> dict[str, Any]:
    """Write `folder` and return the report, whose scores and ranges come from the fp16 file as a user loads it.

    Test rows are read here and nowhere earlier. `ranges` holds, for every population of inputs, what each layer saw and how many values
    fell outside.
    """
    recipe = pipeline.recipe
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = pipeline.result()
    _name_labels(model, recipe.task)
    model.save_pretrained(folder, state_dict={name: weight.half() for name, weight in model.state_dict().items()})
    tokenizer.save_pretrained(folder)

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.set_mode("polynomial")
    splits = _splits(pipeline)
    scores = {name: _score(model, tokenizer, rows, recipe.max_length) for name, rows in splits.items()}
    compared = {"softmax student": ("softmax", recipe.max_length), "teacher": ("teacher", recipe.teacher_max_length)}
    comparison: dict[str, dict[str, float]] = {name: {} for name in splits}
    for label, (stage, length) in compared.items():
        if stage in pipeline.stages:
            other = AutoModelForSequenceClassification.from_pretrained(pipeline.root / stage).eval()
            other_tokenizer = AutoTokenizer.from_pretrained(pipeline.root / stage)
            for name, rows in splits.items():
                comparison[name][label] = evaluate_model(other, other_tokenizer, rows, max_length=length).score
    for name, rows in splits.items():
        comparison[name] |= baselines(pipeline.train, rows)
    populations = {f"{name} rows": rows.first for name, rows in {"train": pipeline.train, **splits}.items()}
    if pipeline.unlabelled:
        populations |= {"IMDb sentences (training)": pipeline.unlabelled[:CHECKED_SENTENCES], "IMDb sentences (unseen)": pipeline.unseen[:CHECKED_SENTENCES]}
    ranges = {name: _ranges(model, tokenizer, texts, recipe.max_length) for name, texts in populations.items()}
    noise = random_sequences(tokenizer, RANDOM_SEQUENCES, recipe.max_length, seed=recipe.seed + 1)
    noise_batches = [{key: value[i : i + SENTENCE_BATCH] for key, value in noise.items()} for i in range(0, RANDOM_SEQUENCES, SENTENCE_BATCH)]
    ranges["random tokens"] = _describe(track_ranges(model, noise_batches), RANDOM_SEQUENCES)
    report = {
        "recipe": {key: value for key, value in recipe.to_dict().items() if key not in ("output_dir", "data_dir")},
        "seconds": {stage: json.loads((pipeline.root / stage / "stage.json").read_text(encoding="utf-8"))["seconds"] for stage in pipeline.stages},
        "metric": pipeline.dev.metric,
        "scores": scores,
        "comparison": comparison,
        "approximations": model.config.approximations,
        "ranges": ranges,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    model_card(report, model.config, recipe.name).save(folder / "README.md")
    return report


def plot_training(pipeline: Pipeline, path: Path) -> None:
    """Loss curves of every training stage, and the dev score after each epoch, as a PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in pipeline.stages if stage != "soft_labels"]
    figure, axes = pyplot.subplots(1, len(stages), figsize=(14, 3.6), constrained_layout=True)
    metric = f"eval_{pipeline.dev.metric}"
    for axis, stage in zip(axes, stages, strict=True):
        report = json.loads((pipeline.root / stage / "stage.json").read_text(encoding="utf-8"))
        log = report.get("log", [])
        for term in ("label_loss", "soft_loss", "hidden_loss", "penalty_loss"):
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=term.replace("_loss", ""), linewidth=1)
        axis.set(title=stage, xlabel="step", yscale="log")
        scored = [(entry["step"], entry[metric]) for entry in log if metric in entry]
        if scored:
            right = axis.twinx()
            right.plot(*zip(*scored, strict=True), "k.-", linewidth=0.8)
            right.set_ylim(0.5, 0.9)
            right.set_ylabel(f"dev {pipeline.dev.metric}" if stage == stages[-1] else "")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("loss terms")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _splits(pipeline: Pipeline) -> dict[str, TextDataset]:
    """What the scores are measured on: the task's own rows, and MR where a recipe trains on other reviews than MR's."""
    splits = {"dev": pipeline.dev}
    if pipeline.recipe.task in ("mr", "imdb"):
        splits["test"] = load_dataset(pipeline.recipe.task, "test")
    if pipeline.recipe.task == "imdb":
        splits |= {f"MR {split}": load_dataset("mr", split) for split in ("dev", "test")}
    return splits


def _score(model, tokenizer, rows: TextDataset, max_length: int) -> dict[str, Any]:
    """Scores in both modes; polynomial mode is what runs under encryption."""
    result = evaluate_model(model, tokenizer, rows, max_length=max_length)
    model.set_mode("exact")
    exact = evaluate_model(model, tokenizer, rows, max_length=max_length)
    model.set_mode("polynomial")
    return {"rows": len(rows), "polynomial": result.score, "exact": exact.score, "out_of_range": result.out_of_range}


def _ranges(model, tokenizer, texts: Sequence[str], max_length: int) -> dict[str, Any]:
    def batches():
        for start in range(0, len(texts), SENTENCE_BATCH):
            chunk = list(texts[start : start + SENTENCE_BATCH])
            yield dict(tokenizer(chunk, truncation=True, max_length=max_length, padding="max_length", return_tensors="pt"))

    return _describe(track_ranges(model, batches()), len(texts))


def _describe(ranges: dict[str, LayerRange], rows: int) -> dict[str, Any]:
    layers = {name: asdict(entry) for name, entry in ranges.items()}
    return {"rows": rows, "out_of_range": sum(entry.out_of_range for entry in ranges.values()), "layers": layers}


def _name_labels(model, task: str) -> None:
    if task in ("mr", "imdb", "sst2"):
        model.config.id2label = {0: "negative", 1: "positive"}
        model.config.label2id = {"negative": 0, "positive": 1}
