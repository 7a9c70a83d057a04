"""What a backend did: counts, seconds and the ordered trace of levels, by primitive and by the operation that asked for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TraceEntry:
    scope: str
    primitive: str
    level: int
    count: int


class OperationLog:
    """Counts and wall-clock seconds per (scope, primitive), and the ordered trace of levels."""

    def __init__(self) -> None:
        self.synchronise: Callable[[], None] | None = None
        """Called after each primitive, where its work goes on beside this program: times are then its own, and the whole takes longer."""
        self.reset()

    def reset(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.scope_seconds: Counter[str] = Counter()
        self.trace: list[TraceEntry] = []
        self._own = threading.local()

    @property
    def _scopes(self) -> list[list[Any]]:
        """Open scopes of this thread: name and seconds that do not count."""
        if not hasattr(self._own, "scopes"):
            self._own.scopes = []
        return self._own.scopes

    @property
    def scope(self) -> str:
        return self._scopes[-1][0] if self._scopes else "other"

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Time inside counts for no scope: another thread is working."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._scopes:
                self._scopes[-1][1] += time.perf_counter() - start

    @contextmanager
    def measure(self, scope: str) -> Iterator[None]:
        """Attribute what happens inside to `scope` (linear, attention, norm, activation, refresh, ...); the innermost wins."""
        frame = [scope, 0.0]
        self._scopes.append(frame)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._scopes.pop()
            self.scope_seconds[scope] += elapsed - frame[1]
            if self._scopes:
                self._scopes[-1][1] += elapsed

    @contextmanager
    def primitive(self, name: str, level: int, count: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.synchronise is not None:
            self.synchronise()
        key = (self.scope, name)
        self.counts[key] += count
        self.seconds[key] += time.perf_counter() - start
        self.trace.append(TraceEntry(self.scope, name, level, count))

    def by_primitive(self) -> dict[str, float]:
        return _sum_by(self.seconds, 1)

    def by_op(self) -> dict[str, float]:
        return dict(self.scope_seconds)

    def operations(self) -> dict[str, int]:
        return _sum_by(self.counts, 1)


def _sum_by(counter: Counter, index: int) -> dict:
    out: Counter = Counter()
    for key, value in counter.items():
        out[key[index]] += value
    return dict(out)
