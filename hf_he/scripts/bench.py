"""`hf-he bench`: the native engine beside its peers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = "Measure the native engine and the peers whose environments exist (recipes/benchmarks/setup_peers.sh makes them)."

app = typer.Typer(help=HELP, no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of tables.")]
Quick = Annotated[bool, typer.Option("--quick", help="The smallest set and few runs: whether everything works, in about a minute.")]
Peers = Annotated[Path, typer.Option(help="Folder with one environment per peer.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of every library that has them.")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that every library gets.")]
Only = Annotated[str | None, typer.Option(help="Libraries to measure, separated by commas; default: all.")]

DEFAULT_PEERS = Path(".bench")


@app.command()
def primitives(
    json_output: Json = False, quick: Quick = False, peers: Peers = DEFAULT_PEERS, threads: Threads = 2, rounds: Rounds = 7, only: Only = None
) -> None:
    """Rotation, hoisted rotations, multiplication, transform and, where supported, bootstrapping."""
    _show(_run(("primitives",), quick, peers, threads, rounds, only), json_output)


@app.command()
def linear(json_output: Json = False, quick: Quick = False, peers: Peers = DEFAULT_PEERS, threads: Threads = 2, rounds: Rounds = 5, only: Only = None) -> None:
    """Linear layers: one modular matrix product, and products weight by weight."""
    _show(_run(("linear",), quick, peers, threads, rounds, only), json_output)


@app.command()
def attention(
    json_output: Json = False,
    quick: Quick = False,
    tokens: Annotated[str, typer.Option(help="Lengths to run natively, separated by commas.")] = "32,128",
    priced: Annotated[str, typer.Option(help="Lengths to price with bootstraps, without running them.")] = "32,128,1024",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every operator gets.")] = 3,
) -> None:
    """Power softmax and Gaussian kernel beside a softmax, the attention operator alone."""
    from hf_he.bench.attention import measure, paper_ratios
    from hf_he.bench.attention import priced as price_all
    from hf_he.scripts.display import progress_bar
    from hf_he.scripts.study import whole_numbers

    run, counted = ([8], [32]) if quick else (whole_numbers(tokens, "--tokens"), whole_numbers(priced, "--priced"))
    with progress_bar("Measuring (the first run also compiles kernels)") as progress:

        def announce(text: str) -> None:
            progress.update(progress.task_ids[0], note=text)

        data = {
            "measured": [row for length in run for row in measure(length, rounds, announce=announce)],
            "priced": [row for length in counted for row in price_all(length, announce)],
            "paper": paper_ratios(counted),
        }
    _show_attention(data, json_output)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder for results.json, primitives.png and, if it has the markers, README.md.")] = Path("recipes/benchmarks"),
    quick: Quick = False,
    peers: Peers = DEFAULT_PEERS,
    threads: Threads = 2,
    rounds: Rounds = 7,
    only: Only = None,
) -> None:
    """Measure everything and write the report."""
    from hf_he.bench.report import BEGIN, insert, markdown, plot

    out.mkdir(parents=True, exist_ok=True)
    data = _run(("primitives", "linear"), quick, peers, threads, rounds, only)
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    plot(data, out / "primitives.png")
    document = out / "README.md"
    if document.is_file() and BEGIN in (text := document.read_text(encoding="utf-8")):
        document.write_text(insert(text, markdown(data)), encoding="utf-8")
    _show(data, False)


@app.command()
def finetune(
    json_output: Json = False,
    quick: Quick = False,
    shape: Annotated[str, typer.Option(help="paper, shipped or all; the paper's needs 8 GB, mostly for bootstrapping keys.")] = "all",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each primitive at each level; the median counts.")] = 3,
) -> None:
    """LoRA with the Gaussian kernel against full fine-tuning with softmax: operations priced with this machine's primitives, in CPU seconds."""
    from hf_he.bench import finetune as ratios
    from hf_he.errors import DataError
    from hf_he.scripts.display import console, print_json, progress_bar, say

    known = {"shipped": (ratios.SHIPPED_SHAPE,), "paper": (ratios.PAPER_SHAPE,), "all": (ratios.SHIPPED_SHAPE, ratios.PAPER_SHAPE)}
    if shape not in known:
        raise DataError(f"--shape does not know {shape}: choose from {', '.join(known)}")
    with progress_bar("Counting and measuring") as progress:

        def announce(text: str) -> None:
            progress.update(progress.task_ids[0], note=text)

        rows = ratios.measure(known["shipped" if quick else shape], 1 if quick else runs, announce)
    if json_output:
        print_json(rows)
        return
    from rich.table import Table

    for row in rows:
        header, lines = ratios.table(row)
        found = Table(title=f"{row['shape']}, {row['parameters']}, CPU seconds of a packed batch of {row['packing']['sequences']}")
        for index, name in enumerate(header):
            found.add_column(name, justify="left" if index < 2 else "right")
        for line in lines:
            found.add_row(*line)
        console.print(found)
    for entry in rows[0]["measured_layer"]:
        say(f"{entry['what']}: {entry['measured']:.2f} s measured, {entry['priced']:.2f} s priced ({100 * (entry['ratio'] - 1):+.0f} %)")


@app.command()
def model(
    backend: Annotated[str, typer.Option(help="native, simulator, fhelium or desilo.")] = "native",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N, where the backend runs on it.")] = "cpu",
    shape: Annotated[str, typer.Option(help="shipped: the model that ships; paper: 2 x 768, 12 heads, 128 tokens, random weights.")] = "shipped",
    batch: Annotated[int | None, typer.Option(min=1, help="Sentences; default: as many as one packed batch holds.")] = None,
    features: Annotated[int | None, typer.Option(min=1, help="Features per ciphertext; 1 is for batches of hundreds.")] = None,
    parameters: Annotated[str | None, typer.Option(help="Parameter set; default: that of the shape, or the backend's.")] = None,
    priced: Annotated[bool | None, typer.Option("--priced/--run", help="Project from operation counts; default: the native engine's paper shape only.")] = None,
    project: Annotated[Path | None, typer.Option(help="Price counted operations with the published times of a GPU in this file instead.")] = None,
    json_output: Json = False,
) -> None:
    """One encrypted inference on a backend and a device: seconds, memory, and the paper's figures beside them.

    With --project recipes/benchmarks/gpu_primitives.json nothing runs: an inference and a training step are counted and priced, and say so.
    """
    from hf_he.bench import model as whole
    from hf_he.errors import DataError
    from hf_he.scripts.display import console, print_json, progress_bar

    if project is not None:
        _project(project, shape, features, json_output)
        return
    if priced and backend != "native":
        raise DataError("--priced projects the times of the native engine: leave --backend out, or measure with --run")
    priced = (backend, shape) == ("native", "paper") if priced is None else priced
    with progress_bar("Preparing") as progress:

        def announce(text: str) -> None:
            progress.update(progress.task_ids[0], note=text)

        work = whole.workload(shape, batch, features, parameters, backend)
        row = whole.priced(work) if priced else whole.measure(work, backend, device, announce)
    if json_output:
        print_json(row)
        return
    from rich.table import Table

    found = Table(show_header=False, title="One encrypted inference")
    for name, value in whole.table(row):
        found.add_row(name, value)
    console.print(found)


def _project(file: Path, shape: str, features: int | None, json_output: bool) -> None:
    from rich.table import Table

    from hf_he.bench import projection
    from hf_he.bench.model import SHAPES
    from hf_he.errors import DataError
    from hf_he.scripts.display import console, print_json, progress_bar

    if shape not in SHAPES:
        raise DataError(f"--shape does not know {shape}: choose from {', '.join(SHAPES)}")
    published = projection.Published.load(file)
    with progress_bar("Counting operations"):
        rows = [projection.project(SHAPES[shape], width, published) for width in ([None, 1] if features is None else [features])]
    if json_output:
        print_json(rows)
        return
    header, lines = projection.table(rows)
    found = Table(title=f"A projection, not a measurement: {published.name}, {published.source}")
    for index, name in enumerate(header):
        found.add_column(name, justify="left" if index in (0, 3) else "right")
    for line in lines:
        found.add_row(*line)
    console.print(found)


def _run(parts: tuple[str, ...], quick: bool, peers: Path, threads: int, rounds: int, only: str | None) -> dict[str, Any]:
    from hf_he.bench import machine
    from hf_he.bench.runner import NATIVE, PEERS, Measurements, Turns, find_libraries
    from hf_he.errors import DataError
    from hf_he.scripts.display import progress_bar

    libraries = find_libraries(peers)
    if only is not None:
        wanted = set(re.split(r"[,\s]+", only.strip()))
        if unknown := wanted - {NATIVE, *PEERS}:
            raise DataError(f"--only does not know {', '.join(sorted(unknown))}: choose from {', '.join((NATIVE, *PEERS))}")
        libraries = [library for library in libraries if library.name in wanted]
    turns = Turns(rounds=1, runs=2, seconds=0.5, threads=threads) if quick else Turns(rounds=rounds, threads=threads)
    found, began, description = Measurements(), machine.load_average(), machine.describe()
    with progress_bar("Measuring (the first run also compiles kernels)") as progress:

        def announce(text: str) -> None:
            progress.update(progress.task_ids[0], note=text)

        for part in parts:
            _PARTS[part](libraries, quick, turns, found, announce)
    return {"machine": description, "threads": threads, "load": [began, machine.load_average()], "rows": found.rows, "absent": found.absent}


def _primitives(libraries: list, quick: bool, turns: Any, found: Any, announce: Callable[[str], None]) -> None:
    """Bootstrapping is measured one library after another, of sparse slots the engine's alone: the keys of two would not fit into memory."""
    from hf_he.bench.operations import BOOTSTRAP, BOOTSTRAP_SET, BOOTSTRAP_SLOTS, PARAMETER_SETS, PRIMITIVES
    from hf_he.bench.runner import NATIVE, Turns, measure

    for instance in PARAMETER_SETS[:1] if quick else PARAMETER_SETS:
        measure(libraries, instance, PRIMITIVES, turns, found, announce)
    if quick:
        return
    for name in BOOTSTRAP_SLOTS:
        for library in libraries if name == BOOTSTRAP else [library for library in libraries if library.name == NATIVE]:
            measure([library], BOOTSTRAP_SET, (name,), Turns(rounds=1, runs=2, threads=turns.threads), found, announce)


def _linear(libraries: list, quick: bool, turns: Any, found: Any, announce: Callable[[str], None]) -> None:
    from hf_he.bench.operations import COMBINATION, LINEAR, LINEAR_SET, LINEAR_SQUARE, QUICK_LINEAR, QUICK_SQUARE
    from hf_he.bench.runner import NATIVE, measure

    measure(libraries, QUICK_LINEAR if quick else LINEAR_SET, LINEAR, turns, found, announce)
    engine = [library for library in libraries if library.name == NATIVE]
    measure(engine, QUICK_SQUARE if quick else LINEAR_SQUARE, (COMBINATION,), turns, found, announce)


_PARTS = {"primitives": _primitives, "linear": _linear}


def _show(data: dict[str, Any], json_output: bool) -> None:
    from rich.table import Table

    from hf_he.bench.report import NAMES, long_table
    from hf_he.scripts.display import console, print_json, say

    if json_output:
        print_json(data["rows"])
    else:
        header, lines = long_table(data["rows"])
        load = f"load average {data['load'][0]} before, {data['load'][1]} after"
        table = Table(title=f"Medians, {data['threads']} threads, {data['machine']['cpu']}, {load}")
        for name in header:
            table.add_column(name, justify="left" if name in header[:3] else "right")
        for line in lines:
            if line[0] and table.row_count:
                table.add_section()
            table.add_row(*line)
        console.print(table)
    for entry in data["absent"]:
        say(f"not measured: {NAMES[entry['library']]}, {entry['what']}: {entry['reason']}")


def _show_attention(data: dict[str, Any], json_output: bool) -> None:
    from rich.table import Table

    from hf_he.scripts.display import console, print_json

    if json_output:
        print_json(data)
        return
    titles = {
        "measured": "Measured natively; refreshes are counted, not timed",
        "priced": "Priced for one core, bootstraps included",
        "paper": "Zimerman et al. (arXiv 2410.09457, v2), one A100",
    }
    columns = ["operator", "tokens", "sequences", "head_dim", "parameters", "seconds", "cpu_seconds", "refreshed", "max_error", "ratio"]
    columns += ["function_seconds", "function_refreshed", "function_ratio"]
    for part, title in titles.items():
        present = [name for name in columns if data[part] and name in data[part][0]]
        table = Table(title=title)
        for name in present:
            table.add_column(name.replace("_", " "), justify="left" if name == "operator" else "right")
        for row in data[part]:
            table.add_row(*(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in present))
        console.print(table)
