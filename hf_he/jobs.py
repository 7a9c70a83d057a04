"""Jobs of a server process: a queue of them, and the mailbox between each job's worker thread and its polling client."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hf_he.errors import HEError, RefreshError
from hf_he.protocol import error_to_json

if TYPE_CHECKING:
    from hf_he.server import Server

MAX_WAITING_JOBS = 8
CLIENT_SILENCE_SECONDS = 120.0
MAX_KEPT_RESULTS = 64
MAX_KEPT_BYTES = 2**30
"""Of finished jobs together. The newest result is kept at any size."""

_log = logging.getLogger("hf_he.jobs")


class UnknownJobError(HEError):
    """The job does not exist (any more)."""


class ServerBusyError(HEError):
    """Too many jobs are waiting, or another answer to the same question is arriving."""


@dataclass(frozen=True)
class Event:
    """What a client finds when it polls: name, body, and the number of a refresh request."""

    name: str
    body: bytes | dict[str, Any]
    sequence: int = 0


class Job:
    """One inference and the mailbox between its worker thread and the polling client."""

    def __init__(self, progress: Callable[[], dict[str, Any]], silence_seconds: float = CLIENT_SILENCE_SECONDS) -> None:
        self.id = secrets.token_hex(16)
        self.started = False
        self._progress = progress
        self._silence = silence_seconds
        self._changed = threading.Condition()
        self._last_contact = time.monotonic()
        self._sequence = 0
        self._question: bytes | None = None
        self._arriving: list[bytes] | None = None
        self._answer: list[bytes] | None = None
        self._outcome: Event | None = None
        self.cancelled = False

    @property
    def finished(self) -> bool:
        return self._outcome is not None

    @property
    def kept_bytes(self) -> int:
        """Size of the result that waits for the client; 0 without one."""
        outcome = self._outcome
        return len(outcome.body) if outcome is not None and isinstance(outcome.body, bytes) else 0

    @property
    def abandoned(self) -> bool:
        """Nothing has come from or gone to a client for a while."""
        return time.monotonic() - self._last_contact > self._silence

    def touch(self) -> None:
        """The client is there: bytes of a message have just arrived or left."""
        with self._changed:
            self._last_contact = time.monotonic()

    def ask(self, question: bytes) -> bytes:
        """Called by the worker: hand a ciphertext to the client and wait for the refreshed one."""
        with self._changed:
            self._sequence += 1
            self._question = question
            self._last_contact = time.monotonic()
            self._changed.notify_all()
            try:
                while self._answer is None and not self.cancelled:
                    if self.abandoned:
                        raise RefreshError(f"the client did not answer a refresh request within {self._silence:.0f} s: run the inference again")
                    self._changed.wait(min(1.0, self._silence))
                if self.cancelled:
                    raise RefreshError("the client cancelled the job")
                parts = self._answer
            finally:
                self._question = self._arriving = self._answer = None
        return b"".join(parts)

    @contextmanager
    def answer(self, sequence: int) -> Iterator[Callable[[bytes], None]]:
        """Called for the client: take the refreshed ciphertext number `sequence` part by part, and deliver it when the block ends without an exception.

        A question takes one answer: the parts of a repeated or late one are dropped as they come. Raises RefreshError, before any part is taken, for a
        number that was not asked for, and ServerBusyError while another answer is arriving.
        """
        with self._changed:
            if self.cancelled or not 1 <= sequence <= self._sequence:
                raise RefreshError(f"no refresh number {sequence} was asked for in this job")
            first = self._waits_for(sequence)
            if first and self._arriving is not None:
                raise ServerBusyError(f"another answer to refresh number {sequence} is arriving: wait for it to end")
            if first:
                self._arriving = []

        def take(part: bytes) -> None:
            with self._changed:
                if self.cancelled:
                    raise RefreshError("the client cancelled the job")
                self._last_contact = time.monotonic()
                if first and self._waits_for(sequence):
                    self._arriving.append(part)

        try:
            yield take
        except BaseException:
            with self._changed:
                if first and self._waits_for(sequence):
                    self._arriving = None
            raise
        with self._changed:
            if first and self._waits_for(sequence):
                self._question, self._arriving, self._answer = None, None, self._arriving
                self._changed.notify_all()

    def _waits_for(self, sequence: int) -> bool:
        return sequence == self._sequence and self._question is not None

    def finish(self, outcome: Event) -> None:
        with self._changed:
            self._outcome = outcome
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()

    def next(self, wait: float) -> Event:
        """The pending refresh request, the outcome, or (after `wait` seconds without either) progress."""
        deadline = time.monotonic() + wait
        with self._changed:
            while True:
                self._last_contact = time.monotonic()
                if self._outcome is not None:
                    return self._outcome
                if self._question is not None:
                    return Event("refresh", self._question, self._sequence)
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return Event("progress", self._progress() if self.started else {"state": "waiting"})
                self._changed.wait(remaining)


class JobQueue:
    """Runs jobs one at a time on a Server and drops those whose client went away."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._jobs: dict[str, Job] = {}
        self._arriving = 0
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-he-job")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, held while a message is received and checked, so that waiting jobs and arriving messages together are bounded.

        Raises ServerBusyError when there is none.
        """
        with self._lock:
            self._tidy()
            if self._arriving + sum(not job.finished for job in self._jobs.values()) >= MAX_WAITING_JOBS:
                raise ServerBusyError(f"{MAX_WAITING_JOBS} jobs are waiting already: try again later")
            self._arriving += 1
        try:
            yield
        finally:
            with self._lock:
                self._arriving -= 1

    def submit(self, data: bytes) -> Job:
        """Check a batch completely and queue it, inside `place`. Raises the typed errors of `Server.open`."""
        work = self.server.open(data)
        job = Job(self.server.progress)
        with self._lock:
            self._jobs[job.id] = job
            self._worker.submit(self._run, job, work)
        return job

    def get(self, job_id: str) -> Job:
        with self._lock:
            if job_id not in self._jobs:
                raise UnknownJobError("there is no such job (results are dropped when nobody asks for them): submit the batch again")
            return self._jobs[job_id]

    def remove(self, job_id: str) -> None:
        with self._lock:
            job = self._jobs.pop(job_id, None)
        if job:
            job.cancel()

    def close(self) -> None:
        for job_id in list(self._jobs):
            self.remove(job_id)
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _tidy(self) -> None:
        """Drop what nobody asks for, and the oldest of too many results. Jobs finish in the order in which they lie here."""
        for job_id in [key for key, job in self._jobs.items() if job.abandoned]:
            self._jobs.pop(job_id).cancel()
        finished = [job for job in reversed(self._jobs.values()) if job.finished]
        kept = accumulate(job.kept_bytes for job in finished)
        for newer, (job, total) in enumerate(zip(finished, kept, strict=True)):
            if newer and (newer >= MAX_KEPT_RESULTS or total > MAX_KEPT_BYTES):
                del self._jobs[job.id]

    def _run(self, job: Job, work: Any) -> None:
        def still_wanted(_: dict[str, Any]) -> None:
            if job.abandoned or job.cancelled:
                raise RefreshError("the client went away")

        job.started = True
        try:
            job.finish(Event("result", self.server.run(work, job.ask, still_wanted)))
        except HEError as error:
            job.finish(Event("error", error_to_json(error)))
        except Exception as error:
            _log.exception("job failed")
            job.finish(Event("error", error_to_json(error)))
        with self._lock:
            self._tidy()
