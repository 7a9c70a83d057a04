"""The queue of a server process, and the mailbox of a job."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import pytest

from hf_he.errors import RefreshError
from hf_he.jobs import MAX_WAITING_JOBS, Job, JobQueue, ServerBusyError, UnknownJobError


def answer(job, sequence, *parts):
    with job.answer(sequence) as take:
        for part in parts:
            take(part)


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
        monkeypatch.setattr("hf_he.jobs.MAX_KEPT_RESULTS", 2)
        assert self.kept([b"1", b"2", b"3", b"4"]) == [b"3", b"4"]

    def test_so_do_those_of_too_many_bytes_but_never_the_last(self, monkeypatch):
        monkeypatch.setattr("hf_he.jobs.MAX_KEPT_BYTES", 20)
        assert self.kept([bytes(10), bytes(9), bytes(11)]) == [bytes(9), bytes(11)]
        assert self.kept([bytes(10), bytes(21)]) == [bytes(21)]


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


class TestSlowClients:
    """A client is given up after a silence, not while its bytes arrive, however long that takes. Here 0.04 s are bearable and 0.06 s are not."""

    @pytest.fixture
    def clock(self, monkeypatch):
        """Seconds that pass only here."""
        clock = SimpleNamespace(seconds=0.0)
        monkeypatch.setattr("hf_he.jobs.time", SimpleNamespace(monotonic=lambda: clock.seconds))
        return clock

    @pytest.fixture
    def asked(self):
        """A job whose worker waits for an answer."""
        job = Job(dict, silence_seconds=0.05)
        with ThreadPoolExecutor(1) as worker:
            job.answered = worker.submit(job.ask, b"question")
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

    def test_an_answer_that_stops_arriving(self, clock, asked):
        asked.next(5)
        with asked.answer(1) as take:
            take(b"a ")
            clock.seconds += 0.06
            with pytest.raises(RefreshError, match="did not answer"):
                asked.answered.result()
