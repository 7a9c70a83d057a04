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
    squarings: Annotated[str, typer.Option(help="Kernel squarings k of (1 + x/2^k)^(2^k); own: the recipe's.")] = "own,6,8,10",
    norm_degrees: Annotated[str, typer.Option(help="Degrees of LayerNorm's 1 / sqrt; own: the recipe's.")] = "own,7,15,31",
    activation_degrees: Annotated[str, typer.Option(help="Degrees of the activations; own: the recipe's.")] = "own,3,7,15",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each point.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each point, with seeds 0, 1, ...")] = 1,
    parameters: Annotated[str | None, typer.Option(help="CKKS parameter set of the cost; default: the recipe's.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score and cost of settings around the recipe's: one axis at a time, then all at their least and all at their most."""
    from rich.table import Table
    from transformers.utils import logging

    from hf_he.checkpoints import default_model
    from hf_he.data import load_dataset
    from hf_he.finetuning.recipe import load_finetune_recipe
    from hf_he.finetuning.study import Axes, Study, plot, summarise
    from hf_he.scripts.display import console, print_json, progress_bar, say

    logging.set_verbosity_error()
    recipe = load_finetune_recipe(config or default_model().parent.parent / "recipes" / "finetune_mr" / "config.yaml", model=model)
    arguments = recipe.training_arguments(max_steps=steps, parameters=parameters)
    settings = arguments.settings(1, divisor=1.0, eps=0.02, loss_bound=12.0)
    polynomials = {"--squarings": squarings, "--norm-degrees": norm_degrees, "--activation-degrees": activation_degrees}
    points = Axes(_numbers(ranks, "--ranks"), *(_numbers(text, option, OWN) for option, text in polynomials.items())).points()
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
    if any(row["score"] is not None for row in rows):
        plot(rows, output_dir / "study.png", f"{train.task}, {steps} steps of {settings.sequences}, {arguments.parameter_set_name}")
    if json_output:
        print_json({"model": str(recipe.model_folder), "parameters": arguments.parameter_set_name, "steps": steps, "seeds": seeds, "points": rows})
        return
    title = f"{train.task}: {len(dev)} dev rows after {steps} steps of {settings.sequences}; costs planned for {arguments.parameter_set_name}"
    table = Table(*HEADER, title=title)
    for row in rows:
        table.add_row(*_cells(row), style="bold" if row["pareto"] else None)
    console.print(table)
    say(f"bold: nothing measured is better at no more cost. {output_dir / 'study.png'}, {output_dir / 'table.md'}")


HEADER = ("rank", "k", "LayerNorm", "activation", "before", "after", "loss", "s a step", "refreshes", "rotations", "s a batch of inference")


def markdown(rows) -> str:
    """The table of a README; points on the Pareto front in bold."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [tuple(f"**{cell}**" if row["pareto"] else cell for cell in _cells(row)) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(row) -> tuple[str, ...]:
    setting = tuple(OWN if row[name] is None else str(row[name]) for name in ("rank", "squarings", "norm_degree", "activation_degree"))
    scores = ("", row["error"].split(":")[0], "")
    if row["score"] is not None:
        spread = f" ({row['lowest']:.4f} to {row['highest']:.4f})" if row["lowest"] < row["highest"] else ""
        scores = (f"{row['before']:.4f}", f"{row['score']:.4f}{spread}", f"{row['loss']:.4f}")
    if row["step_seconds"] is None:
        return (*setting, *scores, "", "", "", "")
    rotations = f"{row['step_operations'].get('rotate', 0):,}"
    return (*setting, *scores, f"{row['step_seconds']:.1f}", str(row["step_refreshes"]), rotations, f"{row['inference_seconds']:.2f}")


def _numbers(text: str, option: str, none: str = "") -> tuple[int | None, ...]:
    """The numbers in `text`, None for the word `none`."""
    parts = text.split(",")
    if not all(part == none or (part.isdecimal() and int(part) >= 1) for part in parts):
        raise typer.BadParameter(f"{option} takes whole numbers from 1 on{f' or {none}' if none else ''}, separated by commas, got {text!r}")
    return tuple(None if part == none else int(part) for part in parts)
