"""`hf-he env`: what this machine offers, each backend with the reason when it is unavailable, and the parameter sets."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
from rich.table import Table
from rich.text import Text

from hf_he.backends import available_backends
from hf_he.ckks.parameters import MAX_LOG2_QP, PARAMETER_SETS, parameter_set
from hf_he.measurement import cpu_model, usable_cores
from hf_he.scripts.display import console, print_json

PACKAGES = ("hf-he", "torch", "transformers", "peft", "accelerate", "numba", "numpy", "safetensors", "cryptography", "fastapi", "uvicorn", "httpx")
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512dq", "avx512ifma", "sha", "neon", "asimd", "sve")


def collect() -> dict[str, Any]:
    """Everything `hf-he env` shows, JSON-ready."""
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    sets = {}
    for name in PARAMETER_SETS:
        parameters = parameter_set(name)
        sets[name] = {
            "ring_degree": parameters.ring_degree,
            "slots": parameters.slots,
            "levels": parameters.max_level,
            "scale_bits": parameters.scale_bits,
            "log2_qp": parameters.log2_qp,
            "log2_qp_limit": MAX_LOG2_QP[parameters.ring_degree],
            "security_bits": parameters.security_bits,
            "fingerprint": parameters.fingerprint,
        }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": cpu_model(),
            "llvm_name": llvmlite.binding.get_host_cpu_name(),
            "features": [name for name in CPU_FEATURES if features.get(name)],
            "cores": usable_cores(),
        },
        "memory_gb": {"total": psutil.virtual_memory().total / 1e9, "available": psutil.virtual_memory().available / 1e9},
        "backends": {name: {"available": ok, "reason": reason} for name, (ok, reason) in available_backends().items()},
        "parameter_sets": sets,
    }


def env(json_output: bool) -> None:
    """Print the environment as tables or JSON."""
    data = collect()
    if json_output:
        print_json(data)
        return
    machine = Table(title="Machine", show_header=False)
    machine.add_row("python", f"{data['python']} on {data['platform']}")
    machine.add_row("packages", ", ".join(f"{name} {found or 'missing'}" for name, found in data["packages"].items()))
    machine.add_row("cpu", f"{data['cpu']['model']} ({data['cpu']['llvm_name']}), {data['cpu']['cores']} cores usable")
    machine.add_row("features", ", ".join(data["cpu"]["features"]) or "none of those looked for")
    machine.add_row("memory", f"{data['memory_gb']['available']:.1f} of {data['memory_gb']['total']:.1f} GB available")
    console.print(machine)
    backends = Table("backend", "available", "reason", title="Backends")
    for name, entry in data["backends"].items():
        backends.add_row(name, "yes" if entry["available"] else "no", Text(entry["reason"]))
    console.print(backends)
    sets = Table("set", "N", "slots", "levels", "scale", "log2 QP", "limit", "security", title="Parameter sets (ternary secret, classical, 128-bit table)")
    for name, entry in data["parameter_sets"].items():
        numbers = [f"{entry[key]}" for key in ("ring_degree", "slots", "levels")]
        sets.add_row(name, *numbers, f"2^{entry['scale_bits']}", f"{entry['log2_qp']:.1f}", f"{entry['log2_qp_limit']}", f"{entry['security_bits']} bits")
    console.print(sets)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
