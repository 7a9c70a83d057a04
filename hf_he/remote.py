"""A server in another process: the same interface as `hf_he.Server`, over HTTP."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from hf_he.errors import CorruptFileError, HEError
from hf_he.protocol import EVENT_HEADER, SEQUENCE_HEADER, error_from_json
from hf_he.serialization import quoted

POLL_SECONDS = 1.0
PIECE_BYTES = 2**23
"""Uploads larger than this are sent in pieces of it, with progress."""

MAX_ANSWER_BYTES = 2**33
_PROGRESS = {"state": str, "batch": int, "batches": int, "operations": int, "operation": str}
_UNLIKE = "does not answer like an hf_he server of this version: check the URL"


@dataclass(frozen=True)
class _Answer:
    headers: httpx.Headers
    content: bytes

    def json(self) -> dict[str, Any]:
        try:
            data = json.loads(self.content)
        except (ValueError, RecursionError):
            raise CorruptFileError("the server answered with something that is not JSON: check the URL") from None
        if not isinstance(data, dict):
            raise CorruptFileError(f"the server answered {quoted(data)} where a JSON object belongs: check the URL")
        return data


class RemoteServer:
    """Speaks to `hf-he serve`. Errors the server reports are raised here as the same hf_he classes.

    A log-in in the URL, https://user:password@host, is sent as HTTP basic authentication and shown nowhere: `url` is without it.
    """

    def __init__(self, url: str, timeout: float = 120.0, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        try:
            given = httpx.URL(url.rstrip("/"))
        except httpx.InvalidURL:
            raise HEError("the server's address is not a URL: it looks like http://127.0.0.1:8765") from None
        self.url = str(given.copy_with(userinfo=b""))
        self.max_answer_bytes = max_answer_bytes
        login = (given.username, given.password) if given.userinfo else None
        self._http = httpx.Client(base_url=self.url, auth=login, timeout=timeout, trust_env=False, headers={"Accept-Encoding": "identity"})

    def describe(self) -> dict[str, Any]:
        """Backend, parameters, model fingerprint and key id of what is served."""
        return self._request("GET", "/info").json()

    def infer(self, data: bytes, refresh: Callable[[bytes], bytes], progress: Callable[[dict[str, Any]], None] | None = None) -> bytes:
        """Submit encrypted-batch bytes, answer refresh requests with `refresh`, and return the encrypted-result bytes."""
        job = self._request("POST", "/jobs", content=_pieces(data, progress), headers={"Content-Length": str(len(data))}).json().get("id")
        if not isinstance(job, str) or not (job.isascii() and job.isalnum() and len(job) <= 64):
            raise HEError(f"{self.url} {_UNLIKE}")
        try:
            poll = partial(self._request, "GET", f"/jobs/{job}/next", params={"wait": POLL_SECONDS})
            response = poll()
            while True:
                event = response.headers.get(EVENT_HEADER)
                if event == "result":
                    return response.content
                if event == "error":
                    raise error_from_json(response.json())
                if event == "refresh":
                    sequence = response.headers.get(SEQUENCE_HEADER, "")
                    if not (sequence.isascii() and sequence.isdigit() and len(sequence) < 10):
                        raise HEError(f"{self.url} {_UNLIKE}")
                    numbered = {"sequence": sequence, "wait": POLL_SECONDS}
                    response = self._request("POST", f"/jobs/{job}/refresh", params=numbered, content=refresh(response.content))
                elif event == "progress":
                    if progress:
                        progress(self._progress(response))
                    response = poll()
                else:
                    raise HEError(f"{self.url} sent an unknown event: client and server need the same version of hf_he")
        finally:
            with contextlib.suppress(HEError):
                self._request("DELETE", f"/jobs/{job}")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _progress(self, answer: _Answer) -> dict[str, Any]:
        event = answer.json()
        for name, value in event.items():
            if type(value) is not _PROGRESS.get(name) or (isinstance(value, str) and not (value.isascii() and value.isidentifier() and len(value) < 40)):
                raise HEError(f"{self.url} {_UNLIKE}")
        if ("batch" in event) != ("batches" in event):
            raise HEError(f"{self.url} {_UNLIKE}")
        return event

    def _request(self, method: str, path: str, **arguments: Any) -> _Answer:
        try:
            with self._http.stream(method, path, **arguments) as response:
                parts, size = [], 0
                for part in response.iter_raw():
                    size += len(part)
                    if size > self.max_answer_bytes:
                        raise CorruptFileError(f"the server's answer is larger than {self.max_answer_bytes} bytes: do not trust it, or pass max_answer_bytes=")
                    parts.append(part)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise HEError(f"cannot reach the server at {self.url} ({type(error).__name__}): start it with `hf-he serve`, or check --server") from None
        answer = _Answer(response.headers, b"".join(parts))
        if not response.is_success:
            raise error_from_json(answer.json())
        return answer


def _pieces(data: bytes, progress: Callable[[dict[str, Any]], None] | None) -> bytes | Iterator[bytes]:
    """`data`, or its pieces, each announced to `progress` before it is sent."""
    if progress is None or len(data) <= PIECE_BYTES:
        return data

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), PIECE_BYTES):
            progress({"state": "sending", "bytes": start, "of_bytes": len(data)})
            yield data[start : start + PIECE_BYTES]

    return pieces()


def connect(url: str) -> RemoteServer:
    """A running `hf-he serve` at `url`, checked to answer."""
    server = RemoteServer(url)
    server.describe()
    return server
