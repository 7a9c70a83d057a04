"""The training client: examples, the secret key, and what a server may ask of it in the middle of a step.

training = TrainingClient(client, settings, run, seed=0)
training.keygen()
server.infer(training.setup(), training.answers(0, [], []))
messages = training.encrypt_step(1, texts, labels)           # one per rank of the server
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_he.checkpoints import load_classifier
from hf_he.client import Client, Refresher
from hf_he.errors import CorruptFileError, DataError, RangeError, RefreshError, TrainingError
from hf_he.finetuning.adapter import AdapterLayout
from hf_he.finetuning.loss import logit_spread
from hf_he.finetuning.parallel import share
from hf_he.finetuning.plan import StepPlan, plan_step
from hf_he.finetuning.protocol import (
    LOSS,
    QUESTION_KIND,
    AdapterRequest,
    EncryptedAdapterMessage,
    Question,
    RunId,
    StepResult,
    TrainingSettings,
    TrainingSetup,
    TrainingStep,
)
from hf_he.finetuning.schedule import learning_rate
from hf_he.finetuning.step import adapted_model, make_optimizer
from hf_he.keys import Keys
from hf_he.packing import pack_attention_mask, pack_embeddings, unpack_logits
from hf_he.planner import make_plan
from hf_he.protocol import max_batches, widest_batch
from hf_he.serialization import pack, read_file, unpack, write_file
from hf_he.server import message_kind

OPTIMIZER_KIND = "client_optimizer"


@dataclass(frozen=True)
class EncryptedStep:
    """One rank's share of a step: message bytes, and which examples (numbers within the step) its micro-batches hold, [] for one that only fills the rank."""

    data: bytes
    rows: tuple[tuple[int, ...], ...]


class TrainingClient:
    """Encrypts training examples for one run of `client`'s model, packed as `settings.features` say, and reads what comes back. `seed` draws the initial
    adapter.

    `folder` is where the moments are kept when the optimiser runs here (`settings.optimizer_location`); files in it are for this client's eyes only.
    """

    def __init__(self, client: Client, settings: TrainingSettings, run: RunId, seed: int = 0, folder: str | Path | None = None) -> None:
        self.client, self.settings, self.run = client, settings, run
        self.backend = client.backend
        self.packing = client.packings[settings.features] if settings.features else client.packing
        self.folder = None if folder is None else Path(folder)
        self.num_labels = client.model.config.num_labels
        torch.manual_seed(seed)
        self.model = self._adapted()
        self.layout = AdapterLayout.of(self.model, self.packing)
        self.optimizer = make_optimizer(settings)
        self._optimizer_states: dict[int, tuple[np.ndarray, Mapping[str, np.ndarray]]] = {}

    def _adapted(self) -> Any:
        return adapted_model(load_classifier(self.client.directory).double(), self.settings)

    @property
    def loss_blocks(self) -> int:
        """Ciphertexts that the server asks about where the loss is this client's part."""
        return self.packing.blocks(self.num_labels)

    @cached_property
    def plan(self) -> StepPlan:
        """What a step of this run needs."""
        return plan_step(load_classifier(self.client.directory), self.backend.parameters, self.packing, self.settings)

    def keygen(self, progress: Callable[[int, int], None] | None = None) -> Keys:
        """Keys for the rotations of training and of inference; those of bootstrapping are made by `Keys.save`, on the disk."""
        inference = make_plan(self.client.model, self.backend.parameters, self.packing)
        keys = Keys.generate(self.backend, set(inference.rotations) | set(self.plan.rotations), progress)
        self.client.use_keys(keys)
        return keys

    # ---- messages to the server ----
    def setup(self) -> bytes:
        """Settings and the initial adapter, encrypted."""
        weights = self.layout.pack(self.layout.values(self.model))
        self._remember(0, weights, {})
        return TrainingSetup(self.client.identity, self.run, self.settings, self._encrypted(weights)).to_bytes()

    def request(self) -> bytes:
        return AdapterRequest(self.client.identity, self.run).to_bytes()

    def encrypt_step(self, step: int, texts: Sequence[str], labels: Sequence[float], ranks: int = 1) -> list[EncryptedStep]:
        """A step's examples, `packing.sequences` to a micro-batch, the micro-batches shared among the server's ranks."""
        if not 1 <= len(texts) <= self.settings.sequences or len(texts) != len(labels):
            raise DataError(f"a step of this run takes 1 to {self.settings.sequences} examples with labels, got {len(texts)} and {len(labels)}")
        chunks = self.micro_batches(len(texts))
        parts = [[chunks[i] for i in share(len(chunks), rank, ranks)] or [()] for rank in range(ranks)]
        most = max_batches(self.client.model.config, self.packing)
        if max(map(len, parts)) > most:
            raise DataError(f"{len(texts)} examples are more than {most} micro-batches of {self.packing.sequences} for a server process: use a smaller batch")
        embeddings, masks = self.client.embed(list(texts))
        return [EncryptedStep(self._message(step, len(texts), part, embeddings, masks, labels), tuple(part)) for part in parts]

    def micro_batches(self, examples: int) -> list[tuple[int, ...]]:
        """Which examples of a step share a packing."""
        lanes = self.packing.sequences
        return [tuple(range(start, min(start + lanes, examples))) for start in range(0, examples, lanes)]

    def _message(
        self, step: int, sequences: int, chunks: Sequence[tuple[int, ...]], embeddings: np.ndarray, masks: np.ndarray, labels: Sequence[float]
    ) -> bytes:
        packing, lanes = self.packing, self.packing.sequences
        counted = min(self.num_labels, packing.features)
        filled = [list(chunk or (0,)) for chunk in chunks]
        public = self.settings.public_padding_mask
        mask = None if public else self._encrypted(np.stack([pack_attention_mask(masks[rows], packing, self.client.mask_power) for rows in filled]))
        lengths = np.stack([masks[rows][np.arange(lanes) % len(rows)] for rows in filled]).astype(bool) if public else None
        targets = [self._targets([labels[row] for row in chunk]) for chunk in chunks]
        weights = [self.on_first_tokens(np.full((len(chunk), counted), self.settings.loss_scale)) for chunk in chunks]
        return TrainingStep(
            self.client.identity,
            self.run,
            step,
            len(chunks),
            sequences,
            self._encrypted(np.stack([pack_embeddings(embeddings[rows], packing) for rows in filled])),
            self._encrypted(np.stack([self.on_first_tokens(target) for target in targets])),
            self._encrypted(np.stack(weights)),
            mask,
            lengths,
        ).to_bytes()

    def _targets(self, labels: Sequence[float]) -> np.ndarray:
        """[n, num_labels]: one-hot classes, or the numbers of a regression."""
        if self.num_labels == 1:
            return np.asarray(labels, dtype=np.float64).reshape(-1, 1)
        return np.eye(self.num_labels)[np.asarray(labels, dtype=np.int64)].reshape(-1, self.num_labels)

    def on_first_tokens(self, values: np.ndarray) -> np.ndarray:
        """[n, K] -> [blocks, slots]: row s in the first features of sequence s on token 0, zero elsewhere."""
        packing = self.packing
        slots = np.zeros((packing.tokens, packing.sequences, packing.blocks(values.shape[1]) * packing.features))
        slots[0, : len(values), : values.shape[1]] = values
        return np.moveaxis(slots.reshape(*slots.shape[:2], -1, packing.features), 2, 0).reshape(-1, packing.slots)

    def _encrypted(self, values: np.ndarray) -> bytes:
        return self.backend.serialize(self.backend.encrypt(values, self.client.keys.secret))

    # ---- answers to the server ----
    def answers(self, step: int, rows: Sequence[Sequence[int]], labels: Sequence[float]) -> Answers:
        """Whoever answers the server while it computes a step whose micro-batches hold these rows."""
        return Answers(self, step, rows, labels)

    def loss_gradient(self, logits: np.ndarray, labels: Sequence[float]) -> np.ndarray:
        """[n, K] loss_scale times the gradient of the summed loss: softmax minus one-hot, or twice the difference of a regression."""
        gradient = _softmax(logits) - self._targets(labels) if self.num_labels > 1 else 2.0 * (logits - self._targets(labels))
        return self.settings.loss_scale * gradient

    def learning_rate(self, step: int) -> float:
        """The public rate of a step."""
        settings = self.settings
        return learning_rate(settings.schedule, settings.learning_rate, step, settings.steps, settings.warmup_steps)

    def updated(self, step: int, gradient: np.ndarray) -> np.ndarray:
        """Dense weights after `step` from the dense gradient the server sent; repeated, it gives the same answer. Raises TrainingError out of turn."""
        weights, state = self._optimizer_state(step - 1)
        weights, state = self.optimizer.reference(weights, gradient, state, self.learning_rate(step), step)
        self._remember(step, weights, state)
        return weights

    def _remember(self, step: int, weights: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        if self.settings.optimizer_location != "client":
            return
        kept = self._optimizer_states.get(step - 1)
        self._optimizer_states = {step: (weights, state)} | ({} if kept is None else {step - 1: kept})
        if self.folder is not None:
            arrays = {"weights": weights, **{f"state.{name}": values for name, values in state.items()}}
            path = self.folder / f"optimizer-{step}"
            write_file(path, pack(OPTIMIZER_KIND, arrays, {"step": str(step), **self.run.to_metadata()}), secret=True)
            for old in self.folder.glob("optimizer-*"):
                if old.name not in (f"optimizer-{step}", f"optimizer-{step - 1}"):
                    old.unlink(missing_ok=True)

    def _optimizer_state(self, step: int) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        if step not in self._optimizer_states:
            path = None if self.folder is None else self.folder / f"optimizer-{step}"
            if path is None or not path.is_file():
                raise TrainingError(f"the optimiser runs on this client, which holds no state of step {step}: start the run again")
            arrays, metadata = unpack(read_file(path, "optimiser"), OPTIMIZER_KIND)
            if RunId.from_metadata(metadata) != self.run or "weights" not in arrays:
                raise TrainingError(f"{path} belongs to another run: start the run again in an empty folder")
            state = {name.removeprefix("state."): values for name, values in arrays.items() if name.startswith("state.")}
            self._optimizer_states[step] = arrays["weights"], state
        return self._optimizer_states[step]

    # ---- what comes back ----
    def read_result(self, data: bytes, step: int, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits [n, K] of this share's examples in the order of `rows`, and the server's report. Raises the typed errors of an answer that does not fit."""
        result = self.opened_result(data, step, len(rows))
        ciphertext = self._own(result.logits, (result.batches,), "logits")
        slots = self.backend.decrypt(ciphertext, self.client.keys.secret)
        logits = np.concatenate([unpack_logits(batch, self.packing, self.num_labels, len(part)) for batch, part in zip(slots, rows, strict=True)])
        if not np.isfinite(logits).all():
            raise CorruptFileError("the logits decrypt to numbers that are not finite (their scale is wrong): resume the run")
        return logits, result.report

    def opened_result(self, data: bytes, step: int, batches: int) -> StepResult:
        """The answer to a step, checked to be that of this step and run."""
        result = StepResult.from_bytes(data)
        result.identity.check(self.client.identity, "training result")
        result.run.check(self.run)
        if result.step != step or result.batches != batches:
            raise CorruptFileError(f"step {result.step} with {result.batches} micro-batches came back, not step {step} with {batches}: resume the run")
        return result

    def read_adapter(self, data: bytes) -> tuple[int, dict[str, torch.Tensor]]:
        """(step, decrypted adapter by parameter name)."""
        message = EncryptedAdapterMessage.from_bytes(data)
        message.identity.check(self.client.identity, "encrypted adapter")
        message.run.check(self.run)
        weights = self.backend.decrypt(self._own(message.weights, (self.layout.count,), "adapter"), self.client.keys.secret)
        if not np.isfinite(weights).all():
            raise CorruptFileError("the adapter decrypts to numbers that are not finite: the run is damaged, start it again")
        return message.step, self.layout.unpack(weights)

    def _own(self, data: bytes, leading: tuple[int, ...], what: str) -> Any:
        ciphertext = self.backend.deserialize(data, "ciphertext")
        self.client.identity.check(replace(self.client.identity, key_id=ciphertext.key_id), what)
        if ciphertext.batch_shape[: len(leading)] != leading:
            raise CorruptFileError(f"the {what} are a batch of {ciphertext.batch_shape}, {leading} was expected: resume the run")
        return ciphertext

    def loss(self, logits: np.ndarray, labels: Sequence[float]) -> float:
        """Mean loss, as transformers computes it. Raises RangeError when logits left the interval of the server's softmax."""
        if self.num_labels == 1:
            return float(np.mean((logits - self._targets(labels)) ** 2))
        if self.settings.loss_location == "server":
            spread, bound = np.abs(logit_spread(logits)).max(), self.settings.loss_bound
            if spread > bound:
                raise RangeError(f"loss: logits spread by {spread:.3g}, the softmax was fitted to {bound:g}: start again with a larger loss_bound")
        return float(-np.log(np.maximum(_softmax(logits)[np.arange(len(labels)), np.asarray(labels, dtype=np.int64)], 1e-300)).mean())


class Answers:
    """Answers refresh requests and questions of one step, as many as its plan says; `check` raises once the server is done."""

    def __init__(self, training: TrainingClient, step: int, rows: Sequence[Sequence[int]], labels: Sequence[float]) -> None:
        self._training, self._step, self._rows, self._labels = training, step, rows, labels
        self._answered: set[tuple[str, int]] = set()
        widest = max(training.plan.widest_refresh, widest_batch(training.client.model.config, training.packing))
        self._refresher = Refresher(training.backend, training.client.keys, training.plan.refreshes(len(rows)), widest)

    def __call__(self, data: bytes) -> bytes:
        if message_kind(data) != QUESTION_KIND:
            return self._refresher(data)
        training, question = self._training, Question.from_bytes(data)
        if question.about == LOSS:
            location, times = training.settings.loss_location, len(self._rows)
        else:
            location, times = training.settings.optimizer_location, 1
        if location != "client" or question.step != self._step or question.batch >= times:
            raise RefreshError(f"the server asked about the {question.about} of step {question.step}, which is not this client's part: do not trust it")
        if (question.about, question.batch) in self._answered:
            raise RefreshError(f"the server asked about the {question.about} of micro-batch {question.batch} twice: do not trust it, or report a bug")
        self._answered.add((question.about, question.batch))
        shape = (training.loss_blocks,) if question.about == LOSS else (training.layout.count,)
        ciphertext = training.backend.deserialize(question.ciphertext, "ciphertext")
        if ciphertext.batch_shape != shape:
            raise RefreshError(f"the server asked about a batch of {ciphertext.batch_shape}, {shape} was expected: do not trust it, or report a bug")
        values = self._refresher.decrypted(ciphertext)
        answer = self._loss(values, question.batch) if question.about == LOSS else training.updated(self._step, values)
        return training.backend.serialize(training.backend.encrypt(answer, training.client.keys.secret))

    def _loss(self, values: np.ndarray, batch: int) -> np.ndarray:
        """The gradient of micro-batch `batch` from its decrypted logits."""
        training, rows = self._training, self._rows[batch]
        logits = unpack_logits(values, training.packing, training.num_labels, len(rows))
        return training.on_first_tokens(training.loss_gradient(logits, [self._labels[row] for row in rows]))

    def check(self) -> None:
        """Raise RangeError when a value had to be clipped."""
        self._refresher.check()


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
