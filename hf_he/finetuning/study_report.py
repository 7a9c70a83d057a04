"""Rows, Pareto fronts and plot of a trade-off study's results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_he.finetuning.study import Measured, Point

KNOBS = {"rank": "LoRA rank", "squarings": "kernel squarings k", "norm_degree": "LayerNorm degree", "activation_degree": "activation degree"}
STYLES = {
    kind: (marker, f"C{number}")
    for number, (kind, marker) in enumerate(zip(("recipe", *KNOBS.values(), "several"), ("*", "o", "s", "^", "D", "X"), strict=True))
}


def summarise(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One entry per point, the centre first.

    `score`, `dev_loss` and `loss` (of the last training steps) are means over the seeds, None when one failed, and `*_spread` their sample standard
    deviations, 0 of one seed. `score_change` and `dev_loss_change` are mean differences to the centre, seed by seed (a seed gives every point the same
    examples in the same order), `*_change_error` their standard errors, 0 of one seed. `runs` holds what each seed found. `pareto` and `pareto_loss`: no point
    has a better score, or a lower dev loss, at no more seconds a step.
    """
    points = {point: [entry for entry in measured if entry.point == point] for point in dict.fromkeys(entry.point for entry in measured)}
    centre = {entry.seed: entry for entry in next(iter(points.values()), [])}
    rows = [_row(point, runs, centre) for point, runs in points.items()]
    for row in rows:
        row["pareto"] = _on_front(row, rows, "score", 1)
        row["pareto_loss"] = _on_front(row, rows, "dev_loss", -1)
    return rows


def _row(point: Point, runs: Sequence[Measured], centre: Mapping[int, Measured]) -> dict[str, Any]:
    train = next((run.train for run in runs if run.train), {})
    infer = next((run.infer for run in runs if run.infer), {})
    failed = [run.error for run in runs if run.error]
    means: dict[str, Any] = {}
    for name, source in (("score", "score"), ("dev_loss", "dev_loss"), ("loss", "last_loss")):
        values = [getattr(run, source) for run in runs]
        means[name] = None if failed else statistics.mean(values)
        means[f"{name}_spread"] = None if failed else statistics.stdev(values) if len(values) > 1 else 0.0
    for name in ("score", "dev_loss"):
        pairs = [] if failed else [(getattr(run, name), getattr(centre.get(run.seed), name, None)) for run in runs]
        changes = [ours - first for ours, first in pairs if first is not None]
        means[f"{name}_change"] = statistics.mean(changes) if changes else None
        means[f"{name}_change_error"] = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    return {
        **asdict(point),
        "before": runs[0].before,
        **means,
        "runs": [{name: getattr(run, name) for name in ("seed", "score", "dev_loss", "last_loss", "error")} for run in runs],
        "step_seconds": train.get("seconds"),
        "step_refreshes": train.get("refreshes"),
        "step_operations": dict(train.get("operations", {})),
        "inference_seconds": infer.get("seconds"),
        "inference_refreshes": infer.get("refreshes"),
        "levels": infer.get("levels"),
        "error": next(iter(failed), ""),
    }


def _on_front(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], quality: str, sign: int) -> bool:
    """Whether no other row is as good at less cost, or better at no more; `sign` is -1 where less is better."""
    if row[quality] is None:
        return False

    def beats(other: Mapping[str, Any]) -> bool:
        gain, saved = round(sign * (other[quality] - row[quality]), 9), row["step_seconds"] - other["step_seconds"]
        return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)

    return not any(beats(other) for other in rows if other[quality] is not None)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str, metric: str = "score") -> None:
    """Dev loss and score, as differences to the centre's, against the estimated time of a training step, a colour and marker per knob, Pareto fronts as
    lines; a PNG. Bars are one standard error of the mean difference over the seeds. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), constrained_layout=True)
    shown, centre = [row for row in rows if row["score_change"] is not None], rows[0]
    kinds = (("dev_loss", "pareto_loss", "dev loss", "lower"), ("score", "pareto", f"dev {metric}", "higher"))
    for axis, (quality, front, name, better) in zip(panels, kinds, strict=True):
        _panel(axis, shown, centre, quality, front)
        axis.set(xlabel="planned seconds of one core for a training step")
        axis.set(ylabel=f"{name}, difference to {centre[quality]:.4f} ({better} is better)")
        axis.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.canvas.draw()
    for axis, (quality, *_) in zip(panels, kinds, strict=True):
        labels = [(row["step_seconds"], row[f"{quality}_change"], _label(row, centre)) for row in shown]
        place_labels(axis, labels, [row[f"{quality}_change_error"] for row in shown], [STYLES[_kind(row, centre)][1] for row in shown])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, rows: Sequence[Mapping[str, Any]], centre: Mapping[str, Any], quality: str, front: str) -> None:
    line = sorted((row["step_seconds"], row[f"{quality}_change"]) for row in rows if row[front])
    axis.plot(*zip(*line, strict=True), "k--", linewidth=1, alpha=0.6, label="Pareto front", zorder=1)
    for kind, (marker, color) in STYLES.items():
        chosen = [row for row in rows if _kind(row, centre) == kind]
        if chosen:
            at, differences, bars = ([row[name] for row in chosen] for name in ("step_seconds", f"{quality}_change", f"{quality}_change_error"))
            style = {"fmt": marker, "color": color, "ecolor": (color, 0.35), "markersize": 12 if kind == "recipe" else 7, "elinewidth": 1.2}
            axis.errorbar(at, differences, yerr=bars, label=kind, **style)


def _changed(row: Mapping[str, Any], centre: Mapping[str, Any]) -> list[str]:
    return [name for name in KNOBS if row[name] != centre[name]]


def _kind(row: Mapping[str, Any], centre: Mapping[str, Any]) -> str:
    changed = _changed(row, centre)
    return KNOBS[changed[0]] if len(changed) == 1 else "several" if changed else "recipe"


def _label(row: Mapping[str, Any], centre: Mapping[str, Any]) -> str:
    short = {"rank": "r", "squarings": "k", "norm_degree": "LN", "activation_degree": "act"}
    return ", ".join(f"{short[name]} {row[name] or 'own'}" for name in _changed(row, centre)) or "recipe"


OFFSETS = [
    (sign * x, y) for x, y in ((8, 0), (8, 7), (8, -7), (0, 8), (0, -8), (8, 14), (8, -14), (0, 20), (0, -20), (24, 0), (24, 12), (24, -12)) for sign in (1, -1)
]
"""Of a label from its point, in points (1 / 72 inch)."""


def place_labels(axis: Any, entries: Sequence[tuple[float, float, str]], errors: Sequence[float], colors: Sequence[str]) -> None:
    """Each label (x, y, text) beside its point, where it covers least of the points, their error bars and the labels already there."""
    renderer, frame, to_pixels = axis.figure.canvas.get_renderer(), axis.get_window_extent().extents, axis.transData.transform
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in (to_pixels(entry[:2]) for entry in entries)]
    taken += [(*to_pixels((x, y - error)) - 1, *to_pixels((x, y + error)) + 1) for (x, y, _), error in zip(entries, errors, strict=True)]
    for (x, y, text), color in zip(entries, colors, strict=True):
        tried = []
        for dx, dy in OFFSETS:
            sides = {"ha": "left" if dx > 0 else "right" if dx < 0 else "center", "va": "center" if dx and abs(dy) < 6 else "bottom" if dy > 0 else "top"}
            label = axis.annotate(text, (x, y), textcoords="offset points", xytext=(dx, dy), fontsize=9, color=color, zorder=5, **sides)
            box = label.get_window_extent(renderer).extents
            covered = sum(_overlap(box, other) for other in taken) + _area(box) - _overlap(box, frame)
            tried.append((covered + 2.0 * (abs(dx) + abs(dy)), label, tuple(box)))
        tried.sort(key=lambda candidate: candidate[0])
        taken.append(tried[0][2])
        for _, label, _ in tried[1:]:
            label.remove()


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
