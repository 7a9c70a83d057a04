"""One model on several server processes, each with its share of the encoded weights: for cards, or machines, too small for all of them.

`torchrun --nproc_per_node 2 -m hf_he serve ...` starts one process per rank. All ranks run the same model on the same ciphertexts; of every linear map each
encodes and computes its own output blocks only (feature blocks, or features where a ciphertext holds one), likewise of activations, and where a
ciphertext holds one feature of attention its own heads. The blocks are gathered as serialised ciphertexts by the collectives of data parallel training.
Only the first rank talks to clients, for the others too where they refresh scores of their own heads; what these answer it passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hf_he.backends import Ciphertext, HEBackend
from hf_he.errors import CheckpointError, HEError, RefreshError
from hf_he.finetuning.parallel import Workers, share
from hf_he.keys import ServerKeys
from hf_he.server import Progress, Refresh, Server, Work

FAILED = b"failed"


class Shards:
    """Divides independent parts of an operation among ranks. Every rank must call the same operations in the same order, one at a time.

    `client` answers a refresh request on all ranks alike: the first one asks and passes the answer on.
    """

    def __init__(self, backend: HEBackend, workers: Workers) -> None:
        self._backend = backend
        self._workers = workers
        self.client: Callable[[bytes], bytes] | None = None
        self._alone = self._known = False

    def concatenate(self, parts: int, compute: Callable[[range], Ciphertext]) -> Ciphertext:
        """[parts, ...] of `compute(own)` [len(own), ...], `own` being each rank's share of range(parts), on every rank.

        Ranks may `ask` while they compute, each as often as it needs to; operations that are divided inside of another run whole. Raises HEError on all
        ranks when one of them fails.
        """
        if self._alone:
            return compute(range(parts))
        backend, workers = self._backend, self._workers
        own = share(parts, workers.rank, workers.size)
        self._alone, self._known = True, False
        try:
            data = backend.serialize(compute(own)) if own else b""
        except BaseException:
            if not self._known:
                workers.all_gather(FAILED)
            raise
        finally:
            self._alone = False
        while self._round(b""):
            pass
        found = [backend.deserialize(data, "ciphertext") for data in workers.all_gather(data) if data]
        return backend.stack([backend.take(part, i) for part in found for i in range(part.batch_shape[0])])

    def ask(self, question: bytes) -> bytes:
        """The client's answer: to all ranks' one question, or, while each computes its own parts, to this rank's."""
        return self._round(question)[self._workers.rank] if self._alone else self.client(question)

    def _round(self, question: bytes) -> dict[int, bytes]:
        """Answers by rank; ranks that are done, or have none now, pass an empty question."""
        questions = self._workers.all_gather(question)
        self._known = True
        if FAILED in questions:
            raise HEError(f"rank {questions.index(FAILED)} could not compute its share: see its error, then send the batch again")
        answers = {rank: self.client(data) for rank, data in enumerate(questions) if data}
        self._known = False
        return answers


@dataclass(frozen=True)
class ShardedWork(Work):
    """Work with the bytes it came from, which the other ranks get."""

    data: bytes = field(repr=False, default=b"")


class ShardedServer(Server):
    """A Server whose weights are divided among the ranks of `workers`. The first rank serves; the others `follow`."""

    def __init__(self, model: str | Path, evaluation_keys: str | Path | bytes | ServerKeys, *, workers: Workers, refresh: str = "client") -> None:
        super().__init__(model, evaluation_keys, refresh=refresh)
        self._workers = workers
        self._shards = Shards(self.backend, workers)
        for session in self.sessions.values():
            session.shards = self._shards

    def open(self, data: bytes) -> ShardedWork:
        return ShardedWork(**vars(super().open(data)), data=data)

    def run(self, work: ShardedWork, refresh: Refresh, progress: Progress | None = None) -> bytes:
        """As Server.run, on all ranks; `progress` is not called, because a run that one rank abandons would leave the others waiting."""
        self._workers.broadcast(work.data)

        def shared(question: bytes) -> bytes:
            try:
                answer = refresh(question)
            except BaseException:
                self._workers.broadcast(b"")
                raise
            return self._workers.broadcast(answer)

        self._shards.client = shared
        return super().run(work, self._shards.ask)

    def follow(self) -> None:
        """What the other ranks do as long as there is a first one: the same runs with the same answers. Errors are the first rank's to report."""
        self._shards.client = self._answer
        while data := self._next():
            try:
                super().run(self.open(data), self._shards.ask)
            except HEError:
                continue

    def _next(self) -> bytes:
        try:
            return self._workers.broadcast(b"")
        except CheckpointError:
            return b""

    def _answer(self, question: bytes) -> bytes:
        answer = self._workers.broadcast(b"")
        if not answer:
            raise RefreshError("the first rank got no answer from its client")
        return answer
