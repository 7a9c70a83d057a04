"""`hf-he train`: run a recipe to a polynomial-mode model, a classifier from pinned checkpoints or language models from scratch.

Also `python -m hf_he.scripts.train --config recipes/he_bert_tiny/config.yaml`, and the same under `accelerate launch -m`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Option(help="Recipe.")] = Path("recipes/he_bert_tiny/config.yaml"),
    output_dir: Annotated[str | None, typer.Option(help="Where stages are written; finished ones are not run again.")] = None,
    publish: Annotated[Path | None, typer.Option(help="Folder for the fp16 checkpoint, its card and report; default: OUTPUT_DIR/published.")] = None,
    task: Annotated[str | None, typer.Option(help="Another task than the recipe's.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with TASK/SPLIT.tsv for tasks other than mr.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed than the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Cut every stage after so many steps (a trial run).")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Train a model that encryption can compute, by a recipe; resumable.

    The recipe's kind decides: an HEBert (teacher, soft labels, softmax student, kernel student, polynomial swap, export), or language models
    (pre-training per attention kernel and seed, polynomial swap, export)."""
    from accelerate import PartialState
    from rich.table import Table
    from transformers.utils import logging

    from hf_he.errors import DataError
    from hf_he.scripts.display import console, messages, print_json
    from hf_he.training.export import export, plot_training
    from hf_he.training.pipeline import Pipeline
    from hf_he.training.recipe import load_recipe, recipe_kind

    logging.set_verbosity_error()
    kind = recipe_kind(config)
    if kind == "language-model":
        from hf_he.scripts.train_language import train_language

        if task is not None:
            raise DataError("--task belongs to recipes of kind classifier: leave it out.")
        return train_language(config, output_dir, publish, data_dir, seed, max_steps, json_output)
    if kind != "classifier":
        raise DataError(f"{config}: kind must be classifier or language-model, not {kind!r}.")
    state = PartialState()
    recipe = load_recipe(config, output_dir=output_dir, task=task, data_dir=data_dir, seed=seed)
    pipeline = Pipeline(recipe, max_steps=max_steps, announce=messages.print if state.is_main_process else None)
    pipeline.run()
    if not state.is_main_process:
        return
    folder = publish or pipeline.root / "published"
    messages.print(f"export: fp16 checkpoint, card and report into {folder}")
    report = export(pipeline, folder)
    plot_training(pipeline, folder / "training.png")
    if json_output:
        print_json(report)
        return
    table = Table("", *report["scores"], title=f"{recipe.task}, {report['metric']}, {recipe.max_length} tokens")
    table.add_row("rows", *(str(entry["rows"]) for entry in report["scores"].values()))
    for mode in ("polynomial", "exact"):
        table.add_row(f"HEBert, {mode} mode", *(f"{entry[mode]:.4f}" for entry in report["scores"].values()), style="bold")
    for name in next(iter(report["comparison"].values())):
        table.add_row(name.replace("_", " "), *(f"{entry[name]:.4f}" for entry in report["comparison"].values()))
    console.print(table)
    for name, entry in report["ranges"].items():
        console.print(f"{name}: {entry['out_of_range']} values outside their fitted intervals")


if __name__ == "__main__":
    typer.run(train)
