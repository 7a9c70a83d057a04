"""Inference and a training step priced with primitive times that somebody else published for a GPU: projections, nothing that was measured here.

Operations are counted by primitive on a backend that only counts (hf_he.bench.pricing), running the code that runs under encryption, with as many
levels between bootstraps as the published bootstrap leaves. Publications give few primitives, at one level, so each of ours is priced as one of
those, never cheaper: see `PRICES`. What a GPU gains by hoisting rotations, by batching ciphertexts, by a second real vector in a bootstrap and by
lower levels is not counted on; neither is what it loses to memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_he import __version__
from hf_he.bench.finetune import SHIPPED_SHAPE, Shape, count_inference, count_lora
from hf_he.bench.model import PAPER
from hf_he.bench.pricing import Units
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import DataError
from hf_he.packing import Packing

PRIMITIVES = ("add", "rotate", "multiply_plain", "multiply", "bootstrap")

PRICES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "decompose": lambda ms: 0.0,
    "hoisted rotation": lambda ms: ms["rotate"],
    "summed rotation": lambda ms: ms["rotate"],
    "sum of rotations": lambda ms: 0.0,
    "relinearize": lambda ms: ms["rotate"],
    "multiply": lambda ms: ms["multiply"] - ms["rotate"],
    "multiply_plain": lambda ms: ms["multiply_plain"],
    "multiply_plain_sum": lambda ms: ms["multiply_plain"] + ms["add"],
    "full-slot multiply_plain": lambda ms: ms["multiply_plain"],
    "full-slot product": lambda ms: ms["multiply_plain"] + ms["add"],
    "sum of full-slot products": lambda ms: 0.0,
    "multiply_scalar": lambda ms: ms["multiply_plain"],
    "rescale component": lambda ms: ms["multiply_plain"] / 2,
    "add component": lambda ms: ms["add"] / 2,
    "sum component": lambda ms: ms["add"] / 2,
    "sum of components": lambda ms: 0.0,
    "copy component": lambda ms: ms["add"] / 2,
    "weight": lambda ms: ms["add"],
    "encode": lambda ms: ms["multiply_plain"],
    "refresh": lambda ms: ms["bootstrap"],
}
"""Milliseconds of each counted unit. A rotation is a whole one, hoisted or not; relinearising switches a key, as a rotation does, and a product is
the rest of a published one; a rescale, which publications count as part of products, is priced beside them; an integer weight of a matrix product
over ciphertexts is one addition of a ciphertext, as if there were no matrix product."""


@dataclass(frozen=True)
class Published:
    """Milliseconds of PRIMITIVES on a card, whose they are, and the parameters they were measured with. `bootstraps`: others, for comparison."""

    name: str
    card: str
    source: str
    parameters: str
    levels: int
    milliseconds: dict[str, float]
    bootstraps: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, path: str | Path) -> Published:
        """Raises DataError for a file that does not say all of this."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            times = {name: float(data["milliseconds"][name]) for name in PRIMITIVES}
            others = tuple({**entry, "milliseconds": float(entry["milliseconds"])} for entry in data.get("bootstraps", ()))
            found = cls(*(str(data[name]) for name in ("name", "card", "source", "parameters")), int(data["levels"]), times, others)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no file of published primitive times ({error!r}): see recipes/benchmarks/gpu_primitives.json") from None
        if min(times.values()) <= 0 or times["multiply"] <= times["rotate"]:
            raise DataError(f"{path}: times are positive, and a product with relinearisation takes longer than a rotation")
        return found

    def seconds(self, units: Units) -> dict[str, float]:
        """By unit."""
        total: Counter[str] = Counter()
        for (name, _), count in units.items():
            total[name] += count * PRICES[name](self.milliseconds) / 1000
        return {name: value for name, value in total.items() if value}

    @property
    def counted(self) -> CKKSParameters:
        """The parameters on which operations are counted: ours at N = 2^16 with the published levels between bootstraps."""
        return CKKSParameters.from_bits(16, first_bits=49, scale_bits=40, levels=self.levels, special_bits=50, special_count=8, bootstrap=True)


def project(shape: Shape, features: int | None, published: Published, rank: int = 2) -> dict[str, Any]:
    """A row of `hf-he bench model` for an inference of a packed batch of SHIPPED_SHAPE or PAPER_SHAPE; with the shape's own features per ciphertext the
    adapter is an encrypted one, and `step` is a training step of the batch, optimiser included; with others the adapter is merged, `step` is None."""
    parameters = published.counted
    packing = Packing.fit(parameters.slots, features or shape.features, shape.tokens)
    step = None
    if packing.features == shape.features:
        work = count_lora(shape, rank, parameters=parameters)
        inference, step = work.inference, _part(sum(work.step.values(), Counter()), packing.sequences, published)
    else:
        inference = count_inference(shape, parameters, packing)
    return {
        "backend": published.name,
        "device": published.card,
        "versions": {"hf_he": __version__},
        "shape": {"name": "shipped" if shape is SHIPPED_SHAPE else "paper", "model": shape.name, "tokens": shape.tokens, "ring_degree": parameters.ring_degree},
        "features_per_ciphertext": packing.features,
        "batch": packing.sequences,
        **_part(inference, packing.sequences, published),
        "peak_memory_gb": None,
        "peak_gpu_gb": None,
        "security_bits": parameters.security_bits,
        "paper": PAPER,
        "priced": True,
        "step": step,
        "published": {name: getattr(published, name) for name in ("source", "parameters", "levels", "milliseconds")},
    }


def _part(units: Units, batch: int, published: Published) -> dict[str, Any]:
    operations: Counter[str] = Counter()
    for (name, _), count in units.items():
        operations[name] += count
    by_op = published.seconds(units)
    total = sum(by_op.values())
    rest = total - by_op.get("refresh", 0.0)
    others = [{**entry, "seconds_sample": (rest + operations["refresh"] * entry["milliseconds"] / 1000) / batch} for entry in published.bootstraps]
    return {
        "seconds_batch": total,
        "seconds_sample": total / batch,
        "by_op": by_op,
        "bootstraps": round(operations["refresh"]),
        "operations": {name: round(count) for name, count in operations.items()},
        "with_other_bootstraps": others,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and a line for each part of each row."""
    header = ["shape", "features", "batch", "what", "rotations", "bootstraps", "seconds", "a sample", "paper"]
    lines = []
    for row in rows:
        for what, part, bar in (("inference", row, row["paper"]["inference_s"]), ("LoRA step", row["step"], row["paper"]["finetune_s"])):
            if part is not None:
                rotations = sum(count for name, count in part["operations"].items() if name.endswith(" rotation"))
                figures = [f"{rotations:,}", f"{part['bootstraps']:,}", f"{part['seconds_batch']:.4g}", f"{part['seconds_sample']:.3g}"]
                bar = bar if row["shape"]["name"] == "paper" else "-"
                lines.append([row["shape"]["model"], str(row["features_per_ciphertext"]), str(row["batch"]), what, *figures, str(bar)])
    return header, lines
