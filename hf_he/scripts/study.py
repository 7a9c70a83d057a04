"""`hf-he study`: quality of encrypted fine-tuning against its cost, over adapter rank and the degrees of every approximation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OWN = "own"
"""In place of a number: every layer keeps the recipe's."""


def study(
    config: Annotated[Path | None, typer.Option(help="Fine-tuning recipe; default: recipes/finetune_mr/config.yaml of this clone.")] = None,
    model: Annotated[str | None, typer.Option(help="Another start model: a folder, or a name in model_cards.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for results.jsonl, study.png and table.md; finished points are not run again.")] = Path("out/study"),
    ranks: Annotated[str, typer.Option(help="LoRA ranks; the first value of every axis is the centre.")] = "2,1,4,8",
    squarings: Annotated[str, typer.Option(help="Kernel squarings k of (1 + x/2^k)^(2^k); own: the recipe's.")] = "own,7,8,10",
    norm_degrees: Annotated[str, typer.Option(help="Degrees of LayerNorm's 1 / sqrt; own: the recipe's.")] = "own,7,15,31,63",
    activation_degrees: Annotated[str, typer.Option(help="Degrees of the activations; own: the recipe's.")] = "own,3,7,15,63",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each point.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each point, with seeds 0, 1, ...")] = 2,
    parameters: Annotated[str | None, typer.Option(help="CKKS parameter set of the cost; default: the recipe's.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score and cost of settings around the recipe's: one axis at a time, then all at their least and all at their most."""
    from rich.table import Table
    from transformers.utils import logging

    from hf_he.checkpoints import default_model
    from hf_he.data import load_dataset
    from hf_he.finetuning.recipe import FinetuneRecipe
    from hf_he.finetuning.study import Axes, Study
    from hf_he.finetuning.study_report import plot, summarise
    from hf_he.scripts.display import console, print_json, progress_bar, say
    from hf_he.training.recipe import load_recipe

    logging.set_verbosity_error()
    recipe = load_recipe(config or default_model().parent.parent / "recipes" / "finetune_mr" / "config.yaml", FinetuneRecipe, model=model)
    arguments = recipe.training_arguments(max_steps=steps, parameters=parameters)
    settings = arguments.settings(1, divisor=1.0, eps=0.02, loss_bound=12.0)
    polynomials = {"--squarings": squarings, "--norm-degrees": norm_degrees, "--activation-degrees": activation_degrees}
    points = Axes(whole_numbers(ranks, "--ranks"), *(whole_numbers(text, option, OWN) for option, text in polynomials.items())).points()
    train, dev = recipe.datasets()[0], load_dataset(recipe.task, "dev", recipe.data_dir)
    start, results = recipe.start_model(output_dir), output_dir / "results.jsonl"
    runner = Study(start, train, dev, settings, arguments.parameter_set_name, results, range(seeds), arguments.calibrated_eps_ratio)
    measured = []
    with progress_bar(f"{len(points)} points, {seeds} runs each") as progress:
        for entry in runner.run(points):
            measured.append(entry)
            outcome = entry.error.split(":")[0] if entry.score is None else f"{entry.score:.4f}"
            note = f"{len(measured)}/{len(points) * seeds} {entry.point}: {outcome}"
            progress.update(progress.task_ids[0], completed=len(measured), total=len(points) * seeds, note=note)
            if progress.disable:
                say(note)
    rows = summarise(measured)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "table.md").write_text(markdown(rows), encoding="utf-8")
    runs = f"{steps} steps of {settings.sequences}, {seeds} seed{'s' * (seeds > 1)}"
    title = f"{train.task.upper()}, {len(dev):,} dev rows after {runs}; cost planned for {arguments.parameter_set_name}"
    if any(row["score_change"] is not None for row in rows):
        plot(rows, output_dir / "study.png", title, dev.metric)
    if json_output:
        print_json({"model": str(recipe.model_folder), "parameters": arguments.parameter_set_name, "steps": steps, "seeds": seeds, "points": rows})
        return
    table = Table(*HEADER, title=title)
    for row in rows:
        table.add_row(*_cells(row), style="bold" if row["pareto_loss"] else None)
    console.print(table)
    say(f"±: standard deviation over the seeds; of differences, standard error. Bold: no lower dev loss at no more cost. In {output_dir}: study.png, table.md")


HEADER = (
    "rank", "k", "LayerNorm", "activation", "levels", "s a step", "refreshes", "rotations", "s a batch of inference",
    "dev score", "dev loss", "against the first", "training loss",
)  # fmt: skip


def markdown(rows) -> str:
    """The table of a README; points on the Pareto front of the dev loss in bold."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [tuple(f"**{cell}**" if cell and row["pareto_loss"] else cell for cell in _cells(row)) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(row) -> tuple[str, ...]:
    setting = tuple(OWN if row[name] is None else str(row[name]) for name in ("rank", "squarings", "norm_degree", "activation_degree"))
    costs = quality = ("",) * 5
    if row["step_seconds"] is not None:
        costs = (str(row["levels"]), f"{row['step_seconds']:.1f}", str(row["step_refreshes"]), f"{row['step_operations'].get('rotate', 0):,}")
        costs += (f"{row['inference_seconds']:.2f}",)
    if row["score"] is None:
        return (*setting, *costs, row["error"].split(":")[0], *quality[2:])
    change = "" if row["dev_loss_change"] is None else f"{row['dev_loss_change']:+.4f}"
    if change and len(row["runs"]) > 1:
        change += f" ± {row['dev_loss_change_error']:.4f}"
    return (*setting, *costs, _mean(row, "score"), _mean(row, "dev_loss"), change, f"{row['loss']:.4f}")


def _mean(row, name: str) -> str:
    spread = f" ± {row[f'{name}_spread']:.4f}" if len(row["runs"]) > 1 else ""
    return f"{row[name]:.4f}{spread}"


def whole_numbers(text: str, option: str, none: str = "") -> tuple[int | None, ...]:
    """The numbers in `text`, None for the word `none`."""
    parts = text.split(",")
    if not all(part == none or (part.isdecimal() and int(part) >= 1) for part in parts):
        raise typer.BadParameter(f"{option} takes whole numbers from 1 on{f' or {none}' if none else ''}, separated by commas, got {text!r}")
    return tuple(None if part == none else int(part) for part in parts)
