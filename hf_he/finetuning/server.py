"""The training server: a public model, evaluation keys, and an encrypted adapter it never sees. It never holds a secret key.

    server = FinetuneServer(model, keys.evaluation, "run/server")
    answer = server.infer(setup.to_bytes(), refresh)           # the interface of hf_he.Server, over HTTP too (`hf-he serve --finetune`)
    answer = server.infer(step.to_bytes(), refresh)

Step n is accepted after step n - 1 is on the disk. A repeated request for the last finished step is answered from the checkpoint, any other is
refused, so a client may always ask again. Encrypted batches of `hf_he.Client` are classified with the adapter as it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_he.backends import Ciphertext
from hf_he.checkpoints import load_classifier
from hf_he.errors import CheckpointError, CorruptFileError, HEError, ParameterError, TrainingError
from hf_he.finetuning.checkpoint import Checkpoint, CheckpointStore
from hf_he.finetuning.parallel import Workers
from hf_he.finetuning.protocol import (
    LOSS,
    OPTIMIZER,
    REQUEST_KIND,
    SETUP_KIND,
    STEP_KIND,
    AdapterRequest,
    EncryptedAdapterMessage,
    Question,
    StepResult,
    TrainingSettings,
    TrainingSetup,
    TrainingStep,
)
from hf_he.finetuning.step import MicroBatch, TrainingRun
from hf_he.handlers.attention import mask_power
from hf_he.keys import ServerKeys
from hf_he.packing import Packing, pack_attention_mask
from hf_he.planner import packing_widths
from hf_he.protocol import BATCH_KIND, MAX_BATCHES, max_batches
from hf_he.server import Progress, Refresh, Server, message_kind
from hf_he.tensor import EncryptedSession


@dataclass(frozen=True)
class SetupWork:
    """A checked setup."""

    message: TrainingSetup = field(repr=False)
    weights: Ciphertext = field(repr=False)


@dataclass(frozen=True)
class StepWork:
    """A checked step: ciphertexts `embeddings` and `labels` [batches, blocks], the others [batches, 1]; `attention_mask` is an array where masks are public.
    A decoder has embeddings only."""

    message: Any = field(repr=False)
    embeddings: Ciphertext = field(repr=False)
    attention_mask: Any = field(repr=False, default=None)
    labels: Ciphertext | None = field(repr=False, default=None)
    sequence_weights: Ciphertext | None = field(repr=False, default=None)


class FinetuneServer(Server):
    """Trains LoRA adapters on encrypted examples; `folder` keeps its checkpoints.

    `announce` receives a line when a damaged checkpoint was passed over. `workers` is the group of ranks that share each step; rank r > 0
    keeps its checkpoints in `folder`/rank-r. Raises CheckpointError when the folder is in use or holds nothing readable, and the errors of `hf_he.Server`.
    """

    step_kind = STEP_KIND

    def __init__(
        self,
        model: str | Path,
        evaluation_keys: str | Path | bytes | ServerKeys,
        folder: str | Path,
        *,
        refresh: str = "client",
        announce: Callable[[str], None] = lambda text: None,
        workers: Workers | None = None,
    ) -> None:
        super().__init__(model, evaluation_keys, refresh=refresh)
        self.workers = workers or Workers()
        self._directory = model
        self._run: TrainingRun | None = None
        self._checkpoint: Checkpoint | None = None
        folder = Path(folder) if self.workers.first else Path(folder) / f"rank-{self.workers.rank}"
        self._store = CheckpointStore(folder, announce)
        self._resume()

    def close(self) -> None:
        """Release the checkpoint folder."""
        self._store.close()

    def describe(self) -> dict[str, Any]:
        """As `Server.describe`, with the run and its last finished step."""
        found = self._checkpoint
        training = {"step": -1} if found is None else {"step": found.step, **found.run.to_metadata()}
        return super().describe() | {"training": training, "rank": self.workers.rank, "workers": self.workers.size}

    @property
    def sessions(self) -> dict[int, EncryptedSession]:
        """Only that of the adapter, which is encrypted for one packing."""
        return {self.packing.features: self.session}

    @property
    def max_batch_bytes(self) -> int:
        """No valid message is larger."""
        config, labels = self.model.config, self.packing.blocks(self.model.config.num_labels)
        return max_batches(config, self.packing) * (self._blocks + labels + 2) * self._ciphertext_bytes + 2**20

    @property
    def max_refresh_bytes(self) -> int:
        """No valid answer to a refresh request or a question is larger."""
        dense = 0 if self._run is None else self._run.layout.count
        return max(super().max_refresh_bytes, 4 * max(dense, 1) * self._ciphertext_bytes + 2**20)

    def open(self, data: bytes) -> Any:
        """Check a message completely. Raises CorruptFileError, ParameterError, ModelMismatchError, WrongKeyError or TrainingError."""
        kind = message_kind(data)
        if kind == SETUP_KIND:
            message = TrainingSetup.from_bytes(data)
            message.identity.check(self.identity, "training setup")
            self._check_new(message)
            return SetupWork(message, self.backend.deserialize(message.weights, "ciphertext"))
        if kind == self.step_kind:
            return self._open_step(data)
        if kind == REQUEST_KIND:
            request = AdapterRequest.from_bytes(data)
            request.identity.check(self.identity, "adapter request")
            request.run.check(self._started().run)
            return request
        if kind == BATCH_KIND or kind == "secret_key":
            return super().open(data)
        raise CorruptFileError("this is not a message to a training server: client and server need the same version of hf_he")

    def run(self, work: Any, refresh: Refresh, progress: Progress | None = None) -> bytes:
        """The answer to checked work. `refresh` also answers the questions of a step that runs partly on the client."""
        if isinstance(work, SetupWork):
            return self._locked(refresh, partial(self._set_up, work))
        if isinstance(work, StepWork):
            return self._locked(refresh, partial(self._step, work, progress))
        if isinstance(work, AdapterRequest):
            return self._adapter_message()
        return super().run(work, refresh, progress)

    def _classified(self, work: Any, progress: Progress | None) -> bytes:
        if self._run is not None:
            self._run.prepare()
        return super()._classified(work, progress)

    # ---- beginning and resuming ----
    def _resume(self) -> None:
        found = self._store.load()
        steps = [int(part) for part in self.workers.all_gather(str(-1 if found is None else found.step).encode())]
        if min(steps) < 0 <= max(steps):
            raise CheckpointError("some ranks have checkpoints and some have none: resume with as many processes as the run began with")
        if found is None:
            return
        if found.step != min(steps):
            found = self._store.load(min(steps))
        found.identity.check(self.identity, "checkpoint")
        self._begin(found)

    def _begin(self, checkpoint: Checkpoint) -> None:
        """Load the run of a checkpoint."""
        read = partial(self.backend.deserialize, kind="ciphertext")
        packing = self._packing_of(checkpoint.settings)
        session = EncryptedSession(self.backend, packing, self.session.refresh)
        run = self._new_run(session, checkpoint.settings)
        run.load(self._dense(read(checkpoint.weights), run), {name: self._dense(read(data), run) for name, data in checkpoint.state.items()} or None)
        self.session, self.model, self._run, self._checkpoint = session, run.model, run, checkpoint
        self.packing, self._blocks = packing, packing.blocks(run.model.config.hidden_size)

    def _packing_of(self, settings: TrainingSettings) -> Packing:
        widths = packing_widths(self.model.config)
        if settings.features not in (0, *widths):
            raise ParameterError(f"this model is packed with {' or '.join(map(str, widths))} features per ciphertext, not {settings.features}: begin again")
        return Packing.fit(self.backend.parameters.slots, settings.features or widths[0], self.tokens)

    def _new_run(self, session: EncryptedSession, settings: TrainingSettings) -> TrainingRun:
        return TrainingRun(session, load_classifier(self._directory), settings)

    def _set_up(self, work: SetupWork) -> bytes:
        message = work.message
        if self._checkpoint is None or self._checkpoint.step == 0:
            checkpoint = Checkpoint(self.identity, message.run, 0, message.settings, message.weights, {})
            before = self._run, self._checkpoint, self.session, self.model, self.packing, self._blocks
            try:
                self._begin(checkpoint)
                self._store.save(checkpoint)
            except HEError:
                self._run, self._checkpoint, self.session, self.model, self.packing, self._blocks = before
                raise
        return self._adapter_message()

    def _check_new(self, message: TrainingSetup) -> None:
        found = self._checkpoint
        if found is None:
            return
        if found.run.run != message.run.run or found.step > 0:
            raise TrainingError(f"the server's folder holds run {found.run.run} at step {found.step}: resume it, or start the server with an empty folder")

    def _dense(self, ciphertext: Ciphertext, run: TrainingRun) -> Ciphertext:
        """Dense ciphertexts of the adapter, as setup, checkpoints and the client's optimiser give them."""
        self._check_canonical(ciphertext, "adapter")
        if ciphertext.batch_shape != (run.layout.count,):
            raise CorruptFileError(f"this adapter takes {run.layout.count} ciphertexts, got a batch of {ciphertext.batch_shape}: begin the run again")
        return ciphertext

    def _check_canonical(self, ciphertext: Ciphertext, what: str) -> None:
        self.identity.check(replace(self.identity, key_id=ciphertext.key_id), what)
        scale = self.backend.parameters.scale_at(ciphertext.level)
        if ciphertext.components != 2 or abs(ciphertext.scale / scale - 1) > 1e-9:
            raise CorruptFileError(f"the {what} carries a scale or shape that hf_he does not produce: encrypt again")

    def _started(self) -> Checkpoint:
        if self._checkpoint is None:
            raise TrainingError("no run has begun on this server: send a training setup first")
        return self._checkpoint

    def _adapter_message(self) -> bytes:
        found = self._started()
        return EncryptedAdapterMessage(self.identity, found.run, found.step, found.weights).to_bytes()

    # ---- a step ----
    def _check_step(self, message: Any) -> TrainingSettings:
        """The run's settings, once `message` is known to be a step of it that may be taken now."""
        found = self._started()
        message.identity.check(self.identity, "training step")
        message.run.check(found.run)
        if message.step not in (found.step, found.step + 1):
            raise TrainingError(f"step {message.step} was sent, step {found.step} is the last one finished: resume from step {found.step + 1}")
        if message.sequences > found.settings.sequences:
            raise TrainingError(f"{message.sequences} examples in a step of {found.settings.sequences}: client and server disagree about the batch size")
        return found.settings

    def _open_step(self, data: bytes) -> StepWork:
        message = TrainingStep.from_bytes(data)
        settings, packing, batches = self._check_step(message), self.packing, message.batches
        if settings.public_padding_mask != (message.public_mask is not None):
            raise TrainingError("padding masks are public in this run's settings or they are not: client and server disagree")
        mask = message.public_mask
        if mask is None:
            mask = self._ciphertext(message.attention_mask, (batches, 1), "attention mask")
        elif mask.shape[1:] != (packing.sequences, packing.tokens):
            raise CorruptFileError(f"public padding masks are [batches, {packing.sequences}, {packing.tokens}], got {mask.shape}: encrypt again")
        return StepWork(
            message,
            self._ciphertext(message.embeddings, (batches, self._blocks), "embeddings"),
            mask,
            self._ciphertext(message.labels, (batches, packing.blocks(self._run.num_labels)), "labels"),
            self._ciphertext(message.sequence_weights, (batches, 1), "sequence weights"),
        )

    def _step(self, work: StepWork, progress: Progress | None) -> bytes:
        message, found, run = work.message, self._started(), self._run
        if message.step == found.step:
            return found.answer
        if message.step != found.step + 1:
            raise TrainingError(f"step {message.step} was sent, step {found.step} is the last one finished: resume from step {found.step + 1}")
        start, refreshes = time.perf_counter(), self.session.refresh.count
        try:
            run.prepare()
            logits, seconds = self._micro_batches(work, progress)
            part = run.gradient(message.sequences)
        except BaseException:
            run.forget()
            if self.workers.size > 1:
                self.workers.all_gather(b"")
            raise
        gradient = self.workers.all_reduce(self.backend, part)
        weights, state = self._update(message.step, gradient)
        report = self._report(time.perf_counter() - start, seconds, self.session.refresh.count - refreshes) | {"trace": []}
        answer = StepResult(self.identity, found.run, message.step, message.batches, self.backend.serialize(logits), report).to_bytes()
        serialized = {name: self.backend.serialize(value) for name, value in state.items()}
        checkpoint = replace(found, step=message.step, weights=self.backend.serialize(weights), state=serialized, answer=answer)
        self._store.save(checkpoint)
        run.load(weights, state)
        self._checkpoint = checkpoint
        return answer

    def _micro_batches(self, work: StepWork, progress: Progress | None) -> tuple[Ciphertext, list[float]]:
        logits: list[Ciphertext] = []
        seconds: list[float] = []
        policy, batches = self.session.refresh, work.message.batches
        for first in range(0, batches, policy.lanes):
            self._position = {"state": "running", "batch": first + 1, "batches": batches, "start": len(self.backend.log.trace)}
            if progress:
                progress(self.progress())
            start = time.perf_counter()
            lanes = range(first, min(first + policy.lanes, batches))
            logits += policy.turns.run([partial(self._micro_batch, work, index) for index in lanes])
            seconds += [(time.perf_counter() - start) / len(lanes)] * len(lanes)
        level = min(ct.level for ct in logits)
        return self.backend.stack([self.backend.match_level(ct, level) for ct in logits]), seconds

    def _micro_batch(self, work: StepWork, index: int) -> Ciphertext:
        take, mask = self.backend.take, work.attention_mask
        batch = MicroBatch(
            take(work.embeddings, index),
            take(mask, index) if isinstance(mask, Ciphertext) else pack_attention_mask(mask[index], self.packing, mask_power(self.model)),
            take(work.labels, index),
            take(work.sequence_weights, index),
        )
        ask = partial(self._question, LOSS, work.message.step, index) if self._run.settings.loss_location == "client" else None
        return self._run.micro_batch(batch, ask)

    def _update(self, step: int, gradient: Ciphertext) -> tuple[Ciphertext, dict[str, Ciphertext]]:
        """The first rank updates, or asks the client to; every rank gets the same bytes."""
        backend = self.backend
        if self.workers.size == 1:
            return self._updated(step, gradient)
        payload = b""
        if self.workers.first:
            try:
                weights, state = self._updated(step, gradient)
            except BaseException:
                self.workers.broadcast(b"")
                raise
            parts = {"": backend.serialize(weights)} | {name: backend.serialize(value) for name, value in state.items()}
            payload = json.dumps({name: len(part) for name, part in parts.items()}).encode() + b"\n" + b"".join(parts.values())
        payload = self.workers.broadcast(payload)
        if not payload:
            raise TrainingError("rank 0 could not update the adapter: see its error, then resume")
        head, _, body = payload.partition(b"\n")
        found, position = {}, 0
        for name, size in json.loads(head).items():
            found[name] = backend.deserialize(body[position : position + size], "ciphertext")
            position += size
        return found.pop(""), found

    def _updated(self, step: int, gradient: Ciphertext) -> tuple[Ciphertext, dict[str, Ciphertext]]:
        run = self._run
        if run.settings.optimizer_location == "server":
            self._position = {"state": "running", "batch": MAX_BATCHES, "batches": MAX_BATCHES, "start": len(self.backend.log.trace)}
            return run.update(gradient, step)
        return self._dense(self._question(OPTIMIZER, step, 0, gradient), run), {}

    def _question(self, about: str, step: int, batch: int, ciphertext: Ciphertext) -> Ciphertext:
        """Ask the client for a part of the step that runs there."""
        with self.backend.log.measure("client"):
            answer = self._ask_client(Question(about, step, batch, self.backend.serialize(ciphertext)).to_bytes())
            found = self.backend.deserialize(answer, "ciphertext")
        self._check_canonical(found, f"answer about the {about}")
        return found
