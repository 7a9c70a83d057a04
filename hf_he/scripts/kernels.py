"""Compiling the native engine's kernels where the user can see it, before anything else waits for it."""

from __future__ import annotations

from hf_he.backends import HEBackend
from hf_he.scripts.display import count_progress, progress_bar, say


def prepare_kernels(backend: HEBackend) -> float:
    """Compile the kernels of the native backend, or load them from the cache of an earlier run; seconds taken, 0 for other backends."""
    if backend.name != "native":
        return 0.0
    from hf_he.ckks.warmup import compile_kernels

    with progress_bar("Compiling kernels (about a minute on the first run, then from the cache)") as progress:
        seconds = compile_kernels(count_progress(progress))
    say(f"kernels: ready in {seconds:.1f} s")
    return seconds
