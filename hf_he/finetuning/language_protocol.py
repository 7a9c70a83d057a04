"""What crosses the wire when a decoder is fine-tuned on text; setup, adapter and results are those of hf_he.finetuning.protocol.

    language_step      embeddings of packed windows of text, encrypted    -> training_result, last hidden states and a report

The loss is the client's: in the middle of a step the server asks for the gradient in the last hidden states (Question about LOSS), one round per
micro-batch. The head is public, so the client has the logits of a vocabulary from one ciphertext, and nobody evaluates a softmax of a thousand classes on
ciphertexts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_he.finetuning.protocol import MAX_STEPS, RunId, whole_number
from hf_he.protocol import Identity, as_array, as_bytes, small_number
from hf_he.serialization import pack, unpack

LANGUAGE_STEP_KIND = "language_step"


@dataclass(frozen=True)
class LanguageStep:
    """One step's windows in `batches` micro-batches: `embeddings` [batches, blocks] ciphertexts. `sequences`: tokens that the step predicts."""

    identity: Identity
    run: RunId
    step: int
    batches: int
    sequences: int
    embeddings: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        numbers = {"step": str(self.step), "batches": str(self.batches), "sequences": str(self.sequences)}
        return pack(LANGUAGE_STEP_KIND, {"embeddings": as_array(self.embeddings)}, {**self.identity.to_metadata(), **self.run.to_metadata(), **numbers})

    @classmethod
    def from_bytes(cls, data: bytes) -> LanguageStep:
        arrays, metadata = unpack(data, LANGUAGE_STEP_KIND)
        return cls(
            Identity.from_metadata(metadata),
            RunId.from_metadata(metadata),
            whole_number(metadata, "step", 1, MAX_STEPS),
            small_number(metadata, "batches"),
            whole_number(metadata, "sequences", 1, 65536),
            as_bytes(arrays, "embeddings"),
        )
