"""How kernels are compiled and cached.

numba's own cache misses changes in the functions a kernel calls from other files, and would then run stale machine code. The cache
folder is therefore named after a digest of all sources of this package. Where it cannot be written nothing is cached: numba would go on to
the __pycache__ folders beside the sources, which no digest names.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba

# A kernel is a chain of short parallel loops. GNU OpenMP spins between them, which takes the core that another process (or the other
# half of the loop) waits for: measured on two busy cores, a rotation takes 71 ms with it and 5 to 8 ms with numba's own work queue, which sleeps.
if "NUMBA_THREADING_LAYER" not in os.environ:
    numba.config.THREADING_LAYER = "workqueue"
KERNEL_LOCK = threading.RLock()
"""Held around every parallel kernel: numba's work queue serves one caller at a time."""


@cache
def cache_folder() -> Path:
    """`kernels-DIGEST` inside `NUMBA_CACHE_DIR`, else `HF_HE_CACHE`, else `~/.cache/hf_he`."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("HF_HE_CACHE") or Path.home() / ".cache" / "hf_he"
    return Path(base).expanduser() / f"kernels-{digest.hexdigest()[:16]}"


@cache
def cache_is_writable() -> bool:
    """Whether machine code can be kept in `cache_folder()`, which this makes; warns once where it cannot."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        variable = "NUMBA_CACHE_DIR" if os.environ.get("NUMBA_CACHE_DIR") else "HF_HE_CACHE"
        warnings.warn(
            f"cannot write to {folder} ({error.strerror}): every process compiles its kernels again, about a minute in all. "
            f"Set {variable} to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def has_compiled() -> bool:
    """Whether any kernel of these sources has been compiled and kept."""
    return any(cache_folder().rglob("*.nbi"))


def kernel(function: Callable | None = None, *, parallel: bool = False) -> Callable:
    """Decorate a function that compiles to machine code without bounds checks, cached per version of these sources where the cache can be written."""
    if function is None:
        return lambda decorated: kernel(decorated, parallel=parallel)
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_folder())
    try:
        return numba.njit(error_model="numpy", boundscheck=False, cache=cache_is_writable(), parallel=parallel)(function)
    finally:
        numba.config.CACHE_DIR = before
