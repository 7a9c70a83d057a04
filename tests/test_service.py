"""The parts of the HTTP service that need no model: the mailbox of a job and the reading of bodies."""

import asyncio
import threading
from contextlib import ExitStack
from typing import ClassVar

import pytest
from fastapi.testclient import TestClient

from hf_he.errors import RefreshError
from hf_he.service import MAX_WAITING_JOBS, IncompleteMessageError, Job, JobQueue, MessageTooLargeError, ServerBusyError, create_app, read_body


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


def test_a_defect_of_the_server_is_answered_by_its_name_only():
    class Broken:
        max_batch_bytes = 100

        def open(self, data):
            raise ZeroDivisionError("internal detail")

    with TestClient(create_app(Broken()), raise_server_exceptions=False) as http:
        for _ in range(MAX_WAITING_JOBS + 1):
            response = http.post("/jobs", content=b"batch")
            assert response.status_code == 500 and "ZeroDivisionError" in response.json()["message"] and "detail" not in response.text


class TestJob:
    """The mailbox between the worker thread and the polling client."""

    def test_a_refresh_request_is_repeated_until_it_is_answered_once(self):
        job = Job(dict)
        answers = []
        worker = threading.Thread(target=lambda: answers.append(job.ask(b"question")))
        worker.start()
        first, again = job.next(5), job.next(5)
        assert (first.name, first.body, first.sequence) == ("refresh", b"question", 1) and again == first
        job.answer(1, b"answer")
        job.answer(1, b"late duplicate")
        worker.join()
        assert answers == [b"answer"]

    def test_unasked_answers_are_refused(self):
        job = Job(dict)
        for sequence in (-1, 0, 1):
            with pytest.raises(RefreshError, match="no refresh number"):
                job.answer(sequence, b"")

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
