"""The server: a public model and evaluation keys, running the model on ciphertexts. It never holds a secret key."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from hf_he.backends import Ciphertext, get_backend
from hf_he.checkpoints import load_classifier, model_fingerprint
from hf_he.errors import CorruptFileError, ParameterError, RefreshError, SecretKeyOnServerError
from hf_he.keys import ServerKeys
from hf_he.measurement import peak_memory_bytes
from hf_he.packing import Packing
from hf_he.planner import make_plan, packing_widths
from hf_he.protocol import MAX_BATCHES, SEQUENCE_LENGTH, EncryptedBatch, EncryptedResult, Identity, max_batches, widest_batch
from hf_he.refresh import BootstrapRefresh, ClientRefresh
from hf_he.serialization import peek
from hf_he.tensor import EncryptedSession, EncryptedTensor

REFRESH_POLICIES = ("client", "bootstrap")

Refresh = Callable[[bytes], bytes]
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """A checked batch, ready to run: `embeddings` [batches, blocks] and `attention_mask` [batches, 1] with `features` per ciphertext."""

    batches: int
    features: int
    batch_id: str
    embeddings: Ciphertext = field(repr=False)
    attention_mask: Ciphertext = field(repr=False)


class Server:
    """Runs a sequence classifier on encrypted batches.

    `model` is a folder with a polynomial-mode checkpoint, `evaluation_keys` a file, its bytes, or `keys.evaluation`. Anything that is or
    holds a secret key raises SecretKeyOnServerError. Refresh policy "client" sends exhausted ciphertexts back for re-encryption; "bootstrap"
    raises BackendUnavailableError until the backend can do it. Batches may be packed in any way that the keys suffice for (`sessions`).
    """

    tokens = SEQUENCE_LENGTH

    def __init__(self, model: str | Path, evaluation_keys: str | Path | bytes | ServerKeys, *, refresh: str = "client") -> None:
        keys = ServerKeys.load(evaluation_keys, "the server", bootstrapping=refresh == "bootstrap")
        if refresh not in REFRESH_POLICIES:
            raise ParameterError(f"unknown refresh policy {refresh!r}: choose one of {', '.join(REFRESH_POLICIES)}")
        self.backend = get_backend(keys.backend, keys.parameters)
        policy = BootstrapRefresh(self.backend) if refresh == "bootstrap" else ClientRefresh(self._ask_client)
        self.model, fingerprint = self._load(model)
        self.identity = Identity(keys.backend, keys.parameters.fingerprint, fingerprint, keys.key_id)
        self.backend.load_evaluation_keys(keys.evaluation)
        config = self.model.config
        self.packing = Packing.fit(keys.parameters.slots, packing_widths(config)[0], self.tokens)
        self.session = EncryptedSession(self.backend, self.packing, policy)
        self._place()
        self._blocks = self.packing.blocks(config.hidden_size)
        self._busy = threading.Lock()
        self._client: Refresh | None = None
        self._position: dict[str, Any] = {"state": "idle"}

    def _load(self, model: str | Path) -> tuple[torch.nn.Module, str]:
        """The model in polynomial mode and its fingerprint."""
        return load_classifier(model), model_fingerprint(model)

    def _place(self) -> None:
        self.session.place(self.model, make_plan(self.model, self.backend.parameters, self.packing).levels)

    @cached_property
    def sessions(self) -> dict[int, EncryptedSession]:
        """By features per ciphertext: every packing of the model whose rotations the keys cover."""
        found = {self.packing.features: self.session}
        keys, parameters = self.backend.evaluation_keys, self.backend.parameters
        for width in packing_widths(self.model.config)[1:]:
            packing = Packing.fit(parameters.slots, width, self.tokens)
            plan = make_plan(self.model, parameters, packing)
            if all(step in keys.rotations and keys.levels.get(step, parameters.max_level) >= level for step, level in plan.rotations.items()):
                found[width] = EncryptedSession(self.backend, packing, self.session.refresh)
                found[width].place(self.model, plan.levels)
        return found

    def describe(self) -> dict[str, Any]:
        """What is served, JSON-ready."""
        parameters = self.backend.parameters
        return {
            "server": "hf_he",
            **self.identity.to_metadata(),
            "security_bits": parameters.security_bits,
            "ring_degree": parameters.ring_degree,
            "sequences_per_batch": self.packing.sequences,
            "features_per_ciphertext": list(self.sessions),
            "max_batches": MAX_BATCHES,
        }

    @property
    def _ciphertext_bytes(self) -> int:
        parameters = self.backend.parameters
        return 2 * 8 * parameters.ring_degree * (parameters.max_level + 1)

    @property
    def max_batch_bytes(self) -> int:
        """No valid encrypted batch is larger."""
        return max(self._batch_bytes(session.packing) for session in self.sessions.values())

    def _batch_bytes(self, packing: Packing) -> int:
        config = self.model.config
        return max_batches(config, packing) * (packing.blocks(config.hidden_size) + 1) * self._ciphertext_bytes + 2**20

    @property
    def max_refresh_bytes(self) -> int:
        """No valid answer to a refresh request is larger."""
        widest = max(widest_batch(self.model.config, session.packing) for session in self.sessions.values())
        return widest * self._ciphertext_bytes + 2**20

    def progress(self) -> dict[str, Any]:
        """Where a running job is: state, batch, batches, operations done in this batch and the current kind of operation."""
        trace = self.backend.log.trace
        done = len(trace)
        now = {"operations": done - self._position.get("start", 0), "operation": trace[done - 1].scope if done else "other"}
        return {key: value for key, value in self._position.items() if key != "start"} | now

    def open(self, data: bytes) -> Work:
        """Check encrypted-batch bytes completely. Raises CorruptFileError, ParameterError, ModelMismatchError or WrongKeyError."""
        if message_kind(data) == "secret_key":
            raise SecretKeyOnServerError("a secret-key file was sent to the server: consider that key lost, and generate new keys with `hf-he keygen`")
        batch = EncryptedBatch.from_bytes(data)
        batch.identity.check(self.identity, "encrypted batch")
        self._check_packing(batch)
        blocks = self.sessions[batch.features].packing.blocks(self.model.config.hidden_size)
        embeddings = self._ciphertext(batch.embeddings, (batch.batches, blocks), "embeddings")
        mask = self._ciphertext(batch.attention_mask, (batch.batches, 1), "attention mask")
        return Work(batch.batches, batch.features, batch.batch_id, embeddings, mask)

    def _check_packing(self, batch: EncryptedBatch) -> None:
        if batch.features not in self.sessions:
            offered = " or ".join(map(str, self.sessions))
            raise ParameterError(
                f"the encrypted batch is packed with {batch.features} features per ciphertext, this server and its keys take {offered}: encrypt with "
                "--features of one of them, or generate keys again"
            )
        most = max_batches(self.model.config, self.sessions[batch.features].packing)
        if batch.batches > most:
            raise ParameterError(f"{batch.batches} packed batches of {batch.features} features per ciphertext were sent, a message holds {most}: split it")

    def run(self, work: Work, refresh: Refresh, progress: Progress | None = None) -> bytes:
        """Encrypted-result bytes for checked work. `refresh` takes and returns ciphertext bytes; one run at a time."""
        return self._locked(refresh, partial(self._classified, work, progress))

    def _locked(self, refresh: Refresh, work: Callable[[], bytes]) -> bytes:
        """`work()` with the backend's log and the client's refresh function to itself."""
        with self._busy:
            self.backend.log.reset()
            self._client = refresh
            try:
                return work()
            finally:
                self._client = None
                self._position = {"state": "idle"}

    def _classified(self, work: Work, progress: Progress | None) -> bytes:
        before = self.session.refresh.count
        start = time.perf_counter()
        logits, batch_seconds = self._forward(work, progress)
        report = self._report(time.perf_counter() - start, batch_seconds, self.session.refresh.count - before)
        return EncryptedResult(self.identity, work.batches, work.features, work.batch_id, self.backend.serialize(logits), report).to_bytes()

    def infer(self, data: bytes, refresh: Refresh, progress: Progress | None = None) -> bytes:
        """`open` and `run`: the interface that `hf_he.connect(url)` offers for a server in another process."""
        return self.run(self.open(data), refresh, progress)

    def _forward(self, work: Work, progress: Progress | None) -> tuple[Ciphertext, list[float]]:
        logits, seconds = [], []
        policy = self.session.refresh
        for first in range(0, work.batches, policy.lanes):
            self._position = {"state": "running", "batch": first + 1, "batches": work.batches, "start": len(self.backend.log.trace)}
            if progress:
                progress(self.progress())
            start = time.perf_counter()
            lanes = range(first, min(first + policy.lanes, work.batches))
            logits += policy.turns.run([partial(self._classify, work, index) for index in lanes])
            seconds += [(time.perf_counter() - start) / len(lanes)] * len(lanes)
        return self.backend.stack(logits), seconds

    def _classify(self, work: Work, index: int) -> Ciphertext:
        session = self.sessions[work.features]
        hidden = session.hidden_state(self.backend.take(work.embeddings, index), self.model.config.hidden_size)
        mask = session.attention_mask(self.backend.take(work.attention_mask, index))
        with torch.no_grad():
            output: EncryptedTensor = self.model(embedding_output=hidden, attention_mask=mask).logits
            return output.ciphertext

    def _ask_client(self, data: bytes) -> bytes:
        if self._client is None:
            raise RefreshError("a refresh was needed outside of a run: call Server.infer with a refresh function")
        return self._client(data)

    def _ciphertext(self, data: bytes, shape: tuple[int, ...], what: str) -> Ciphertext:
        ciphertext = self.backend.deserialize(data, "ciphertext")
        parameters = self.backend.parameters
        if ciphertext.batch_shape != shape or ciphertext.components != 2 or ciphertext.level != parameters.max_level:
            found = f"{ciphertext.batch_shape} at level {ciphertext.level}"
            raise CorruptFileError(f"the {what} must be fresh ciphertexts of shape {shape}, got {found}: encrypt again")
        if ciphertext.scale != parameters.scale_at(parameters.max_level):
            raise CorruptFileError(f"the {what} carries a scale that encryption does not produce: encrypt again")
        self.identity.check(Identity(self.identity.backend, self.identity.parameters, self.identity.model, ciphertext.key_id), what)
        return ciphertext

    def _report(self, seconds: float, batch_seconds: list[float], refreshes: int) -> dict[str, Any]:
        """Measurements since the log was reset, JSON-ready; refreshes count where they are round trips."""
        log = self.backend.log
        return {
            "backend": self.backend.name,
            "security_bits": self.backend.parameters.security_bits,
            "seconds": seconds,
            "seconds_by_batch": batch_seconds,
            "by_op": log.by_op(),
            "by_primitive": log.by_primitive(),
            "operations": log.operations(),
            "refreshes": refreshes if isinstance(self.session.refresh, ClientRefresh) else 0,
            "bootstraps": log.operations().get("bootstrap", 0),
            "peak_memory_bytes": peak_memory_bytes(),
            "trace": [[entry.scope, entry.primitive, entry.level, entry.count] for entry in log.trace],
        }


def message_kind(data: bytes) -> str:
    """The kind a container names, "" for anything else."""
    try:
        return peek(data)[0]
    except CorruptFileError:
        return ""
