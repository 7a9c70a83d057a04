"""A server in another process: the same interface as `hf_he.Server`, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import httpx

from hf_he.errors import CorruptFileError, HEError
from hf_he.protocol import EVENT_HEADER, SEQUENCE_HEADER, error_from_json

POLL_SECONDS = 1.0


class RemoteServer:
    """Speaks to `hf-he serve`. Errors the server reports are raised here as the same hf_he classes."""

    def __init__(self, url: str, timeout: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def describe(self) -> dict[str, Any]:
        """Backend, parameters, model fingerprint and key id of what is served."""
        return self._json(self._request("GET", "/info"))

    def infer(
        self, data: bytes, refresh: Callable[[bytes], bytes], progress: Callable[[dict[str, Any]], None] | None = None
    ) -> bytes:
        """Submit encrypted-batch bytes, answer refresh requests with `refresh`, and return the encrypted-result bytes."""
        job = self._json(self._request("POST", "/jobs", content=data)).get("id")
        if not isinstance(job, str) or not job.isalnum():
            raise HEError(f"{self.url} does not answer like an hf_he server: check the URL")
        try:
            while True:
                response = self._request("GET", f"/jobs/{job}/next", params={"wait": POLL_SECONDS})
                event = response.headers.get(EVENT_HEADER)
                if event == "result":
                    return response.content
                if event == "refresh":
                    sequence = response.headers.get(SEQUENCE_HEADER, "")
                    self._request("POST", f"/jobs/{job}/refresh", params={"sequence": sequence}, content=refresh(response.content))
                elif event == "error":
                    raise error_from_json(self._json(response))
                elif event != "progress":
                    raise HEError(f"{self.url} sent an unknown event: client and server need the same version of hf_he")
                elif progress:
                    progress(self._json(response))
        finally:
            with contextlib.suppress(HEError):
                self._request("DELETE", f"/jobs/{job}")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise HEError(f"cannot reach the server at {self.url} ({type(error).__name__}): start it with `hf-he serve`, or check --server") from None
        if response.is_error:
            raise error_from_json(self._json(response))
        return response

    @staticmethod
    def _json(response: httpx.Response) -> Any:
        try:
            data = response.json()
        except ValueError:
            raise CorruptFileError("the server answered with something that is not JSON: check the URL") from None
        return data


def connect(url: str) -> RemoteServer:
    """A running `hf-he serve` at `url`, checked to answer."""
    server = RemoteServer(url)
    server.describe()
    return server
