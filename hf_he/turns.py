"""Functions that take turns on one engine and wait for each other where their work can be shared.

Each runs in a thread of its own, but only one at a time: an engine that uses every core gains nothing from two at once. Once all of them wait, one
of them does for all what can be done together, such as bootstrapping two real ciphertexts as one complex one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

Result = TypeVar("Result")
Together = Callable[[list[Any]], list[Any]]


class Turns:
    """`run` functions in turns; inside them, `meet` exchanges values. `idle()` is entered while one waits for its turn."""

    def __init__(self, idle: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self._idle = idle
        self._changed = threading.Condition()
        self._own = threading.local()
        self._running: list[int] = []
        self._waiting: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}
        self._turn = 0
        self._failure: BaseException | None = None

    def run(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Their results, in order. The first exception ends all of them, and is raised here."""
        if len(functions) == 1:
            return [functions[0]()]
        results: list[Any] = [None] * len(functions)
        self._running, self._waiting, self._answers = list(range(len(functions))), {}, {}
        self._turn, self._failure = 0, None

        def work(index: int) -> None:
            self._own.index = index
            try:
                self._await_turn(index)
                results[index] = functions[index]()
            except _OtherFailedError:
                pass
            except BaseException as error:
                self._failure = error
            finally:
                self._leave(index)

        threads = [threading.Thread(target=work, args=(index,), name=f"hf-he-turn-{index}") for index in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return results

    def meet(self, value: Any, together: Together) -> Any:
        """Wait until every running function is here; `together` maps all their values to one answer each. Outside of `run`: at once."""
        index = getattr(self._own, "index", None)
        if index is None:
            return together([value])[0]
        with self._changed:
            self._waiting[index] = value
            self._pass_on()
        with self._idle():
            self._await_turn(index)
        if index in self._waiting:
            order = sorted(self._waiting)
            self._answers = dict(zip(order, together([self._waiting[i] for i in order]), strict=True))
            self._waiting.clear()
        return self._answers.pop(index)

    def _pass_on(self) -> None:
        """The turn of one that does not wait, or of a waiting one when there is none, which then answers them all."""
        free = [index for index in self._running if index not in self._waiting]
        self._turn = min(free or self._running, default=-1)
        self._changed.notify_all()

    def _await_turn(self, index: int) -> None:
        with self._changed:
            while self._turn != index and self._failure is None:
                self._changed.wait()
        if self._failure is not None:
            raise _OtherFailedError

    def _leave(self, index: int) -> None:
        with self._changed:
            self._running.remove(index)
            self._waiting.pop(index, None)
            self._pass_on()


class _OtherFailedError(Exception):
    """Another function failed: this one is not wanted any more."""
