"""The `hf-he` command. Each command imports what it does on use, so that --help needs neither torch nor transformers."""

from __future__ import annotations

import os
import sys
from errno import ENOSPC
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(name="hf-he", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)

CLASSIFY = "Classify encrypted text"
TRAIN = "Fine-tune and generate on ciphertexts"
CLEAR = "Make models, in the clear"
COST = "Cost and environment"
ENCRYPTION = "Encryption"
EXTRAS = {"serve": ("fastapi", "httpx", "uvicorn"), "train": ("accelerate", "datasets", "evaluate", "matplotlib", "peft", "sklearn")}
"""Modules of the optional dependencies, by the extra of hf-he that brings them."""
INTERRUPTED = 130
GOES_ON = {"finetune": "an encrypted run goes on with --resume", "train": "the same command goes on", "study": "the same command goes on"}

RefreshPolicy = Literal["client", "bootstrap"]


def _find_model(name: Path | None) -> Path | None:
    return None if name is None else import_module("hf_he.checkpoints").find_model(name)


Model = Annotated[
    Path | None,
    typer.Option("--model", callback=_find_model, help="Folder of a model and its tokenizer, or a name in model_cards. Default: the one in this clone."),
]
Keys = Annotated[Path, typer.Option("--keys", help="Key folder written by `hf-he keygen`.")]
Backend = Annotated[
    str, typer.Option("--backend", help="auto (native), native, simulator (plaintext, no protection), fhelium or desilo.", rich_help_panel=ENCRYPTION)
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N, where the backend runs on it. Default: the backend's choice.", rich_help_panel=ENCRYPTION)
]
Parameters = Annotated[str, typer.Option("--parameters", help="CKKS parameter set; see `hf-he env`.", rich_help_panel=ENCRYPTION)]
PolicyParameters = Annotated[
    str | None,
    typer.Option("--parameters", help="CKKS parameter set; see `hf-he env`. Default: n14, with bootstrapping n16-bootstrap.", rich_help_panel=ENCRYPTION),
]
Refresh = Annotated[
    RefreshPolicy,
    typer.Option(
        "--refresh", help="client: exhausted ciphertexts go back to the client; bootstrap: the server refreshes them itself.", rich_help_panel=ENCRYPTION
    ),
]
DemoRefresh = Annotated[
    RefreshPolicy | None,
    typer.Option(
        "--refresh",
        help="bootstrap: the server needs nobody; client: quicker, less memory, interactive. Default: bootstrap where set and backend can.",
        rich_help_panel=ENCRYPTION,
    ),
]
Features = Annotated[
    int | None,
    typer.Option("--features", min=1, help="Features per ciphertext; 1 is for hundreds of sentences. Default: the planner's.", rich_help_panel=ENCRYPTION),
]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Folder of a PEFT adapter for the decoder.")]
Context = Annotated[int, typer.Option("--context", min=2, help="Tokens side by side in a ciphertext, a power of two: the longest prompt.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Tokens of prompt and text together. Default: --context.")]
Flooding = Annotated[float, typer.Option("--flooding", min=0, help="Deviation of noise added to the logits, for output that others may see (SECURITY.md).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-he {import_module('hf_he').__version__}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")] = False) -> None:
    """Private inference, fine-tuning and generation with transformers models on CKKS ciphertexts.

    Progress and notices go to stderr, results to stdout. Exit status: 0; 1 after an error, or where plaintext disagrees; 2 for a wrong command line.
    """


@app.command(rich_help_panel=CLASSIFY)
def demo(
    model: Model = None,
    backend: Backend = "auto",
    parameters: PolicyParameters = None,
    num_sentences: Annotated[int | None, typer.Option(min=1, help="Sentences to classify. Default: 32; 2 with fhelium and desilo on a CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Which sentences of the MR test half are drawn.")] = 0,
    text: Annotated[Path | None, typer.Option(help="Your own sentences, one per line.")] = None,
    refresh: DemoRefresh = None,
    json_output: Json = False,
    device: Device = None,
    trace: Annotated[Path | None, typer.Option(help="Also write the server's operations with their levels to this file.")] = None,
    features: Features = None,
) -> None:
    """Encrypt sentences, classify them on ciphertexts in a server process, decrypt, and compare with plaintext."""
    _place(device)
    agrees = _load("demo").demo(model, backend, parameters, num_sentences, seed, text, refresh, json_output, trace, features)
    raise typer.Exit(0 if agrees else 1)


@app.command(rich_help_panel=CLASSIFY)
def keygen(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Folder for secret.key, public.key and evaluation.keys.")] = Path("keys"),
    backend: Backend = "auto",
    parameters: PolicyParameters = None,
    bootstrapping: Annotated[bool, typer.Option("--bootstrapping", help="Also keys for servers with --refresh bootstrap (gigabytes).")] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Keys for a decoder behind `hf-he serve --generate`.")] = False,
    context: Context = 64,
    max_tokens: MaxTokens = None,
) -> None:
    """Generate the keys a model needs."""
    generation = {"context": context, "max_tokens": max_tokens} if generate else None
    _load("files").keygen(model, out, backend, parameters, bootstrapping, generation)


@app.command(rich_help_panel=CLASSIFY)
def encrypt(
    text: Annotated[Path, typer.Argument(help="UTF-8 text, one sentence per line.")],
    model: Model = None,
    keys: Keys = Path("keys"),
    out: Annotated[Path, typer.Option(help="Encrypted file to write.")] = Path("batch.enc"),
    features: Features = None,
) -> None:
    """Encrypt sentences for a model."""
    _load("files").encrypt(text, model, keys, out, features)


@app.command(rich_help_panel=CLASSIFY)
def infer(
    encrypted: Annotated[Path, typer.Argument(help="File written by `hf-he encrypt`.")],
    model: Model = None,
    keys: Keys = Path("keys"),
    out: Annotated[Path | None, typer.Option(help="Encrypted result to write; default: the input with suffix .result.")] = None,
    server: Annotated[str | None, typer.Option(help="URL of a running `hf-he serve`; default: start one as a child process.")] = None,
    refresh: Refresh = "client",
    device: Device = None,
    json_output: Json = False,
    flooding: Flooding = 0.0,
) -> None:
    """Run an encrypted file through a server, answering its refresh requests."""
    _place(device)
    _load("files").infer(encrypted, model, keys, out, server, refresh, json_output, flooding)


@app.command(rich_help_panel=CLASSIFY)
def decrypt(
    result: Annotated[Path, typer.Argument(help="File written by `hf-he infer`.")],
    model: Model = None,
    keys: Keys = Path("keys"),
    json_output: Json = False,
    flooding: Flooding = 0.0,
) -> None:
    """Decrypt a result and show the predictions."""
    _load("files").decrypt(result, model, keys, json_output, flooding)


@app.command(rich_help_panel=TRAIN)
def publish(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter that `hf-he finetune --encrypted` decrypted.")],
    out: Annotated[Path, typer.Option(help="Folder for the copy that may be shown to others.")],
    precision: Annotated[float, typer.Option(min=1e-9, max=1, help="Deviation of the noise, relative to the root mean square of each matrix.")] = 0.01,
    error: Annotated[float | None, typer.Option(min=1e-300, help="Bound of the values' errors: prints how much of them the copy shows.")] = None,
    json_output: Json = False,
) -> None:
    """Copy an adapter with noise that hides what its decryption shows of the secret key (SECURITY.md)."""
    _load("publish").publish(adapter, out, precision, error, json_output)


@app.command(rich_help_panel=CLASSIFY)
def serve(
    evaluation_keys: Annotated[Path, typer.Option(help="The file evaluation.keys; a secret key is refused.")],
    model: Model = None,
    backend: Backend = "auto",
    refresh: Refresh = "client",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8765,
    finetune: Annotated[Path | None, typer.Option(help="Train adapters on encrypted examples; checkpoints go to this folder. Also under torchrun.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Serve a decoder to `hf-he generate` and hf_he.encrypted_generate.")] = False,
    adapter: Adapter = None,
    context: Context = 64,
    max_tokens: MaxTokens = None,
    device: Device = None,
    announce: Annotated[bool, typer.Option("--announce", hidden=True)] = False,
) -> None:
    """Serve a model to clients that hold the matching secret key. The server holds evaluation keys only."""
    _place(device)
    generation = {"adapter": adapter, "context": context, "max_tokens": max_tokens} if generate else None
    _load("files").serve(model, evaluation_keys, backend, refresh, host, port, finetune, announce, generation)


@app.command(rich_help_panel=TRAIN)
def generate(
    prompt: Annotated[str, typer.Option(help="The text to go on with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
    model: Model = None,
    backend: Backend = "auto",
    parameters: PolicyParameters = None,
    kernel: Annotated[
        Literal["gaussian_kernel", "normalized_gaussian_kernel", "power_softmax"], typer.Option(help="Which shipped decoder, without --model.")
    ] = "gaussian_kernel",
    adapter: Adapter = None,
    encrypt_adapter: Annotated[bool, typer.Option("--encrypt-adapter", help="The server gets the adapter as ciphertexts only.")] = False,
    select: Annotated[
        Literal["client", "server"], typer.Option(help="Who picks the tokens: the client, or the server by encrypted argmax (small vocabularies).")
    ] = "client",
    refresh: Refresh = "client",
    context: Context = 64,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Sample at this temperature instead of taking the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens that make up this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Generate text on ciphertexts in a server process with an encrypted cache, and compare with the plaintext polynomial model."""
    _place(device)
    sampling = {name: value for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)) if value is not None}
    options = {"adapter": adapter, "encrypt_adapter": encrypt_adapter, "select": select, "refresh": refresh, "context": context}
    options |= {"sampling": sampling, "seed": seed}
    agrees = _load("generate").generate(prompt, max_new_tokens, model, backend, parameters, kernel, json_output, **options)
    raise typer.Exit(0 if agrees else 1)


def plan(
    model: Model = None,
    parameters: Parameters = "n14",
    batch: Annotated[int | None, typer.Option(min=1, help="Sentences at once: chooses the features per ciphertext for them, and says why.")] = None,
    finetune: Annotated[bool, typer.Option("--finetune", help="A LoRA step of --batch examples (default 16) instead of an inference.")] = False,
    json_output: Json = False,
) -> None:
    """Show at which level each operation will run, and what refreshes, keys and time that takes; no keys are made."""
    if finetune:
        _load("plan").plan_step(model, parameters, json_output, batch or 16)
    else:
        _load("plan").plan(model, parameters, json_output, batch)


def env(json_output: Json = False) -> None:
    """Show versions, CPU features, backends and parameter sets."""
    _load("env").env(json_output)


def _place(device: str | None) -> None:
    if device is not None:
        import_module("hf_he.backends").set_default_device(device)


def _load(name: str):
    return import_module(f"hf_he.scripts.{name}")


def _from_file(name: str):
    """A script that holds its own command, loaded without importing the package: at their top these import nothing heavy."""
    spec = spec_from_file_location(f"hf_he_cli_{name}", Path(__file__).parent / "scripts" / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


for _name, _panel in (("finetune", TRAIN), ("convert", CLEAR), ("train", CLEAR), ("evaluate", CLEAR), ("study", COST)):
    app.command(_name, rich_help_panel=_panel)(getattr(_from_file(_name), _name))
app.command(rich_help_panel=COST)(plan)
app.command(rich_help_panel=COST)(env)
app.add_typer(_from_file("bench").app, name="bench", rich_help_panel=COST)


def main() -> None:
    """Run the command line; an error of hf_he, of the file system or of a missing optional package ends it with one line instead of a traceback."""
    try:
        app()
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED:
            print("; ".join(("interrupted", *(hint for command, hint in GOES_ON.items() if command in sys.argv[1:2]))), file=sys.stderr)
        raise
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(1)


def _explain(error: Exception) -> str | None:
    """What happened and what to do; None for an error that nobody foresaw, whose traceback belongs into a report."""
    errors = sys.modules.get("hf_he.errors")
    if errors is not None and isinstance(error, errors.HEError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        for extra, modules in EXTRAS.items():
            if module in modules:
                return f"{module} is not installed: pip install 'hf-he[{extra}]', or in a clone pip install -e '.[{extra}]'"
    if os.strerror(ENOSPC) in str(error):
        return f"the disk is full: make room, or choose another folder (TMPDIR for keys of a demo); {error}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}; choose a path that can be read and written"
    return None
