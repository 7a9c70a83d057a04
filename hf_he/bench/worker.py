"""Times one library: JSON requests on stdin, JSON answers on stdout. Standard library only, Python 3.10 or newer.

`python worker.py SCRIPT` loads SCRIPT, which defines `VERSION` and `open_library(log2_degree, limbs, threads, names, shape)` returning
(parameters, operations, unsupported): a dict that describes the instance, {name: Operation} for those of `names` the library has, and
{name: reason} for the others. Requests are {"open": {...}} and {"time": name, "runs": k, "seconds": s}; the end of stdin ends the process.
"""

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass
class Operation:
    """`run()` is timed and stands for 1/`times` of the operation. `check(result)` is its largest error, `free(result)` releases the
    result outside of the timing, `details` go into the row."""

    run: Callable[[], Any]
    check: Callable[[Any], float] | None = None
    free: Callable[[Any], None] | None = None
    times: float = 1.0
    threads: int | None = None
    details: dict | None = None


class Worker:
    """The operations of one library instance."""

    def __init__(self, script: ModuleType) -> None:
        self.script = script
        self.operations: dict[str, Operation] = {}

    def answer(self, request: dict) -> dict:
        """The JSON answer to one request."""
        if "open" in request:
            return self._open(**request["open"])
        return self._time(request["time"], request["runs"], request["seconds"])

    def _open(self, log2_degree: int, limbs: int, threads: int, names: list, shape: list) -> dict:
        start = time.perf_counter()
        parameters, self.operations, unsupported = self.script.open_library(log2_degree, limbs, threads, names, tuple(shape))
        described = {}
        for name, operation in self.operations.items():
            result = operation.run()
            details = dict(operation.details or {})
            if operation.check is not None:
                details["max_error"] = float(operation.check(result))
            if operation.free is not None:
                operation.free(result)
            described[name] = {"threads": operation.threads or threads, **details}
            del result
        seconds = time.perf_counter() - start
        return {
            "version": self.script.VERSION,
            "parameters": parameters,
            "operations": described,
            "unsupported": unsupported,
            "seconds": seconds,
            "memory_gb": _memory_gb(),
        }

    def _time(self, name: str, runs: int, seconds: float) -> dict:
        """One run to warm up, then up to `runs` timed ones within about `seconds` (at least one)."""
        operation = self.operations[name]
        gc.collect()
        times = []
        began = time.perf_counter()
        while len(times) <= runs and (len(times) < 2 or time.perf_counter() - began < seconds):
            start = time.perf_counter()
            result = operation.run()
            times.append((time.perf_counter() - start) * 1e3 * operation.times)
            if operation.free is not None:
                operation.free(result)
            del result
        return {"ms": times[1:]}


def _memory_gb() -> float | None:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) / 1e6
    except OSError:
        pass
    return None


def load_script(path: str) -> ModuleType:
    """The module at `path`; it can `import worker` whatever the interpreter's search path is."""
    sys.modules.setdefault("worker", sys.modules[__name__])
    spec = importlib.util.spec_from_file_location("measured_library", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path: str) -> None:
    """Answer requests until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        try:
            worker = worker or Worker(load_script(path))
            answer = worker.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
