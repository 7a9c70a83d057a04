"""`hf-he plan`: levels, refreshes, keys, time and memory of an encrypted run, computed without keys."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_he.checkpoints import default_model, load_classifier
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.generation.model import is_decoder, load_decoder
from hf_he.packing import Packing
from hf_he.planner import Plan, choose_packing, key_sizes, make_plan, make_plans, packing_widths
from hf_he.protocol import SEQUENCE_LENGTH
from hf_he.refresh import BootstrapRefresh
from hf_he.scripts.display import console, print_json


def collect(model: Path | None, parameters: str, batch: int | None = None) -> dict[str, Any]:
    """Everything `hf-he plan` shows, JSON-ready. With `batch`, of the packing that suits so many sentences, and why it does."""
    directory, chosen = model or default_model(), parameter_set(parameters)
    loaded = load_decoder(directory) if is_decoder(directory) else load_classifier(directory)
    if batch is not None:
        choice = choose_packing(make_plans(loaded, chosen, SEQUENCE_LENGTH), batch)
        why = {"batch": batch, "seconds_by_features": {str(width): value for width, value in choice.seconds.items()}, "reason": choice.reason}
        return describe(choice.plan, chosen, choice.packing) | {"parameters": parameters, "packing": why}
    packing = Packing.fit(chosen.slots, packing_widths(loaded.config)[0], SEQUENCE_LENGTH)
    return describe(make_plan(loaded, chosen, packing), chosen, packing) | {"parameters": parameters}


def describe(plan: Plan, parameters: CKKSParameters, packing: Packing) -> dict[str, Any]:
    """A plan, JSON-ready. `seconds` are of one packed batch on one core, `key_bytes` of memory and of files."""
    bootstraps = bool(parameters.bootstrap_moduli)
    return {
        "ring_degree": parameters.ring_degree,
        "levels": parameters.max_level,
        "sequences_per_batch": packing.sequences,
        "features_per_ciphertext": packing.features,
        "placement": [{"module": name, "kind": type(at).__name__.removesuffix("Levels").lower(), **asdict(at)} for name, at in plan.levels.items()],
        "refresh": "bootstrap" if bootstraps else "client",
        "batches_per_refresh": BootstrapRefresh.lanes if bootstraps else 1,
        "refreshes": [{"level": level, "ciphertexts": count} for level, count in plan.refreshes],
        "rotations": {str(step): level for step, level in sorted(plan.rotations.items())},
        "relinearization_level": plan.relinearization,
        "operations": plan.operations,
        "seconds": plan.seconds,
        "key_bytes": key_sizes(plan, parameters),
    }


def collect_step(model: Path | None, parameters: str, batch: int) -> dict[str, Any]:
    """What a training step of `batch` examples takes in the packing that suits it, JSON-ready."""
    from hf_he.finetuning.plan import choose_step_packing
    from hf_he.finetuning.protocol import TrainingSettings

    chosen = parameter_set(parameters)
    choice = choose_step_packing(lambda: load_classifier(model or default_model()), chosen, SEQUENCE_LENGTH, TrainingSettings(sequences=batch))
    micro_batches = -(-batch // choice.packing.sequences)
    return {
        "parameters": parameters,
        "batch": batch,
        "features_per_ciphertext": choice.packing.features,
        "micro_batches": micro_batches,
        "seconds": choice.plan.seconds(micro_batches),
        "seconds_by_features": {str(width): value for width, value in choice.seconds.items()},
        "weight_ciphertexts_by_features": {str(width): value for width, value in choice.weights.items()},
        "weight_bytes_by_features": {str(width): value for width, value in choice.weight_bytes.items()},
        "operations": choice.plan.operations(micro_batches),
        "refresh_messages": choice.plan.refreshes(micro_batches),
        "rotations": len(choice.plan.rotations),
        "reason": choice.reason,
    }


def plan_step(model: Path | None, parameters: str, json_output: bool, batch: int) -> None:
    """Print the plan of a training step as a table or JSON."""
    data = collect_step(model, parameters, batch)
    if json_output:
        print_json(data)
        return
    facts = Table(show_header=False, title=f"Training step of {batch} examples")
    facts.add_row("packing", data["reason"])
    facts.add_row("refreshes", f"{data['refresh_messages']} messages, if by the client")
    facts.add_row("rotations", f"{data['operations'].get('rotate', 0):,} with {data['rotations']} keys")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in sorted(data["seconds"].items(), key=lambda item: -item[1]) if value >= 0.05)
    facts.add_row("time on one core", f"about {sum(data['seconds'].values()):.0f} s in {data['micro_batches']} micro-batches ({seconds})")
    console.print(facts)


def plan(model: Path | None, parameters: str, json_output: bool, batch: int | None = None) -> None:
    """Print the plan as tables or JSON."""
    data = collect(model, parameters, batch)
    if json_output:
        print_json(data)
        return
    placement = Table("module", "operation", "levels", title=f"Placement of a batch of {data['sequences_per_batch']} sentences, levels 0 to {data['levels']}")
    for row in data["placement"]:
        levels = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("module", "kind"))
        placement.add_row(row["module"], row["kind"], levels)
    console.print(placement if data["placement"] else "this architecture is placed while it runs, operation by operation")
    facts = Table(show_header=False, title="Run")
    if "packing" in data:
        facts.add_row("packing", data["packing"]["reason"])
    widths = [row["ciphertexts"] for row in data["refreshes"]]
    how = f"by bootstrapping, {data['batches_per_refresh']} batches together" if data["refresh"] == "bootstrap" else "by the client, a round trip each"
    facts.add_row("refreshes", f"{len(widths)} of {min(widths, default=0)} to {max(widths, default=0)} ciphertexts, {how}")
    facts.add_row("rotations", f"{data['operations'].get('rotate', 0):,} with {len(data['rotations'])} keys, at levels up to {max(data['rotations'].values())}")
    for name, sizes in data["key_bytes"].items():
        facts.add_row(f"{name} keys", f"{sizes['count']} keys, {sizes['memory'] / 1e9:.2f} GB in memory, {sizes['files'] / 1e9:.2f} GB in files")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in data["seconds"].items())
    facts.add_row("time on one core", f"about {sum(data['seconds'].values()):.0f} s a batch ({seconds})")
    console.print(facts)
