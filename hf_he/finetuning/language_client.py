"""The training client of a decoder: windows of a private text, the secret key, and the loss.

training = LanguageTrainingClient(generation_client, settings, run, seed=0)
training.keygen()
server.infer(training.setup(), training.text_answers(0, *no_windows(context)))
data = training.encrypt_windows(1, windows, lengths)
loss, report = training.read_step(server.infer(data, training.text_answers(1, windows, lengths)), 1, windows, lengths)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hf_he.errors import DataError, RangeError
from hf_he.finetuning.client import Answers, TrainingClient
from hf_he.finetuning.language_protocol import LanguageStep
from hf_he.finetuning.language_step import adapted_decoder, next_token_loss, plan_language_step
from hf_he.finetuning.plan import StepPlan
from hf_he.generation.model import load_decoder
from hf_he.generation.plan import generation_rotations
from hf_he.keys import Keys
from hf_he.packing import pack_embeddings, unpack_state
from hf_he.peft import HELoraConfig


class LanguageTrainingClient(TrainingClient):
    """As `TrainingClient`, of a `GenerationClient`; a step is windows [n, T] of token ids, T those of the packing, of which the first `lengths` count."""

    def _adapted(self) -> Any:
        return adapted_decoder(load_decoder(self.client.directory).double(), self.settings)

    @property
    def loss_blocks(self) -> int:
        """Of the last hidden states."""
        return self.packing.blocks(self.client.model.config.hidden_size)

    @property
    def lora(self) -> HELoraConfig:
        return HELoraConfig(r=self.settings.rank, target_modules=list(self.settings.target_modules))

    @cached_property
    def plan(self) -> StepPlan:
        """What a step of this run needs."""
        return plan_language_step(load_decoder(self.client.directory), self.backend.parameters, self.packing, self.settings)

    def keygen(self, progress: Callable[[int, int], None] | None = None) -> Keys:
        """Keys for the rotations of training, and of generation with the adapter encrypted as it then is."""
        rotations = generation_rotations(load_decoder(self.client.directory), self.backend.parameters, self.packing, self.client.max_tokens, self.lora)
        keys = Keys.generate(self.backend, rotations | set(self.plan.rotations), progress)
        self.client.use_keys(keys)
        return keys

    def encrypt_windows(self, step: int, windows: torch.Tensor, lengths: torch.Tensor) -> bytes:
        """A step's windows, `packing.sequences` to a micro-batch; what is left of the last one holds copies without a loss."""
        tokens = int((lengths - 1).sum())
        if not 1 <= tokens <= self.settings.sequences:
            raise DataError(f"a step of this run predicts 1 to {self.settings.sequences} tokens, these windows have {tokens}: use the run's batch size")
        with torch.no_grad():
            states = self.client.model.get_input_embeddings()(windows).numpy()
        parts = self.micro_batches(len(windows))
        embeddings = self._encrypted(np.stack([pack_embeddings(states[list(rows)], self.packing) for rows in parts]))
        return LanguageStep(self.client.identity, self.run, step, len(parts), tokens, embeddings).to_bytes()

    def text_answers(self, step: int, windows: torch.Tensor, lengths: torch.Tensor) -> TextAnswers:
        """Whoever answers the server while it computes this step."""
        return TextAnswers(self, step, self.micro_batches(len(windows)), windows, lengths)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of last hidden states [n, T, d], by the public head."""
        return self.model.get_base_model().get_output_embeddings()(hidden)

    def read_step(self, data: bytes, step: int, windows: torch.Tensor, lengths: torch.Tensor) -> tuple[float, dict[str, Any]]:
        """Mean loss of a predicted token before the update, from the last hidden states of a finished step, and the server's measurements.

        A server that repeats an answer asks nothing, so that the loss comes from the answer. Raises RangeError when it is not finite, and the typed errors
        of an answer that does not fit.
        """
        rows = self.micro_batches(len(windows))
        result = self.opened_result(data, step, len(rows))
        slots = self.backend.decrypt(self._own(result.logits, (len(rows), self.loss_blocks), "last hidden states"), self.client.keys.secret)
        with torch.no_grad():
            summed = sum(float(self.text_loss(values, windows[list(part)], lengths[list(part)])[1]) for values, part in zip(slots, rows, strict=True))
        if not np.isfinite(summed):
            raise RangeError("the loss of this step is not finite: calibrate the model's ranges on text like this, or do not trust the server")
        return summed / int((lengths - 1).sum()), result.report

    def text_loss(self, values: np.ndarray, windows: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states [n, T, d] of a micro-batch out of decrypted slots [blocks, slots], and the summed loss of their next tokens."""
        hidden = torch.from_numpy(unpack_state(values, self.packing, self.client.model.config.hidden_size, len(windows)).copy()).requires_grad_()
        return hidden, next_token_loss(self.head(hidden), windows, lengths)[0]


class TextAnswers(Answers):
    """Answers refresh requests and the questions about the loss of one step."""

    def __init__(self, training: LanguageTrainingClient, step: int, rows: Sequence[Sequence[int]], windows: torch.Tensor, lengths: torch.Tensor) -> None:
        super().__init__(training, step, rows, [])
        self._windows, self._lengths = windows, lengths

    def _loss(self, values: np.ndarray, batch: int) -> np.ndarray:
        """The gradient of the summed loss in the last hidden states of micro-batch `batch`; lanes that hold copies have none."""
        training, packing, rows = self._training, self._training.packing, list(self._rows[batch])
        hidden, summed = training.text_loss(values, self._windows[rows], self._lengths[rows])
        summed.backward()
        gradient = np.zeros((packing.sequences, *hidden.shape[1:]))
        gradient[: len(rows)] = hidden.grad.numpy()
        return pack_embeddings(gradient, packing)


def no_windows(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a message that is no step."""
    return torch.zeros(0, tokens, dtype=torch.long), torch.zeros(0, dtype=torch.long)
