"""What crosses the wire: encrypted batches, encrypted results, errors by name, and the identities that must match.

Every message names the backend, the CKKS parameters, the model and the key pair it was made for. A mismatch is found before any
computation and raised as the class that says what to change: ModelMismatchError, WrongKeyError or ParameterError.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_he import errors
from hf_he.errors import CorruptFileError, HEError, ModelMismatchError, ParameterError, WrongKeyError
from hf_he.serialization import pack, unpack

BATCH_KIND = "encrypted_batch"
RESULT_KIND = "encrypted_result"
MAX_BATCHES = 256
SEQUENCE_LENGTH = 32
EVENT_HEADER = "X-HF-HE-Event"
SEQUENCE_HEADER = "X-HF-HE-Sequence"


@dataclass(frozen=True)
class Identity:
    """What a message was made for: backend name, parameter fingerprint, model fingerprint, id of the key pair."""

    backend: str
    parameters: str
    model: str
    key_id: str

    def check(self, expected: Identity, what: str) -> None:
        """Raise when this message does not fit `expected`, the identity of whoever received it."""
        if self.backend != expected.backend:
            raise ParameterError(f"the {what} was made with the {self.backend} backend, this side runs {expected.backend}: use one backend for both")
        if self.parameters != expected.parameters:
            raise ParameterError(
                f"the {what} was made for CKKS parameters {self.parameters}, this side uses {expected.parameters}: "
                "encrypt again with the keys the server was started with"
            )
        if self.model != expected.model:
            raise ModelMismatchError(
                f"the {what} was prepared for model {self.model}, this side holds {expected.model}: encrypt again with the folder of the model that is served"
            )
        if self.key_id != expected.key_id:
            raise WrongKeyError(
                f"the {what} belongs to key {self.key_id}, this side holds {expected.key_id}: use the secret and evaluation keys of one `hf-he keygen`"
            )

    def to_metadata(self) -> dict[str, str]:
        return {"backend": self.backend, "parameter_fingerprint": self.parameters, "model_fingerprint": self.model, "key_id": self.key_id}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> Identity:
        try:
            return cls(metadata["backend"], metadata["parameter_fingerprint"], metadata["model_fingerprint"], metadata["key_id"])
        except KeyError as error:
            raise CorruptFileError(f"the message does not name its {error.args[0]}: write it again with this version of hf_he") from None


@dataclass(frozen=True)
class EncryptedBatch:
    """Sentences on their way to the server: `batches` ciphertexts-worth of embeddings and attention masks, as backend bytes.

    `embeddings` holds one ciphertext tensor [batches, hidden / c], `attention_mask` one of [batches, 1].
    """

    identity: Identity
    batches: int
    embeddings: bytes = field(repr=False)
    attention_mask: bytes = field(repr=False)
    batch_id: str = field(default_factory=lambda: secrets.token_hex(8))

    def to_bytes(self) -> bytes:
        arrays = {"embeddings": _as_array(self.embeddings), "attention_mask": _as_array(self.attention_mask)}
        return pack(BATCH_KIND, arrays, {**self.identity.to_metadata(), "batch_id": self.batch_id, "batches": str(self.batches)})

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedBatch:
        arrays, metadata = unpack(data, BATCH_KIND)
        batches = _small_number(metadata, "batches")
        return cls(Identity.from_metadata(metadata), batches, _as_bytes(arrays, "embeddings"), _as_bytes(arrays, "attention_mask"), _batch_id(metadata))


@dataclass(frozen=True)
class EncryptedResult:
    """Logits on their way back, one ciphertext tensor [batches, blocks], with the server's measurements (`report`, JSON-ready)."""

    identity: Identity
    batches: int
    batch_id: str
    logits: bytes = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    def to_bytes(self) -> bytes:
        arrays = {"logits": _as_array(self.logits), "report": _as_array(json.dumps(self.report).encode())}
        return pack(RESULT_KIND, arrays, {**self.identity.to_metadata(), "batch_id": self.batch_id, "batches": str(self.batches)})

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedResult:
        arrays, metadata = unpack(data, RESULT_KIND)
        try:
            report = json.loads(_as_bytes(arrays, "report"))
        except ValueError:
            raise CorruptFileError("the report inside the result is not JSON: run the inference again") from None
        batches = _small_number(metadata, "batches")
        return cls(Identity.from_metadata(metadata), batches, _batch_id(metadata), _as_bytes(arrays, "logits"), report)


def error_to_json(error: BaseException) -> dict[str, str]:
    """Class name and message of an hf_he error. Anything else is reported without its text, which belongs in the server's log."""
    if isinstance(error, HEError):
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "HEError", "message": f"internal error in the server ({type(error).__name__}): see the server's log"}


def error_from_json(data: Any) -> HEError:
    """The typed error a server reported."""
    name, message = (data.get("error"), data.get("message")) if isinstance(data, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(message, str):
        return HEError(f"the server answered with something that is not an hf_he error: {str(data)[:200]}")
    found = getattr(errors, name, None)
    return found(message) if isinstance(found, type) and issubclass(found, HEError) else HEError(message)


def _as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def _as_bytes(arrays: dict[str, np.ndarray], name: str) -> bytes:
    array = arrays.get(name)
    if array is None or array.dtype != np.uint8 or array.ndim != 1:
        raise CorruptFileError(f"the message holds no {name!r}: write it again with this version of hf_he")
    return array.tobytes()


def _small_number(metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= MAX_BATCHES):
        raise CorruptFileError(f"the message's {name} must be a number from 1 to {MAX_BATCHES}: split the input into smaller files, or write it again")
    return int(text)


def _batch_id(metadata: dict[str, str]) -> str:
    text = metadata.get("batch_id", "")
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise CorruptFileError("the message's batch_id is not 16 hex digits: write it again with this version of hf_he")
    return text
