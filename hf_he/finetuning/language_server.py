"""The training server of a decoder: as hf_he.finetuning.server, on windows of text instead of labelled sentences.

    server = LanguageFinetuneServer(model, keys.evaluation, "run/server", context=64)      # `hf-he serve --generate --finetune FOLDER`

The adapter it leaves is what a GenerationServer takes as it is (hf_he.generation.adapter), so that text is generated with weights nobody has decrypted.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_he.backends import Ciphertext
from hf_he.errors import CorruptFileError
from hf_he.finetuning.language_protocol import LANGUAGE_STEP_KIND, LanguageStep
from hf_he.finetuning.language_step import LanguageRun
from hf_he.finetuning.protocol import LOSS, TrainingSettings
from hf_he.finetuning.server import FinetuneServer, StepWork
from hf_he.finetuning.step import TrainingRun
from hf_he.generation.model import decoder_fingerprint, load_decoder
from hf_he.generation.server import DEFAULT_CONTEXT
from hf_he.protocol import BATCH_KIND
from hf_he.server import message_kind
from hf_he.tensor import EncryptedSession


class LanguageFinetuneServer(FinetuneServer):
    """Trains LoRA adapters of a decoder on encrypted text; `context`: token lanes of a ciphertext, the length of a window. The rest as `FinetuneServer`."""

    step_kind = LANGUAGE_STEP_KIND

    def __init__(self, *args: Any, context: int = DEFAULT_CONTEXT, **options: Any) -> None:
        self.tokens = context
        super().__init__(*args, **options)

    def open(self, data: bytes) -> Any:
        """As `FinetuneServer.open`; encrypted sentences are refused."""
        if message_kind(data) == BATCH_KIND:
            raise CorruptFileError("this server trains a decoder and classifies nothing: generate with its adapter on `hf-he serve --generate`")
        return super().open(data)

    def _load(self, model: str | Path) -> tuple[torch.nn.Module, str]:
        return load_decoder(model), decoder_fingerprint(model)

    def _place(self) -> None:
        """Decoders run at the defaults of hf_he.ops, demand by demand."""

    def _new_run(self, session: EncryptedSession, settings: TrainingSettings) -> TrainingRun:
        return LanguageRun(session, load_decoder(self._directory), settings)

    def _open_step(self, data: bytes) -> StepWork:
        message = LanguageStep.from_bytes(data)
        self._check_step(message)
        return StepWork(message, self._ciphertext(message.embeddings, (message.batches, self._blocks), "embeddings"))

    def _micro_batch(self, work: StepWork, index: int) -> Ciphertext:
        return self._run.text_batch(self.backend.take(work.embeddings, index), partial(self._gradient, work.message.step, index))

    def _gradient(self, step: int, index: int, hidden: Ciphertext) -> Ciphertext:
        answer = self._question(LOSS, step, index, self.backend.drop_level(hidden, 0))
        if answer.batch_shape != (self._blocks,):
            raise CorruptFileError(f"the gradient of the loss must be {self._blocks} ciphertexts, got a batch of {answer.batch_shape}")
        return answer
