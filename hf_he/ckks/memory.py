"""Reused memory for residue arrays: a fresh 30 MB array costs 10 ms and more in page faults, a reused one nothing."""

from __future__ import annotations

import math
from threading import Lock

import numpy as np

_ALIGNMENT = 64
_SMALL = 1 << 15
_KEEP_BYTES = 1 << 29


class _Block:
    """Memory that returns to the pool when the last array over it is gone."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.__array_interface__ = {"data": (memory.ctypes.data, False), "shape": memory.shape, "typestr": "<f8", "version": 3}

    def __del__(self) -> None:
        if _give_back is not None:  # the interpreter is not shutting down
            _give_back(self.memory)


_free: dict[int, list[np.ndarray]] = {}
_kept = 0
_lock = Lock()


def _give_back(memory: np.ndarray) -> None:
    global _kept
    if _kept + memory.nbytes <= _KEEP_BYTES and _lock.acquire(blocking=False):
        _free.setdefault(memory.size, []).append(memory)
        _kept += memory.nbytes
        _lock.release()


def empty(*shape: int) -> np.ndarray:
    """An uninitialised C-contiguous float64 array, 64-byte aligned, from the pool when one of that size is free."""
    global _kept
    size = math.prod(shape)
    if size < _SMALL:
        return np.empty(shape)
    with _lock:
        stack = _free.get(size)
        memory = stack.pop() if stack else None
        if memory is not None:
            _kept -= memory.nbytes
    if memory is None:
        raw = np.empty(size + _ALIGNMENT // 8)
        start = -raw.ctypes.data % _ALIGNMENT // 8
        memory = raw[start : start + size]
    return np.asarray(_Block(memory)).reshape(shape)
