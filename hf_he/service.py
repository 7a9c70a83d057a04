"""The server over HTTP: encrypted batches become jobs, and a client polls its job for refresh requests and the result.

    GET    /info                    what is served (JSON)
    POST   /jobs                    an encrypted batch -> {"id": ...}
    GET    /jobs/{id}/next?wait=s   the job's next event, named by the X-HF-HE-Event header:
                                    refresh (ciphertext bytes, numbered by X-HF-HE-Sequence), result (bytes), error, progress (JSON)
    POST   /jobs/{id}/refresh       the refreshed ciphertext for ?sequence=; answered, as `next` with ?wait=, by the event after it
    DELETE /jobs/{id}               forget the job

Jobs run one after another in a worker thread. Sizes, queue, kept results and waiting times are bounded; every failure is answered with the name and
message of an hf_he error, and the server goes on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from hf_he.errors import CorruptFileError, HEError, ModelMismatchError, ParameterError, RefreshError, SecretKeyOnServerError, WrongKeyError
from hf_he.protocol import EVENT_HEADER, SEQUENCE_HEADER, error_to_json

if TYPE_CHECKING:
    from hf_he.server import Server

MAX_WAITING_JOBS = 8
MAX_WAIT_SECONDS = 30.0
CLIENT_SILENCE_SECONDS = 120.0
PIECE_BYTES = 2**18
"""Of a download."""

MAX_KEPT_RESULTS = 64
MAX_KEPT_BYTES = 2**30
"""Of finished jobs together. The newest result is kept at any size."""

_STATUS = {CorruptFileError: 400, SecretKeyOnServerError: 403, WrongKeyError: 409, ModelMismatchError: 409, ParameterError: 422}
_log = logging.getLogger("hf_he.service")


class UnknownJobError(HEError):
    """The job does not exist (any more)."""


class MessageTooLargeError(CorruptFileError):
    """A request body exceeds what any valid message could need."""


class IncompleteMessageError(HEError):
    """A request body stopped arriving."""


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


def create_app(server: Server) -> FastAPI:
    """The HTTP application around a Server."""
    jobs = JobQueue(server)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(jobs.close)

    app = FastAPI(title="hf_he", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(HEError)
    def typed(request: Request, error: HEError) -> JSONResponse:
        return JSONResponse(error_to_json(error), status_code=_status(error))

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_to_json(ParameterError("the request's query is malformed: client and server need the same version of hf_he")), 422)

    @app.exception_handler(HTTPException)
    def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_to_json(HEError(f"there is no such request ({error.detail}): check the URL")), error.status_code)

    @app.exception_handler(Exception)
    def internal(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_to_json(error), status_code=500)

    @app.get("/info")
    def info() -> dict[str, Any]:
        return server.describe()

    @app.post("/jobs", status_code=202)
    async def submit(request: Request) -> dict[str, str]:
        with jobs.place():
            data = await read_body(request, server.max_batch_bytes)
            job = await run_in_threadpool(jobs.submit, data)
        return {"id": job.id}

    @app.get("/jobs/{job_id}/next")
    def next_event(job_id: str, wait: Annotated[float, Query(allow_inf_nan=False)] = 1.0) -> Response:
        return event_response(jobs.get(job_id), wait)

    @app.post("/jobs/{job_id}/refresh")
    async def refresh(job_id: str, sequence: int, request: Request, wait: Annotated[float, Query(allow_inf_nan=False)] = 0.0) -> Response:
        job = jobs.get(job_id)
        with job.answer(sequence) as take:
            async for part in read_parts(request, server.max_refresh_bytes):
                take(part)
        return await run_in_threadpool(event_response, job, wait)

    @app.delete("/jobs/{job_id}", status_code=204)
    def forget(job_id: str) -> Response:
        jobs.remove(job_id)
        return Response(status_code=204)

    return app


def event_response(job: Job, wait: float) -> Response:
    """The job's next event; bytes leave in pieces, so that the server buffers one of them and a slow client counts as one that is there."""
    event = job.next(min(max(wait, 0.0), MAX_WAIT_SECONDS))
    headers = {EVENT_HEADER: event.name, SEQUENCE_HEADER: str(event.sequence)}
    if not isinstance(event.body, bytes):
        return JSONResponse(event.body, headers=headers)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(event.body), PIECE_BYTES):
            yield event.body[start : start + PIECE_BYTES]
            job.touch()

    headers["Content-Length"] = str(len(event.body))
    return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers)


def serve(server: Server, host: str = "127.0.0.1", port: int = 8765, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve until interrupted. `port` 0 picks a free one; `on_ready` receives the URL once requests are answered."""
    import socket

    import uvicorn

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise HEError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port, or 0 for a free one") from None
    url = f"http://{host}:{listener.getsockname()[1]}"

    class Announcing(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if on_ready:
                on_ready(url)

    # longer than any client keeps an idle connection, so that none is closed under a request on its way
    settings = uvicorn.Config(create_app(server), log_level="warning", access_log=False, timeout_keep_alive=int(CLIENT_SILENCE_SECONDS))
    Announcing(settings).run(sockets=[listener])


def _status(error: HEError) -> int:
    if isinstance(error, UnknownJobError):
        return 404
    if isinstance(error, MessageTooLargeError):
        return 413
    if isinstance(error, IncompleteMessageError):
        return 408
    if isinstance(error, ServerBusyError):
        return 503
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 422)


async def read_body(request: Request, limit: int, silence_seconds: float = CLIENT_SILENCE_SECONDS) -> bytes:
    """The body of a request. Raises as `read_parts`."""
    return b"".join([part async for part in read_parts(request, limit, silence_seconds)])


async def read_parts(request: Request, limit: int, silence_seconds: float = CLIENT_SILENCE_SECONDS) -> AsyncIterator[bytes]:
    """The body of a request as it arrives, at most `limit` bytes.

    Raises MessageTooLargeError without reading more, IncompleteMessageError when nothing more arrives.
    """
    too_large = MessageTooLargeError(f"the message is larger than the {limit} bytes a valid one may take: send fewer sentences at a time")
    declared = request.headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdigit() and len(declared) <= 18 and int(declared) <= limit):
        raise too_large
    size, stream = 0, aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(silence_seconds):
                part = await anext(stream, None)
        except TimeoutError:
            raise IncompleteMessageError(f"{size} bytes arrived and then none for {silence_seconds:.0f} s: send the message again") from None
        if part is None:
            return
        size += len(part)
        if size > limit:
            raise too_large
        yield part
