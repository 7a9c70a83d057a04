"""The machine a measurement ran on."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from hf_he.measurement import cpu_model, usable_cores

FLAGS = ("avx2", "fma", "avx512f", "avx512dq", "avx512_ifma", "avx512ifma", "amx_int8", "asimd", "sve")


def cpu_flags() -> list[str]:
    """Those of FLAGS that the CPU has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    present = {flag for line in lines if line.partition(":")[0].strip() in ("flags", "Features") for flag in line.partition(":")[2].split()}
    return [flag for flag in FLAGS if flag in present]


def cpu_caches() -> dict[str, str]:
    """Data and unified caches of the first core, by level."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; what other programs do shows here."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe() -> dict[str, Any]:
    """CPU, memory and versions, JSON-ready."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "cpu": cpu_model(),
        "flags": cpu_flags(),
        "caches": cpu_caches(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("numba", "llvmlite", "numpy")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
