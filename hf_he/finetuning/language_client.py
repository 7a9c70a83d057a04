"""The training client of a decoder: windows of a private text, the secret key, and the loss.

training = LanguageTrainingClient(generation_client, settings, run, seed=0)
training.keygen()
server.infer(training.setup(), training.text_answers(0, *no_windows(context)))
data = training.encrypt_windows(1, windows, lengths)
answers = training.text_answers(1, windows, lengths)
server.infer(data, answers); answers.loss
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
from hf_he.finetuning.protocol import StepResult
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

    def read_report(self, data: bytes, step: int, windows: int) -> dict[str, Any]:
        """The server's measurements of a finished step. Raises the typed errors of an answer that does not fit."""
        result: StepResult = self.opened_result(data, step, len(self.micro_batches(windows)))
        return result.report


class TextAnswers(Answers):
    """Answers refresh requests and the questions about the loss of one step; `loss` is its mean over the predicted tokens."""

    def __init__(self, training: LanguageTrainingClient, step: int, rows: Sequence[Sequence[int]], windows: torch.Tensor, lengths: torch.Tensor) -> None:
        super().__init__(training, step, rows, [])
        self._windows, self._lengths = windows, lengths
        self._summed: dict[int, float] = {}

    @property
    def loss(self) -> float:
        return sum(self._summed.values()) / int((self._lengths - 1).sum())

    def check(self) -> None:
        """Raise RangeError when a refreshed value had to be clipped, or a hidden state was not a number."""
        super().check()
        if not np.isfinite(list(self._summed.values())).all():
            raise RangeError("the loss of this step is not finite: calibrate the model's ranges on text like this, or do not trust the server")

    def _loss(self, values: np.ndarray, batch: int) -> np.ndarray:
        """The gradient of the summed loss in the last hidden states of micro-batch `batch`; lanes that hold copies have none."""
        training, packing, rows = self._training, self._training.packing, list(self._rows[batch])
        features = training.client.model.config.hidden_size
        hidden = torch.from_numpy(unpack_state(values, packing, features, len(rows)).copy()).requires_grad_()
        summed, _ = next_token_loss(training.head(hidden), self._windows[rows], self._lengths[rows])
        summed.backward()
        self._summed[batch] = float(summed.detach())
        gradient = np.zeros((packing.sequences, packing.tokens, features))
        gradient[: len(rows)] = hidden.grad.numpy()
        return pack_embeddings(gradient, packing)


def no_windows(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a message that is no step."""
    return torch.zeros(0, tokens, dtype=torch.long), torch.zeros(0, dtype=torch.long)
