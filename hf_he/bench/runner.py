"""Starts one process per library and measures them in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from hf_he.bench import native, worker
from hf_he.bench.operations import Instance

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"
PEERS = {"openfhe": "OpenFHE", "tenseal": "TenSEAL", "desilo": "DESILO FHE", "fhelium": "FHElium", "lattigo": "Lattigo"}
NATIVE = "native"
TIMEOUT = 900.0

Announce = Callable[[str], None]


class LibraryError(Exception):
    """A library could not do what was asked; the message says why."""


@dataclass(frozen=True)
class Library:
    """How to start the worker of one library, or why that is impossible."""

    name: str
    command: tuple[str, ...] = ()
    reason: str = ""


@dataclass
class Turns:
    """How often and how long each operation is measured: `rounds` turns of up to `runs` runs or about `seconds`; how much memory
    libraries may take that are measured in turns."""

    rounds: int = 7
    runs: int = 3
    seconds: float = 4.0
    threads: int = 2
    memory_gb: float = 6.0


@dataclass
class Measurements:
    """Rows of the JSON contract, and (library, what, reason) for everything that could not be measured."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, str]] = field(default_factory=list)

    def miss(self, library: str, what: str, reason: str) -> None:
        entry = {"library": library, "what": what, "reason": reason}
        if entry not in self.absent:
            self.absent.append(entry)


def find_libraries(peers: Path | None) -> list[Library]:
    """The native engine, then every peer with an environment `peers`/NAME; the others with the reason."""
    found = [Library(NATIVE, (sys.executable, "-m", "hf_he.bench.worker", native.__file__))]
    for name in PEERS:
        script = RECIPES / f"peer_{name}.py"
        if peers is None or not script.is_file():
            reason = "peers were not asked for" if peers is None else f"peers are measured from a clone of the repository: {script} is missing"
            found.append(Library(name, reason=reason))
            continue
        python, failure = peers / name / "bin" / "python", peers / f"{name}.failed"
        if failure.is_file():
            found.append(Library(name, reason=failure.read_text(encoding="utf-8", errors="replace").strip()))
        elif not python.is_file():
            found.append(Library(name, reason=f"no environment {peers / name}: recipes/benchmarks/setup_peers.sh makes it"))
        else:
            found.append(Library(name, (str(python.absolute()), "-I", worker.__file__, str(script))))
    return found


class Process:
    """A running worker."""

    def __init__(self, library: Library, threads: int) -> None:
        self.name = library.name
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "GOMAXPROCS"), str(threads))
        search = {"PYTHONPATH": os.pathsep.join(path for path in (str(RECIPES.parents[1]), os.environ.get("PYTHONPATH")) if path)}
        self._process = subprocess.Popen(
            library.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits, **(search if library.name == NATIVE else {})},
        )
        self._answers: Queue[str | None] = Queue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_answers(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _read_errors(self) -> None:
        for line in self._process.stderr:
            self._errors = [*self._errors[-20:], line.strip()]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises LibraryError when it reports one, dies or takes longer than TIMEOUT seconds."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=TIMEOUT)
        except BrokenPipeError:
            line = None
        except Empty:
            raise LibraryError(f"no answer within {TIMEOUT:.0f} s") from None
        if line is None:
            status = self._process.wait()
            self._readers[1].join(timeout=5)
            said = next((text for text in reversed(self._errors) if text), "")
            raise LibraryError(f"its process ended with status {status}" + (f": {said[:200]}" if said else ""))
        answer = json.loads(line)
        if "error" in answer:
            raise LibraryError(answer["error"][:300])
        return answer

    def close(self) -> None:
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def _opened(library: Library, instance: Instance, names: Sequence[str], threads: int) -> Iterator[tuple[Process, dict[str, Any]]]:
    process = Process(library, threads)
    try:
        request = {"log2_degree": instance.log2_degree, "limbs": instance.limbs, "threads": threads, "names": list(names), "shape": list(instance.shape)}
        yield process, process.ask({"open": request})
    finally:
        process.close()


def measure(
    libraries: Sequence[Library], instance: Instance, names: Sequence[str], turns: Turns, into: Measurements, announce: Announce = lambda text: None
) -> None:
    """Measure `names` on `instance` with every library that runs: each round visits every operation, each operation every library, beginning
    with another one each round. Peers that would take more than `turns.memory_gb` together are measured one group after another, the native
    engine in each; a group has at least one peer, whatever it takes. Appends one row per library and operation, and the reasons of the others, to `into`."""
    times: dict[tuple[str, str], list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for library in libraries:
        if library.reason:
            into.miss(library.name, "everything", library.reason)
    native = [library for library in libraries if library.name == NATIVE]
    waiting = [library for library in libraries if not library.reason and library.name != NATIVE]
    while native or waiting:
        with ExitStack() as stack:
            opened: dict[str, Process] = {}
            memory = [0.0]
            for library in [*native, *waiting]:
                if set(opened) - {NATIVE} and sum(memory) + max(memory) > turns.memory_gb:
                    break
                waiting = [other for other in waiting if other is not library]
                announce(f"{instance.name}: keys and ciphertexts of {library.name}")
                try:
                    opened[library.name], facts[library.name] = stack.enter_context(_opened(library, instance, names, turns.threads))
                    memory.append(facts[library.name]["memory_gb"] or 0.0)
                except LibraryError as error:
                    into.miss(library.name, instance.name, str(error))
                    native = [other for other in native if other is not library]
            _take_turns(opened, facts, instance, names, turns, times, into, announce)
        if not waiting:
            break
    for name in names:
        for library in (library.name for library in libraries if library.name in facts):
            if times.get((library, name)):
                into.rows.append(_row(library, name, instance, facts[library], times[library, name]))
            elif name in facts[library]["unsupported"]:
                into.miss(library, name, facts[library]["unsupported"][name])


def _take_turns(
    opened: dict[str, Process],
    facts: dict[str, dict[str, Any]],
    instance: Instance,
    names: Sequence[str],
    turns: Turns,
    times: dict[tuple[str, str], list[float]],
    into: Measurements,
    announce: Announce,
) -> None:
    failed = set()
    for turn in range(turns.rounds):
        announce(f"{instance.name}: round {turn + 1} of {turns.rounds}")
        for name in names:
            order = [library for library in opened if name in facts[library]["operations"] and (library, name) not in failed]
            shift = turn % max(len(order), 1)
            for library in order[shift:] + order[:shift]:
                try:
                    measured = opened[library].ask({"time": name, "runs": turns.runs, "seconds": turns.seconds})["ms"]
                    times.setdefault((library, name), []).extend(measured)
                except LibraryError as error:
                    into.miss(library, f"{name} at {instance.name}", str(error))
                    failed.add((library, name))


def _row(library: str, name: str, instance: Instance, facts: dict[str, Any], times: list[float]) -> dict[str, Any]:
    parameters = facts["parameters"]
    row = {
        "library": library,
        "version": facts["version"],
        "op": name + ("_{}x{}".format(*instance.shape) if any(instance.shape) else ""),
        "ring_dimension": 1 << instance.log2_degree,
        "limbs": parameters.get("limbs", instance.limbs),
        **facts["operations"][name],
        "median_ms": statistics.median(times),
        "fastest_ms": min(times),
        "runs": len(times),
        "parameters": parameters,
    }
    if "modular_products" in row:
        row["gmac_per_s"] = row["modular_products"] / row["median_ms"] / 1e6
    return row
