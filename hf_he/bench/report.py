"""Measurements as a terminal table, Markdown and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_he.bench.operations import BOOTSTRAP, COMBINATION, PER_WEIGHT, TITLES, WEIGHTED_SUM
from hf_he.bench.runner import NATIVE, PEERS

NAMES = {NATIVE: "hf_he", **PEERS}
BEGIN, END = "<!-- measurements: written by `hf-he bench report` -->", "<!-- end of measurements -->"

Row = dict[str, Any]


def title(row: Row) -> str:
    """An operation in words."""
    text = TITLES.get(row["op"].rpartition("_")[0] if "inputs" in row else row["op"], row["op"])
    return f"{text}, {row['inputs']} -> {row['outputs']}" if "inputs" in row else text


def group(rows: Iterable[Row]) -> list[tuple[str, str, dict[str, Row]]]:
    """(operation, set, {library: row}) in order of appearance; a peer with a few more limbs than asked for stands beside the others."""
    found: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        same = (key for key in found if key[:2] == (row["op"], row["ring_dimension"]) and row["library"] not in found[key])
        near = (key for key in same if key[2] <= row["limbs"] or row["op"] == BOOTSTRAP)
        key = max(near, default=(row["op"], row["ring_dimension"], row["limbs"]))
        found.setdefault(key, {})[row["library"]] = row
    return [(title(next(iter(libraries.values()))), instance(degree, limbs), libraries) for (_, degree, limbs), libraries in found.items()]


def instance(degree: int, limbs: int) -> str:
    """N x limbs."""
    return f"2^{degree.bit_length() - 1} x {limbs}"


def factor(row: Row, native: Row) -> str:
    """How many times longer than the native engine, two digits below 1."""
    value = row["median_ms"] / native["median_ms"]
    return f"{value:.1f}" if round(value, 2) >= 1 else f"{value:.2f}"


def comparison(libraries: dict[str, Row], rows: Iterable[Row]) -> str:
    """The fastest peer's time to the native engine's in one group. No peer computes a layer in one call: that of the engine is compared with the fastest
    peer's products weight by weight, or weighted sums, and says with which."""
    native = libraries.get(NATIVE)
    peers, where = [row for library, row in libraries.items() if library != NATIVE], ""
    if native is not None and not peers and native["op"].startswith(COMBINATION):
        peers = [row for row in rows if row["library"] != NATIVE and _same_layer(row, native)]
    if native is None or not peers:
        return "-"
    fastest = min(peers, key=lambda row: row["median_ms"])
    if fastest["op"] != native["op"]:
        where = f" ({NAMES[fastest['library']]}, {TITLES[fastest['op'].rpartition('_')[0]].removeprefix('linear, ')})"
    return f"{factor(fastest, native)}x{where}"


def _same_layer(row: Row, native: Row) -> bool:
    ways = {native["op"].replace(COMBINATION, way) for way in (PER_WEIGHT, WEIGHTED_SUM)}
    return row["op"] in ways and row["ring_dimension"] == native["ring_dimension"]


def libraries_of(rows: Iterable[Row]) -> dict[str, str]:
    """The measured libraries, the native engine first, and what to call them: one that works on one thread where others have more says so."""
    threads: dict[str, int] = {}
    for row in rows:
        threads[row["library"]] = max(row["threads"], threads.get(row["library"], 1))
    alone = " (1 thread)" if max(threads.values(), default=1) > 1 else ""
    return {library: name + (alone if threads[library] == 1 else "") for library, name in NAMES.items() if library in threads}


def milliseconds(value: float) -> str:
    """Three significant digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def long_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, one line per measurement; the lines of one operation follow each other."""
    header = ["operation", "N x limbs", "library", "threads", "ms", "runs", "/ hf_he"]
    lines = []
    for name, measured, libraries in group(rows):
        for library in sorted(libraries, key=list(NAMES).index):
            row = libraries[library]
            ratio = factor(row, libraries[NATIVE]) if NATIVE in libraries else "-"
            lines.append([name, measured, NAMES[library], str(row["threads"]), cell(row), str(row["runs"]), ratio])
            name = measured = ""
    return header, lines


def wide_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one line per operation and set, one column per library, the ratio to the fastest peer last."""
    columns = libraries_of(rows)
    header = ["operation", "N x limbs", *columns.values(), "fastest peer / hf_he"]
    lines = []
    for name, measured, libraries in group(rows):
        cells = [cell(libraries[column]) if column in libraries else "-" for column in columns]
        lines.append([name, measured, *cells, comparison(libraries, rows)])
    return header, lines


def cell(row: Row) -> str:
    """Median milliseconds, with what differs from the others."""
    text = milliseconds(row["median_ms"])
    notes = []
    if row.get("gmac_per_s") is not None:
        notes.append(f"{row['gmac_per_s']:.1f} GMAC/s")
    if row.get("note", "").startswith(("SEAL", "the wheel")):
        notes.append("not hoisted")
    if "levels_left" in row:
        notes.append(f"{row['levels_left']} levels left, error {row['max_error']:.1e}")
    return f"{text} ({', '.join(notes)})" if notes else text


def markdown(data: dict[str, Any]) -> str:
    """The table, the parameters of every library and the reasons of what is missing."""
    header, lines = wide_table(data["rows"])
    machine = data["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    parts = [
        f"Medians in milliseconds, {data['threads']} threads (1 for the NTT and for libraries marked so). "
        f"{machine['date']}, {machine['cpu']} ({', '.join(machine['flags'])}; {caches}), "
        f"{machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, Python {machine['python']}, "
        + ", ".join(f"{name} {found}" for name, found in machine["packages"].items())
        + f". Load average when it started: {data['load'][0]}, when it ended: {data['load'][1]} (the measured process alone makes it "
        f"{data['threads']} at most).",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        "| library | version | N x limbs | log2 QP | key switching |",
        "|---|---|---|---|---|",
    ]
    seen = set()
    for row in data["rows"]:
        parameters = row["parameters"]
        key = NAMES[row["library"]], row["version"], instance(row["ring_dimension"], row["limbs"])
        if key in seen or "inputs" in row:
            continue
        seen.add(key)
        parts.append(f"| {' | '.join(key)} | {parameters.get('log2_qp', '-')} | {parameters['key_switching']} |")
    parts += ["", "Not measured:", ""]
    for library, name in NAMES.items():
        if reasons := [f"{entry['what']}: {entry['reason']}" for entry in data["absent"] if entry["library"] == library]:
            parts.append(f"- {name}. {'; '.join(reasons)}")
    return "\n".join(parts) + "\n"


def insert(document: str, text: str) -> str:
    """`document` with what stands between its markers replaced by `text`."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}{END}{after}"


def plot(data: dict[str, Any], path: Path) -> None:
    """Bars of every operation and set on a logarithmic axis, one colour per library."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [entry for entry in group(data["rows"]) if len(entry[2]) > 1 or comparison(entry[2], data["rows"]) != "-"]
    columns = libraries_of(data["rows"])
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.62 * len(groups)), layout="constrained")
    height = 0.84 / len(columns)
    for index, (name, label) in enumerate(columns.items()):
        at = [(line + height * index, libraries[name]["median_ms"]) for line, (_, _, libraries) in enumerate(groups) if name in libraries]
        axes.barh([y for y, _ in at], [x for _, x in at], height, label=label, color=f"C{index}")
        for y, x in at:
            axes.annotate(milliseconds(x), (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6)
    axes.set_yticks([line + 0.42 - height / 2 for line in range(len(groups))], [f"{name}\n{instance}" for name, instance, _ in groups], fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(f"median milliseconds, {data['threads']} threads, {data['machine']['cpu']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
