"""`hf-he train` for recipes of kind language-model: see `hf_he.training.language`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.table import Table

from hf_he.scripts.display import console, messages, print_json
from hf_he.training.language import LanguagePipeline
from hf_he.training.language_export import export
from hf_he.training.language_recipe import LanguageRecipe
from hf_he.training.recipe import load_recipe


def train_language(
    config: Path, output_dir: str | None, publish: Path | None, data_dir: str | None, seed: int | None, max_steps: int | None, json_output: bool
) -> None:
    """Run the recipe, export, and show the perplexities."""
    state = PartialState()
    recipe = load_recipe(config, LanguageRecipe, output_dir=output_dir, data_dir=data_dir, seeds=None if seed is None else [seed])
    pipeline = LanguagePipeline(recipe, max_steps=max_steps, announce=messages.print if state.is_main_process else None)
    pipeline.run()
    if not state.is_main_process:
        return
    folder = publish or pipeline.root / "published"
    messages.print(f"export: checkpoints, cards and report into {folder}")
    report = export(pipeline, folder)
    if json_output:
        print_json(report)
    else:
        console.print(perplexity_table(report))


def perplexity_table(report: dict[str, Any]) -> Table:
    """Test perplexities: mean and spread over the seeds, and the ratio to softmax."""
    seeds = len(report["recipe"]["seeds"])
    table = Table(
        "", "tokens", "polynomial", "exact", f"spread over {seeds} seeds", "ratio to softmax", "out of range", title="Perplexity on held-out documents"
    )
    for run, entry in report["summary"].items():
        has_polynomials = entry["mode"] == "polynomial"
        table.add_row(
            run,
            f"{entry['tokens']:,}",
            f"{entry['mean']:.3f}" if has_polynomials else "-",
            f"{entry['exact_mean']:.3f}",
            "-" if entry["spread"] is None else f"{entry['spread']:.3f}",
            f"{entry['ratio_to_softmax']:.4f}",
            str(entry["out_of_range"]) if has_polynomials else "-",
        )
    return table
