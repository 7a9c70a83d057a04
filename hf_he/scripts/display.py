"""How the commands show things: progress on stderr, tables and JSON on stdout, errors without tracebacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from hf_he.results import InferenceResult, Sentence

console = Console()
messages = Console(stderr=True)
disable_progress_bar()


def say(text: str | Text) -> None:
    """A line on stderr as it is, [brackets] included, broken only by the terminal itself."""
    messages.print(text, soft_wrap=True, highlight=False, markup=False)


def notice(text: str) -> None:
    """What the user should know but need not act on."""
    say(Text.assemble(("notice:", "yellow"), " ", text))


def data_size(size: float) -> str:
    """Bytes as people read them: 812 B, 3.1 kB, 252 MB, 2.87 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def print_json(data: Any) -> None:
    """JSON on stdout, unwrapped and uncoloured; null for numbers that are not finite, which JSON lacks."""
    print(json.dumps(json.loads(json.dumps(data), parse_constant=lambda _: None), indent=2, allow_nan=False))


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A transient progress display on stderr; where that is no terminal, only the description is printed."""
    if not messages.is_terminal:
        say(description)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        progress.add_task(description, total=None, note="")
        yield progress


def count_progress(progress: Progress) -> Callable[[int, int], None]:
    """A (done, total) callback for the bar's task."""

    def update(done: int, total: int) -> None:
        progress.update(progress.task_ids[0], completed=done, total=total, note=f"{done}/{total}")

    return update


def server_progress(progress: Progress) -> Callable[[dict[str, Any]], None]:
    """A callback for the progress events of a server."""
    per_batch = 0

    def update(event: dict[str, Any]) -> None:
        nonlocal per_batch
        if event.get("state") == "sending":
            note = f"sending {data_size(event['bytes'])} of {data_size(event['of_bytes'])}"
            progress.update(progress.task_ids[0], completed=event["bytes"], total=event["of_bytes"], note=note)
            return
        if event.get("state") != "running":
            progress.update(progress.task_ids[0], note=event.get("state", ""))
            return
        batch, batches, done = event["batch"], event["batches"], event["operations"]
        if batch == 1:
            per_batch = max(per_batch, done)
        within = min(done / per_batch, 1.0) if batch > 1 and per_batch else 0.0
        note = f"batch {batch}/{batches}, {event['operation']}, {done} operations"
        progress.update(progress.task_ids[0], completed=batch - 1 + within, total=batches, note=note)

    return update


def print_notices(sentences: list[Sentence] | tuple[Sentence, ...], limit: int) -> None:
    """Say which sentences were cut and which were refused."""
    cut = sum(sentence.truncated for sentence in sentences)
    if cut:
        notice(f"{cut} of {len(sentences)} sentences are longer than {limit} tokens and were cut there")
    for sentence in sentences:
        if sentence.refused is not None:
            say(Text.assemble(("refused: ", "red"), f"{sentence.text[:60]!r}: {sentence.refused}"))


def print_sentences(result: InferenceResult) -> None:
    headers = ("sentence", "true", "plaintext", "encrypted", "logit error")
    rows = []
    for sentence in result.sentences:
        names = [result.label_name(index) or "-" for index in (sentence.label, sentence.plaintext_prediction, sentence.prediction)]
        if sentence.refused is not None:
            names[1:] = ["refused", "refused"]
        rows.append([sentence.text, *names, "-" if sentence.max_logit_error is None else f"{sentence.max_logit_error:.1e}"])
    taken = sum(max(len(row[column]) for row in [headers, *rows]) + 3 for column in range(1, len(headers)))
    table = Table(*headers, title="Predictions")
    for sentence, row in zip(result.sentences, rows, strict=True):
        text = Text(row[0])
        text.truncate(max(console.width - taken - 4, 10), overflow="ellipsis")
        table.add_row(text, *row[1:], style=None if sentence.prediction == sentence.plaintext_prediction else "bold red")
    console.print(table)


def print_measurements(data: dict[str, Any]) -> None:
    """Latency by op and by primitive, sizes, memory and security of the JSON contract."""
    seconds, operations = data["seconds"], data["operations"]
    total = seconds["server"] or 1.0
    by_op = Table(title="Server time by operation")
    for name in ("operation", "seconds", "share"):
        by_op.add_column(name, justify="left" if name == "operation" else "right")
    for name, value in sorted(seconds["by_op"].items(), key=lambda item: -item[1]):
        by_op.add_row(name, f"{value:.2f}", f"{value / total:.0%}")
    by_primitive = Table(title="Server time by primitive")
    for name in ("primitive", "count", "seconds", "ms each"):
        by_primitive.add_column(name, justify="left" if name == "primitive" else "right")
    for name, value in sorted(seconds["by_primitive"].items(), key=lambda item: -item[1]):
        count = operations.get(name, 0)
        by_primitive.add_row(name, f"{count:,}", f"{value:.2f}", f"{1000 * value / count:.2f}" if count else "-")
    console.print(by_op)
    console.print(by_primitive)
    facts = Table(show_header=False, title="Run")
    facts.add_column()
    facts.add_column()
    for name in ("compile", "keygen", "encrypt", "server_start", "server", "decrypt", "total"):
        if seconds.get(name):
            facts.add_row(f"{name.replace('_', ' ')} time", f"{seconds[name]:.2f} s")
    for name, size in data["bytes"].items():
        if size is not None:
            facts.add_row(name.replace("_", " "), data_size(size))
    facts.add_row("refreshes", f"{data['refreshes']}")
    memory = data["peak_memory_gb_by_process"]
    facts.add_row("peak memory", f"{data['peak_memory_gb']:.2f} GB (client {memory['client']:.2f}, server {memory['server']:.2f})")
    facts.add_row("backend", data["backend"])
    simulated = ", were this not the simulator, which protects nothing" if data["backend"] == "simulator" else ""
    facts.add_row("security", f"{data['security_bits']} bits{simulated}")
    console.print(facts)


def print_summary(data: dict[str, Any]) -> None:
    answered = len(data["sentences"]) - data["refused"]
    parts = [f"{answered} sentences"]
    if data["refused"]:
        parts.append(f"{data['refused']} refused")
    if data["agreement"] is not None:
        parts.append(f"agreement with plaintext {data['agreement']:.1%}")
    if data["max_logit_error"] is not None:
        parts.append(f"max logit error {data['max_logit_error']:.1e}")
    if data["accuracy"] is not None:
        parts.append(f"accuracy {data['accuracy']:.1%}")
    console.print(", ".join(parts), style="bold")
