"""The parts of the HTTP service that need no model: the mailbox of a job and the reading of bodies."""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from types import SimpleNamespace
from typing import ClassVar

import httpx
import pytest
from fastapi.testclient import TestClient

from hf_he.errors import RefreshError
from hf_he.service import (
    MAX_WAITING_JOBS,
    PIECE_BYTES,
    IncompleteMessageError,
    Job,
    JobQueue,
    MessageTooLargeError,
    ServerBusyError,
    UnknownJobError,
    create_app,
    event_response,
    read_body,
)


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


def answer(job, sequence, *parts):
    with job.answer(sequence) as take:
        for part in parts:
            take(part)


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


def test_messages_on_their_way_count_as_waiting_jobs():
    """Otherwise any number of clients could fill the memory at once, each with a message that none of the others' limits knows of."""
    queue = JobQueue(server=None)
    try:
        with ExitStack() as places:
            for _ in range(MAX_WAITING_JOBS):
                places.enter_context(queue.place())
            with pytest.raises(ServerBusyError, match="try again later"), queue.place():
                pass
        with queue.place():
            pass
    finally:
        queue.close()


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


class TestKeptResults:
    """Results wait for their client, but not any number of them."""

    class Echo:
        def progress(self):
            return {}

        def open(self, data):
            return data

        def run(self, work, ask, still_wanted):
            return work

    def kept(self, results):
        """Those that their clients still find after one job each, all of them finished."""
        queue, found = JobQueue(self.Echo()), []
        try:
            jobs = [queue.submit(result) for result in results]
            queue._worker.submit(int).result()
            for job in jobs:
                with suppress(UnknownJobError):
                    found.append(queue.get(job.id).next(0).body)
        finally:
            queue.close()
        return found

    def test_the_oldest_of_too_many_go_first(self, monkeypatch):
        monkeypatch.setattr("hf_he.service.MAX_KEPT_RESULTS", 2)
        assert self.kept([b"1", b"2", b"3", b"4"]) == [b"3", b"4"]

    def test_so_do_those_of_too_many_bytes_but_never_the_last(self, monkeypatch):
        monkeypatch.setattr("hf_he.service.MAX_KEPT_BYTES", 20)
        assert self.kept([bytes(10), bytes(9), bytes(11)]) == [bytes(9), bytes(11)]
        assert self.kept([bytes(10), bytes(21)]) == [bytes(21)]


def test_a_defect_of_the_server_is_answered_by_its_name_only():
    class Broken:
        max_batch_bytes = 100

        def open(self, data):
            raise ZeroDivisionError("internal detail")

    with TestClient(create_app(Broken()), raise_server_exceptions=False) as http:
        for _ in range(MAX_WAITING_JOBS + 1):
            response = http.post("/jobs", content=b"batch")
            assert response.status_code == 500 and "ZeroDivisionError" in response.json()["message"] and "detail" not in response.text


class TestSlowClients:
    """A client is given up after a silence, not while its bytes arrive or leave, however long that takes. Here 0.04 s are bearable and 0.06 s are not."""

    @pytest.fixture
    def clock(self, monkeypatch):
        """Seconds that pass only here."""
        clock = SimpleNamespace(seconds=0.0)
        monkeypatch.setattr("hf_he.service.time", SimpleNamespace(monotonic=lambda: clock.seconds))
        return clock

    @pytest.fixture
    def asked(self):
        """A job whose worker waits for the answer to a question of three pieces."""
        job = Job(dict, silence_seconds=0.05)
        with ThreadPoolExecutor(1) as worker:
            job.answered = worker.submit(job.ask, bytes(3 * PIECE_BYTES))
            yield job
            job.cancel()

    def test_an_answer_that_arrives_slowly(self, clock, asked):
        asked.next(5)
        with asked.answer(1) as take:
            for part in (b"a ", b"slow ", b"answer"):
                clock.seconds += 0.04
                take(part)
                assert not asked.abandoned
        assert asked.answered.result() == b"a slow answer"

    def test_a_question_that_leaves_slowly(self, clock, asked):
        left = []

        async def send(message):
            clock.seconds += 0.04
            left.append(message.get("body", b""))

        asyncio.run(event_response(asked, 5)({"type": "http", "asgi": {"spec_version": "2.4"}}, None, send))
        assert b"".join(left) == bytes(3 * PIECE_BYTES) and len(left) >= 4
        assert not asked.abandoned

    def test_an_answer_that_stops_arriving(self, clock, asked):
        asked.next(5)
        with asked.answer(1) as take:
            take(b"a ")
            clock.seconds += 0.06
            with pytest.raises(RefreshError, match="did not answer"):
                asked.answered.result()


class TestJob:
    """The mailbox between the worker thread and the polling client."""

    def test_a_refresh_request_is_repeated_until_it_is_answered_once(self):
        job = Job(dict)
        answers = []
        worker = threading.Thread(target=lambda: answers.append(job.ask(b"question")))
        worker.start()
        first, again = job.next(5), job.next(5)
        assert (first.name, first.body, first.sequence) == ("refresh", b"question", 1) and again == first
        answer(job, 1, b"answer")
        answer(job, 1, b"late duplicate")
        worker.join()
        assert answers == [b"answer"]

    def test_a_repeated_answer_is_dropped_as_it_arrives(self):
        job = Job(dict)
        with ThreadPoolExecutor(1) as worker:
            asked = worker.submit(job.ask, b"question")
            job.next(5)
            answer(job, 1, b"answer")
            assert asked.result() == b"answer"
        part = bytes(1000)
        references = sys.getrefcount(part)
        with job.answer(1) as take:
            take(part)
            assert sys.getrefcount(part) == references

    def test_a_cancelled_job_lets_go_of_what_has_arrived(self):
        job, part = Job(dict), bytes(1000)
        references = sys.getrefcount(part)
        with ThreadPoolExecutor(1) as worker:
            asked = worker.submit(job.ask, b"question")
            job.next(5)
            with pytest.raises(RefreshError, match="cancelled"), job.answer(1) as take:
                take(part)
                job.cancel()
                with pytest.raises(RefreshError, match="cancelled"):
                    asked.result()
                assert sys.getrefcount(part) == references
                take(part)

    def test_unasked_answers_are_refused(self):
        job = Job(dict)
        for sequence in (-1, 0, 1):
            with pytest.raises(RefreshError, match="no refresh number"):
                answer(job, sequence, b"")

    def test_a_silent_client_ends_the_wait(self):
        with pytest.raises(RefreshError, match="did not answer"):
            Job(dict, silence_seconds=0.05).ask(b"question")

    def test_cancelling_ends_the_wait(self):
        job = Job(dict)
        threading.Timer(0.05, job.cancel).start()
        with pytest.raises(RefreshError, match="cancelled"):
            job.ask(b"question")

    def test_progress_when_nothing_else_happens(self):
        job = Job(lambda: {"state": "running"})
        assert job.next(0).body == {"state": "waiting"}
        job.started = True
        assert job.next(0).body == {"state": "running"}
