"""`hf-he finetune`: LoRA adapters on a task, with --encrypted on ciphertexts in a server process that sees neither data nor adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from hf_he.finetuning.trainer import EncryptedTrainer

SHORT_RUN_STEPS = 10
ENCRYPTION = "Encryption"
Location = Literal["server", "client"]


def finetune(
    encrypted: Annotated[bool, typer.Option("--encrypted", help="Train on ciphertexts; without it, in the clear with the same polynomials.")] = False,
    task: Annotated[str | None, typer.Option(help="mr, imdb, with --data-dir sst2, cola and others; lm: a decoder on a text of your own (--text).")] = None,
    text: Annotated[Path | None, typer.Option(help="With --task lm: the private text, UTF-8.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="With --task lm: tokens of a window, a power of two. Default: 64.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-8, help="Another than the recipe's.")] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe; default: recipes/finetune_mr/config.yaml of this clone.")] = None,
    model: Annotated[str | None, typer.Option(help="Another start model: a folder, or a name in model_cards.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the files of a GLUE task.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the run: keys, checkpoints, adapter, plot.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, native, simulator (plaintext, no protection), fhelium or desilo.", rich_help_panel=ENCRYPTION)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N, where the backend runs on it. Default: the backend's choice.", rich_help_panel=ENCRYPTION)
    ] = None,
    parameters: Annotated[str | None, typer.Option(help="CKKS parameter set; see `hf-he env`.", rich_help_panel=ENCRYPTION)] = None,
    refresh: Annotated[
        Literal["client", "bootstrap"] | None,
        typer.Option(
            help="Who refreshes exhausted ciphertexts: the client, or the server by bootstrapping. Default: the recipe's.", rich_help_panel=ENCRYPTION
        ),
    ] = None,
    optimizer_location: Annotated[
        Location | None,
        typer.Option(help="client: one round trip per step, and it sees the gradient. Default: the recipe's, server.", rich_help_panel=ENCRYPTION),
    ] = None,
    loss_location: Annotated[
        Location | None, typer.Option(help="client: one round trip per micro-batch. Default: the recipe's, server.", rich_help_panel=ENCRYPTION)
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the schedule; for a few, the recipe may have a rate of its own. Default: as --config says, without it 10."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0001, help="Train so many epochs instead of --max-steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step.")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapters.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Linear layers with an adapter, with commas: query,value. Default: the recipe's; of a decoder, queries, keys and values.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the initial adapter and the data order.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Server processes that share each step.", rich_help_panel=ENCRYPTION)] = None,
    server: Annotated[
        list[str] | None, typer.Option(help="URL of a running `hf-he serve --finetune`, once per rank; default: child processes.", rich_help_panel=ENCRYPTION)
    ] = None,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Only make the keys, for servers that are started elsewhere; then --resume --server URL.", rich_help_panel=ENCRYPTION),
    ] = False,
    features: Annotated[
        int | None, typer.Option(min=1, help="Features per ciphertext: the hidden size, or 1. Default: the planner's choice.", rich_help_panel=ENCRYPTION)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Fine-tune LoRA adapters by a recipe; the adapter comes back as a plain PEFT adapter."""
    from transformers.utils import logging

    from hf_he.backends import set_default_device
    from hf_he.checkpoints import default_model
    from hf_he.errors import ParameterError
    from hf_he.finetuning.recipe import FinetuneRecipe
    from hf_he.training.recipe import load_recipe

    logging.set_verbosity_error()
    set_default_device(device)
    targets = None if target_modules is None else tuple(name.strip() for name in target_modules.split(","))
    if task == "lm":
        from hf_he.scripts.finetune_text import finetune_text

        refused = {"--config": config, "--data-dir": data_dir, "--seed": seed, "--epochs": epochs, "--prepare": prepare, "--features": features}
        refused |= {"--processes": (processes or 1) > 1, "training in the clear": not encrypted}
        refused |= {"--optimizer-location client": optimizer_location == "client", "--loss-location server": loss_location == "server"}
        options = {"steps": max_steps, "rank": lora_rank, "batch_size": batch_size, "context": context, "learning_rate": learning_rate, "backend": backend}
        options |= {"target_modules": targets}
        finetune_text(text, model, output_dir, server, resume, json_output, refused=refused, refresh=refresh, parameters=parameters, **options)
        return
    if text is not None or context is not None:
        raise ParameterError("--text and --context belong to --task lm: add it, or leave them out")
    default = default_model().parent.parent / "recipes" / "finetune_mr" / "config.yaml"
    recipe = load_recipe(config or default, FinetuneRecipe, model=model, task=task, data_dir=data_dir)
    overrides = {
        "output_dir": output_dir, "backend": backend, "parameters": parameters, "refresh": refresh, "optimizer_location": optimizer_location,
        "loss_location": loss_location, "lora_rank": lora_rank, "per_device_train_batch_size": batch_size, "processes": processes, "seed": seed,
        "learning_rate": learning_rate, "features": features, "target_modules": targets,
        "num_train_epochs": epochs, "disable_tqdm": True,
    }  # fmt: skip
    if refresh == "bootstrap" and parameters is None:
        overrides["parameters"] = "n16-bootstrap"
    args = _scheduled(recipe, overrides, max_steps, resume, config is not None)
    if prepare and encrypted:
        _prepare(recipe, args)
    else:
        (_encrypted if encrypted else _plain)(recipe, args, server, resume, json_output)


def _scheduled(recipe: Any, overrides: dict[str, Any], max_steps: int | None, resume: bool, own: bool) -> Any:
    """The arguments of a run as long as the options say; without these as the run that is resumed, or as the recipe if it is the user's `own` and says."""
    from hf_he.finetuning.client_folder import RUN_FILE, read_run
    from hf_he.scripts.display import say

    asked, why = max_steps or overrides["num_train_epochs"], "as asked for"
    if overrides["num_train_epochs"]:
        max_steps = -1
    elif not asked:
        said = own and not recipe.arguments.keys().isdisjoint(("max_steps", "num_train_epochs"))
        max_steps, why = (None, "of the recipe") if said else (SHORT_RUN_STEPS, "a short run: --max-steps and --epochs make others")
    args = recipe.training_arguments(**overrides, max_steps=max_steps)
    folder = Path(args.output_dir) / "client"
    if resume and not asked and (folder / RUN_FILE).is_file():
        began, why = read_run(folder)["settings"].get("steps"), "of the run that goes on"
        if began != (args.max_steps if args.max_steps > 0 else args.total_steps(len(recipe.datasets()[0]))):
            args = recipe.training_arguments(**overrides, max_steps=began)
    say(f"{f'{args.max_steps} steps' if args.max_steps > 0 else f'{args.num_train_epochs:g} epochs'} ({why})")
    return args


def _prepare(recipe: Any, args: Any) -> None:
    from hf_he.finetuning.trainer import EncryptedTrainer
    from hf_he.scripts.display import console, say

    trainer = EncryptedTrainer(recipe.start_model(args.output_dir), args, recipe.datasets()[0], announce=say)
    keys = trainer.prepare()
    console.print(f"on the server: hf-he serve --model {trainer.model_folder} --evaluation-keys {keys} --finetune FOLDER", soft_wrap=True)
    console.print("here: this command again, with --resume --server URL in place of --prepare", soft_wrap=True)


def _encrypted(recipe: Any, args: Any, urls: list[str] | None, resume: bool, json_output: bool) -> None:
    from contextlib import ExitStack

    from hf_he.finetuning.report import plot_losses, report_of
    from hf_he.finetuning.trainer import EncryptedTrainer
    from hf_he.remote import connect
    from hf_he.scripts.display import print_json, say

    train, dev = recipe.datasets()
    with ExitStack() as stack:
        servers = [stack.enter_context(connect(url)) for url in urls] if urls else None
        bar = _bar(stack)
        trainer = EncryptedTrainer(recipe.start_model(args.output_dir), args, train, dev, callbacks=[bar], servers=servers, announce=say)
        trainer.train(resume_from_checkpoint=resume)
    folder = trainer.save_model()
    data, details = report_of(trainer, say)
    plot_losses(data["losses"], data["losses_polynomial"], trainer.folder / "losses.png")
    if json_output:
        print_json(data)
        return
    _print(trainer, data, details)
    say(f"adapter: {folder}; loss curve: {trainer.folder / 'losses.png'}")


def _bar(stack: Any) -> Any:
    """A TrainerCallback that shows steps and losses."""
    from transformers import TrainerCallback

    from hf_he.scripts.display import progress_bar, say

    class Bar(TrainerCallback):
        progress = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.progress = stack.enter_context(progress_bar("Training on ciphertexts"))
            self._show(state, "")

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                line = f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, {logs['seconds']:.1f} s"
                self._show(state, line)
                if self.progress.disable:
                    say(line)

        def _show(self, state, note):
            self.progress.update(self.progress.task_ids[0], completed=state.global_step, total=state.max_steps, note=note)

    return Bar()


def _print(trainer: EncryptedTrainer, data: dict[str, Any], details: Any) -> None:
    from rich.table import Table

    from hf_he.scripts.display import console

    losses = Table("step", "encrypted", "polynomial twin", "difference", title="Loss before each update")
    for step, (ours, twin) in enumerate(zip(data["losses"], data["losses_polynomial"], strict=True), 1):
        losses.add_row(str(step), f"{ours:.5f}", f"{twin:.5f}", f"{ours - twin:+.1e}")
    console.print(losses)
    by_op = Table(title="Server time of a step by operation")
    for name in ("operation", "seconds", "share", "planned"):
        by_op.add_column(name, justify="left" if name == "operation" else "right")
    total = sum(data["by_op"].values()) or 1.0
    for name, seconds in sorted(data["by_op"].items(), key=lambda item: -item[1]):
        by_op.add_row(name, f"{seconds:.2f}", f"{seconds / total:.0%}", f"{details.planned_seconds.get(name, 0.0):.2f}")
    console.print(by_op)
    facts = Table(show_header=False, title="Run")
    facts.add_row("steps", f"{data['steps']} in all, {trainer.state.epoch:.2f} epochs")
    facts.add_row("time per step", f"{data['seconds_per_step']:.2f} s, {data['seconds_per_step'] / trainer.args.per_device_train_batch_size:.2f} s per example")
    facts.add_row("planner's estimate", f"{sum(details.planned_seconds.values()):.1f} s on one core, {details.planned_refreshes} refreshes")
    facts.add_row("adapter against the twin", f"relative error {data['adapter_relative_error']:.1e} ({details.update_error:.1e} of the update)")
    facts.add_row("score", f"{data['score_before']:.4f} before, {data['score_after']:.4f} after ({details.rows} dev rows, polynomial mode)")
    facts.add_row("refreshes, bootstraps", f"{details.refreshes_per_step:g}, {data['bootstraps_per_step']:g} per step")
    facts.add_row("peak memory", f"{data['peak_memory_gb']:.2f} GB")
    facts.add_row("backend", data["backend"])
    console.print(facts)


def _plain(recipe: Any, args: Any, urls: list[str] | None, resume: bool, json_output: bool) -> None:
    """The same recipe in the clear, in polynomial mode."""
    from hf_he.errors import ParameterError
    from hf_he.finetuning.report import plain_run
    from hf_he.scripts.display import console, print_json, progress_bar

    if urls or resume:
        raise ParameterError("--server and --resume belong to encrypted training: add --encrypted, or leave them out")
    with progress_bar("Training in the clear, polynomial mode"):
        data = plain_run(recipe, args)
    if json_output:
        print_json(data)
        return
    first, last = data["losses_polynomial"][0], data["losses_polynomial"][-1]
    console.print(f"{data['steps']} steps, loss {first:.4f} to {last:.4f}, {data['seconds_per_step']:.3f} s each")
    console.print(f"score {data['score_before']:.4f} before, {data['score_after']:.4f} after ({recipe.eval_rows or 'all'} dev rows, polynomial mode)")
