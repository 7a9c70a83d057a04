"""Turn a finished language-model run into its report and publishable folders: one per variant, each with tokenizer, card and scores."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from hf_he.models import HEGPTNeoXForCausalLM
from hf_he.training.language import LanguagePipeline
from hf_he.training.language_card import language_card
from hf_he.training.language_recipe import BASELINE
from hf_he.training.stages import stage_report


def export(pipeline: LanguagePipeline, folder: Path) -> dict[str, Any]:
    """Gather the scores of a finished run, write `folder`/report.json and `folder`/VARIANT for the variants to publish.

    The first seed is published, whatever its score.
    """
    recipe = pipeline.recipe
    folder.mkdir(parents=True, exist_ok=True)
    runs = {run: {str(seed): stage_report(pipeline.folder(seed, run, "scores")) for seed in seeds} for run, seeds in pipeline.runs().items()}
    report = {
        "recipe": {key: value for key, value in recipe.to_dict().items() if key not in ("output_dir", "data_dir")},
        "tokens": stage_report(pipeline.root / "text")["tokens"],
        "runs": runs,
        "summary": {run: _summary(run, seeds, runs[BASELINE]) for run, seeds in runs.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for variant in recipe.publish:
        _publish(pipeline, variant, recipe.seeds[0], report, folder / variant)
    return report


def _summary(run: str, seeds: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of the test perplexity in the mode that counts, and the ratio to softmax seed by seed."""
    mode = "exact" if run == BASELINE else "polynomial"
    values = [scores["test"][mode] for scores in seeds.values()]
    ratios = [scores["test"][mode] / baseline[seed]["test"]["exact"] for seed, scores in seeds.items()]
    return {
        "mode": mode,
        "mean": round(statistics.mean(values), 4),
        "spread": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "exact_mean": round(statistics.mean(scores["test"]["exact"] for scores in seeds.values()), 4),
        "ratio_to_softmax": round(statistics.mean(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "tokens": next(iter(seeds.values()))["tokens"],
        "out_of_range": None if run == BASELINE else sum(sum(scores["out_of_range"].values()) for scores in seeds.values()),
    }


def _publish(pipeline: LanguagePipeline, variant: str, seed: int, report: dict[str, Any], folder: Path) -> None:
    """Float32 weights in polynomial mode, tokenizer, generation defaults, card, and report.json: the report as far as it concerns this seed
    of the variant and of softmax."""
    model = HEGPTNeoXForCausalLM.from_pretrained(pipeline.folder(seed, variant), dtype=torch.float32)
    model.set_mode("polynomial")
    model.save_pretrained(folder)
    pipeline.tokenizer.save_pretrained(folder)
    own = {
        "variant": variant,
        "seed": seed,
        "recipe": report["recipe"],
        "tokens": report["tokens"],
        "runs": {run: report["runs"][run][str(seed)] for run in (BASELINE, variant)},
        "summary": {run: report["summary"][run] for run in (BASELINE, variant)},
    }
    (folder / "report.json").write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
    language_card(report, model.config, variant, seed).save(folder / "README.md")
