"""Perplexity of every kernel relative to softmax, seed by seed: the numbers of one or more finished runs as results.json, and as a figure.

python recipes/lm/figure.py out/lm/published/report.json out/lm4/published/report.json     # report.json files that `hf-he train` wrote
python recipes/lm/figure.py                                                                # the figure again, from results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

BAR = 1.03
HERE = Path(__file__).parent
LABELS = {
    "softmax": "softmax",
    "power_softmax": "power softmax, p = 4",
    "power_softmax_6": "power softmax, p = 6",
    "normalized_gaussian_kernel": "normalized Gaussian kernel",
    "gaussian_kernel": "Gaussian kernel, un-normalised",
}


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """Shape, summary, and per seed the perplexities, values outside and tokens of a report, without the ranges of every layer."""
    kept = ("dev", "test", "out_of_range", "tokens")
    runs = {run: {seed: {key: scores.get(key) for key in kept} for seed, scores in seeds.items()} for run, seeds in report["runs"].items()}
    return {"architecture": report["recipe"]["architecture"], "summary": report["summary"], "runs": runs}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A dot per seed, a bar at their mean; one panel per shape. Converted models, which saw more tokens, are left out."""
    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results) + 2, 3.4), sharex=True, sharey=True, layout="constrained", squeeze=False)
    names = [name for name in LABELS if any(name in result["summary"] for result in results)]
    for axis, result in zip(axes[0], results, strict=True):
        for row, name in enumerate(names):
            if (entry := result["summary"].get(name)) is None:
                continue
            axis.plot(entry["ratios"], [row] * len(entry["ratios"]), "o", color=f"C{row}", alpha=0.7)
            axis.plot([entry["ratio_to_softmax"]] * 2, [row - 0.3, row + 0.3], color=f"C{row}")
        shape = result["architecture"]
        axis.axvline(BAR, color="black", linestyle=":", label=f"bar, {BAR}")
        axis.set(title=f"{shape['num_layers']} x {shape['hidden_size']}", xlabel="test perplexity, polynomial mode / softmax of the same seed")
        axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="*", type=Path, help="report.json of finished runs, one per shape.")
    store = HERE / "results.json"
    if reports := parser.parse_args().reports:
        store.write_text(json.dumps([numbers(json.loads(path.read_text(encoding="utf-8"))) for path in reports], indent=1) + "\n", encoding="utf-8")
    draw(json.loads(store.read_text(encoding="utf-8")), HERE / "perplexity.png")


if __name__ == "__main__":
    main()
