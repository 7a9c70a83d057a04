"""The HTTP service without a model: what of a request it reads, and when."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import ClassVar

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

from hf_he.jobs import MAX_WAITING_JOBS, Event, Job
from hf_he.service import PIECE_BYTES, IncompleteMessageError, MessageTooLargeError, create_app, event_response, read_body


class Asking:
    """A server whose only work is to ask the client once."""

    max_batch_bytes = max_refresh_bytes = 100

    def progress(self):
        return {"state": "running"}

    def open(self, data):
        return data

    def run(self, work, ask, still_wanted):
        return b"result of " + ask(b"question")


@asynccontextmanager
async def asked():
    """A client whose job waits for the answer number 1, and the path that takes it."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(Asking())), base_url="http://server") as http:
        job = (await http.post("/jobs", content=b"batch")).json()["id"]
        assert (await http.get(f"/jobs/{job}/next?wait=20")).content == b"question"
        yield http, f"/jobs/{job}/refresh?wait=20"
        await http.delete(f"/jobs/{job}")


async def unread():
    """A body that the server must not touch."""
    raise AssertionError("the body was read")
    yield b""


def test_oversized_streams_are_cut_off():
    class Endless:
        headers: ClassVar = {}

        async def stream(self):
            while True:
                yield bytes(10)

    with pytest.raises(MessageTooLargeError):
        asyncio.run(read_body(Endless(), limit=95))


def test_a_message_that_stops_arriving_is_given_up():
    class Stalled:
        headers: ClassVar = {}

        async def stream(self):
            yield bytes(10)
            await asyncio.Event().wait()

    with pytest.raises(IncompleteMessageError, match="10 bytes"):
        asyncio.run(read_body(Stalled(), limit=95, silence_seconds=0.01))


def test_a_message_whose_connection_ends_is_no_defect_of_the_server():
    class Broken:
        headers: ClassVar = {}

        async def stream(self):
            yield bytes(10)
            raise ClientDisconnect

    with pytest.raises(IncompleteMessageError, match="10 bytes"):
        asyncio.run(read_body(Broken(), limit=95))


class TestAnswers:
    """Answers to refresh requests are large: the server holds one at a time, and only one that it asked for."""

    def test_an_unasked_answer_is_refused_before_it_is_read(self):
        async def scenario():
            async with asked() as (http, refresh):
                for sequence in (-1, 0, 2):
                    refused = await http.post(f"{refresh}&sequence={sequence}", content=unread())
                    assert (refused.status_code, refused.json()["error"]) == (422, "RefreshError")

        asyncio.run(scenario())

    def test_a_second_answer_is_refused_before_it_is_read_while_the_first_arrives(self):
        async def scenario():
            arriving, rest = asyncio.Event(), asyncio.Event()

            async def slow():
                yield b"first "
                arriving.set()
                await rest.wait()
                yield b"answer"

            async with asked() as (http, refresh):
                first = asyncio.create_task(http.post(f"{refresh}&sequence=1", content=slow()))
                await arriving.wait()
                second = await http.post(f"{refresh}&sequence=1", content=unread())
                assert (second.status_code, second.json()["error"]) == (503, "ServerBusyError")
                rest.set()
                assert (await first).content == b"result of first answer"

        asyncio.run(scenario())

    def test_a_failed_upload_makes_room_for_the_next_one_and_a_repeated_one_changes_nothing(self):
        async def scenario():
            async with asked() as (http, refresh):
                assert (await http.post(f"{refresh}&sequence=1", content=bytes(101))).status_code == 413
                for body in (b"answer", b"answer again"):
                    assert (await http.post(f"{refresh}&sequence=1", content=body)).content == b"result of answer"

        asyncio.run(scenario())


def test_a_defect_of_the_server_is_answered_by_its_name_only():
    class Broken:
        max_batch_bytes = 100

        def open(self, data):
            raise ZeroDivisionError("internal detail")

    with TestClient(create_app(Broken()), raise_server_exceptions=False) as http:
        for _ in range(MAX_WAITING_JOBS + 1):
            response = http.post("/jobs", content=b"batch")
            assert response.status_code == 500 and "ZeroDivisionError" in response.json()["message"] and "detail" not in response.text


def test_a_client_that_reads_slowly_is_not_given_up(monkeypatch):
    """Every piece that leaves counts: here 0.04 s for each, and 0.05 s of silence at most."""
    clock, left = SimpleNamespace(seconds=0.0), []
    monkeypatch.setattr("hf_he.jobs.time", SimpleNamespace(monotonic=lambda: clock.seconds))
    job, result = Job(dict, silence_seconds=0.05), bytes(3 * PIECE_BYTES)
    job.finish(Event("result", result))

    async def send(message):
        clock.seconds += 0.04
        left.append(message.get("body", b""))

    asyncio.run(event_response(job, 0)({"type": "http", "asgi": {"spec_version": "2.4"}}, None, send))
    assert b"".join(left) == result and len(left) > 3
    assert not job.abandoned
