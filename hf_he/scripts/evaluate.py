"""`hf-he evaluate`: the score of a checkpoint, the ranges it kept, and trivial baselines beside it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def evaluate(
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of a model and its tokenizer, or a name in model_cards. Default: the one in this clone.")
    ] = None,
    task: Annotated[str, typer.Option(help="mr, imdb, sst2, rte, cola, mrpc or stsb; lm: perplexity of a decoder.")] = "mr",
    split: Annotated[Literal["test", "dev", "train"], typer.Option(help="Part of the data.")] = "test",
    mode: Annotated[Literal["exact", "polynomial", "encrypted"], typer.Option(help="Functions, polynomials, or polynomials on ciphertexts.")] = "polynomial",
    data_dir: Annotated[Path | None, typer.Option(help="Folder with TASK/SPLIT.tsv for tasks other than mr.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows, at equal distances.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per row, by default 32; encrypted runs always use 32. Of lm: the block, by default 64.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 256,
    baselines: Annotated[bool, typer.Option(help="Also train and score the baselines.")] = True,
    backend: Annotated[str, typer.Option(help="Backend of encrypted mode: auto, native or simulator.")] = "auto",
    parameters: Annotated[str, typer.Option(help="Parameter set of encrypted mode; see `hf-he env`.")] = "n14",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Score a checkpoint on a task in exact, polynomial or encrypted mode; decoders (--task lm) beside polynomial mode when encrypted."""
    from transformers import AutoModelForSequenceClassification

    from hf_he.checkpoints import check_architecture, default_model, find_model, load_in_mode, load_tokenizer
    from hf_he.data import load_dataset
    from hf_he.errors import HEError
    from hf_he.evaluation import MAX_LENGTH, evaluate_model
    from hf_he.evaluation import baselines as score_baselines
    from hf_he.scripts.display import print_json

    model = None if model is None else find_model(model)
    if task == "lm":
        if mode == "encrypted":
            return _evaluate_decoder(model, split, data_dir, limit or 100, max_length or MAX_LENGTH, backend, parameters, json_output)
        return _evaluate_language(model, split, mode, data_dir, limit, max_length, batch_size, json_output)
    directory = model or default_model()
    rows = load_dataset(task, split, data_dir).spread(limit)
    check_architecture(directory, "ForSequenceClassification", "a classifier; for perplexity add --task lm")
    computed = "exact" if mode == "exact" else "polynomial"
    classifier = load_in_mode(AutoModelForSequenceClassification, directory, "ForSequenceClassification", "classifier", computed)
    tokenizer = load_tokenizer(directory)
    result = evaluate_model(classifier, tokenizer, rows, max_length=max_length or MAX_LENGTH, batch_size=batch_size, progress=True)
    data = result.to_dict()
    if mode == "encrypted":
        data |= _encrypted(directory, rows, backend, parameters)
    data["baselines"] = {}
    if baselines:
        try:
            data["baselines"] = score_baselines(load_dataset(task, "train", data_dir), rows)
        except HEError as error:
            typer.echo(f"no baselines: {error}", err=True)
    if json_output:
        print_json(data)
    else:
        _print(data)


def _evaluate_language(
    model: Path | None, split: str, mode: str, data_dir: Path | None, limit: int | None, max_length: int | None, batch_size: int, json_output: bool
) -> None:
    from hf_he.checkpoints import default_decoder
    from hf_he.scripts.display import console, print_json
    from hf_he.scripts.evaluate_language import BLOCK, evaluate_language

    data = evaluate_language(model or default_decoder(), split, mode, data_dir, limit, max_length or BLOCK, batch_size)
    if json_output:
        print_json(data)
        return
    console.print(f"lm {split}, {data['blocks']} blocks of {data['block']} tokens, {mode} mode", style="bold")
    console.print(f"perplexity {data['perplexity']:.3f} per token, {data['bits_per_byte']:.3f} bits per byte")
    _print_ranges(data)


def _evaluate_decoder(model: Path | None, split: str, data_dir: Path | None, limit: int, tokens: int, backend: str, parameters: str, json_output: bool) -> None:
    from rich.table import Table

    from hf_he.checkpoints import default_decoder
    from hf_he.decoder_evaluation import evaluate_encrypted
    from hf_he.scripts.display import console, count_progress, print_json, progress_bar
    from hf_he.scripts.evaluate_language import load_decoder, spread_blocks

    directory = model or default_decoder()
    decoder, tokenizer = load_decoder(directory, "polynomial")
    blocks = spread_blocks(tokenizer, split, data_dir, tokens, limit)
    with progress_bar("Running the decoder on ciphertexts") as progress:
        result = evaluate_encrypted(decoder, blocks, backend, parameters, count_progress(progress))
    if json_output:
        print_json({"task": "lm", "split": split, "mode": "encrypted", "kernel": decoder.config.attention_kernel, **result.to_dict()})
        return
    console.print(f"lm {split}, {result.prefixes} prefixes of {result.tokens} tokens, {decoder.config.attention_kernel}, {result.backend}", style="bold")
    console.print(
        f"logits: mean squared error {result.mse:.2e}, largest {result.max_logit_error:.2e}; same next token {result.same_next_token:.1%}, "
        f"at every position {result.same_tokens:.2%}; perplexity {result.perplexity:.3f}, polynomial mode {result.perplexity_polynomial:.3f}"
    )
    table = Table("part", "seconds", title=f"A batch of {result.batch}: {result.seconds:.2f} s, {result.refreshes:.0f} refreshes")
    for name, spent in (*result.seconds_by_part.items(), *((f"of which {n}", s) for n, s in result.seconds_by_primitive.items() if n in ("rotate", "encode"))):
        table.add_row(name.replace("_", " "), f"{spent:.3f}")
    console.print(table)


def _encrypted(directory: Path, rows, backend: str, parameters: str) -> dict[str, Any]:
    """Score of the decrypted logits; a refused sentence (a value would leave its range) counts as wrong."""
    import tempfile

    import numpy as np

    from hf_he.client import Client
    from hf_he.errors import DataError
    from hf_he.evaluation import predictions_from_logits, score
    from hf_he.keys import EVALUATION_FILE
    from hf_he.local_server import local_server
    from hf_he.scripts.display import count_progress, progress_bar, server_progress

    if rows.second is not None:
        raise DataError(f"the encrypted client takes single sentences, {rows.task} has pairs: use --mode polynomial, the same numbers in plaintext.")
    client = Client.from_pretrained(directory, backend=backend, parameters=parameters)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hf-he-evaluate-") as folder:
        with progress_bar("Generating keys") as progress:
            client.keygen(count_progress(progress)).save(folder)
        with local_server(directory, Path(folder) / EVALUATION_FILE) as server, progress_bar("Running the model on ciphertexts") as progress:
            result = client.infer(server, rows.first, None if rows.is_regression else rows.labels, server_progress(progress))
    refused = np.full(client.model.config.num_labels, np.nan)
    logits = np.asarray([refused if sentence.logits is None else sentence.logits for sentence in result.sentences])
    return {
        "mode": "encrypted",
        "score": score(rows.metric, np.asarray(rows.labels), predictions_from_logits(rows, logits)),
        "backend": client.backend.name,
        "security_bits": client.backend.parameters.security_bits,
        "agreement": result.agreement,
        "max_logit_error": result.max_logit_error,
        "refused": sum(sentence.refused is not None for sentence in result.sentences),
        "seconds": time.perf_counter() - started,
    }


def _print(data: dict[str, Any]) -> None:
    from rich.table import Table

    from hf_he.scripts.display import console

    console.print(f"{data['task']} {data['split']}, {data['rows']} rows, {data['mode']} mode", style="bold")
    scores = Table("", data["metric"])
    scores.add_row("this checkpoint", f"{data['score']:.4f}", style="bold")
    for name, value in data["baselines"].items():
        scores.add_row(name.replace("_", " "), f"{value:.4f}")
    console.print(scores)
    if "agreement" in data:
        console.print(f"agreement with polynomial mode {data['agreement']}, largest logit error {data['max_logit_error']}, {data['refused']} refused")
    _print_ranges(data)


def _print_ranges(data: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    from hf_he.scripts.display import console

    if not data["ranges"]:
        return
    console.print(f"{data['out_of_range']} values outside their fitted intervals", style="bold")
    ranges = Table(Column("layer", overflow="fold"), "quantity", "smallest", "largest", "interval", "outside", box=SIMPLE)
    for name, entry in data["ranges"].items():
        interval = "-" if entry["interval"] is None else "[{:g}, {:g}]".format(*entry["interval"])
        numbers = (f"{entry['minimum']:.4g}", f"{entry['maximum']:.4g}", interval, str(entry["out_of_range"]))
        ranges.add_row(name, entry["statistic"], *numbers, style="bold red" if entry["out_of_range"] else None)
    console.print(ranges)


if __name__ == "__main__":
    typer.run(evaluate)
