"""`hf-he finetune --encrypted --task lm`: LoRA adapters of a decoder on a private text, in a server process that sees neither text nor adapter."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_he.checkpoints import default_decoder, find_model
from hf_he.client import BOOTSTRAPPING_PARAMETERS, DEFAULT_PARAMETERS
from hf_he.errors import CheckpointError, DataError, ParameterError
from hf_he.finetuning.client_folder import RUN_FILE
from hf_he.finetuning.language import EncryptedTextTrainer
from hf_he.remote import connect
from hf_he.scripts.display import console, print_json, say

DEFAULT_OUTPUT = Path("out/finetune-text")


def finetune_text(
    text: Path | None,
    model: str | None,
    output_dir: str | None,
    urls: list[str] | None,
    resume: bool,
    json_output: bool,
    *,
    refused: dict[str, Any],
    refresh: str | None,
    parameters: str | None,
    **options: Any,
) -> None:
    """Run and print. `options`: of EncryptedTextTrainer, None for its defaults; `refused`: options without a meaning here, by name."""
    for name, value in refused.items():
        if value:
            raise ParameterError(f"{name} has no meaning with --task lm: leave it out")
    if text is None:
        raise ParameterError("--task lm needs --text, a file with the private text")
    if urls and len(urls) > 1:
        raise ParameterError("a text is trained on by one server process: give --server once")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text} is not readable as UTF-8 text ({type(error).__name__}): give a text file") from None
    folder, refresh = Path(output_dir or DEFAULT_OUTPUT), refresh or "client"
    known = (folder / "client" / RUN_FILE).is_file()
    if known != resume:
        raise CheckpointError(f"{folder} holds {'a run already: add --resume' if known else 'no run to resume: leave --resume out'}, or choose another folder")
    chosen = {name: value for name, value in options.items() if value is not None} | {"refresh": refresh, "announce": say}
    chosen["parameters"] = parameters or (BOOTSTRAPPING_PARAMETERS if refresh == "bootstrap" else DEFAULT_PARAMETERS)
    directory = find_model(model) if model else default_decoder()
    with ExitStack() as stack:
        server = stack.enter_context(connect(urls[0])) if urls else None
        data = EncryptedTextTrainer(directory, content, folder, server=server, **chosen).train()
    if json_output:
        print_json(data)
        return
    _print(data)
    say(f"adapter as ciphertexts: {folder / 'encrypted_adapter'}, for `hf-he serve --generate --adapter`; in the clear, for you: {folder / 'adapter'}")


def _print(data: dict[str, Any]) -> None:
    losses = Table("step", "encrypted", "polynomial twin", "difference", title="Loss per predicted token before each update")
    for step, (ours, twin) in enumerate(zip(data["losses"], data["losses_polynomial"], strict=True), 1):
        losses.add_row(str(step), f"{ours:.5f}", f"{twin:.5f}", f"{ours - twin:+.1e}")
    console.print(losses)
    facts = Table(show_header=False, title="Run")
    facts.add_row("backend", data["backend"])
    if data["seconds_per_step"] is not None:
        facts.add_row("time per step", f"{data['seconds_per_step']:.2f} s, {data['server_seconds_per_step']:.2f} s of it on the server, round trips included")
        facts.add_row("refreshes per step", f"{data['refreshes_per_step']:g}")
        facts.add_row("peak memory", f"{data['peak_memory_gb']:.2f} GB")
    facts.add_row("adapter against the twin", f"relative error {data['adapter_relative_error']:.1e} ({data['update_relative_error']:.1e} of the update)")
    console.print(facts)
