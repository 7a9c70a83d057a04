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
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hf_he.errors import CorruptFileError, HEError, ModelMismatchError, ParameterError, SecretKeyOnServerError, WrongKeyError
from hf_he.jobs import CLIENT_SILENCE_SECONDS, Job, JobQueue, ServerBusyError, UnknownJobError
from hf_he.protocol import EVENT_HEADER, SEQUENCE_HEADER, error_to_json

if TYPE_CHECKING:
    from hf_he.server import Server

MAX_WAIT_SECONDS = 30.0
PIECE_BYTES = 2**18
"""Of a download."""

_STATUS = {CorruptFileError: 400, SecretKeyOnServerError: 403, WrongKeyError: 409, ModelMismatchError: 409, ParameterError: 422}


class MessageTooLargeError(CorruptFileError):
    """A request body exceeds what any valid message could need."""


class IncompleteMessageError(HEError):
    """A request body stopped arriving."""


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
        except ClientDisconnect:
            raise IncompleteMessageError(f"{size} bytes arrived and then the connection ended: send the message again") from None
        if part is None:
            return
        size += len(part)
        if size > limit:
            raise too_large
        yield part
