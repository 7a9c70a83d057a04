"""What crosses the wire: encrypted batches, encrypted results, errors by name, and the identities that must match.

Every message names the backend, the CKKS parameters, the model and the key pair it was made for. A mismatch is found before any
computation and raised as the class that says what to change: ModelMismatchError, WrongKeyError or ParameterError.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_he import errors
from hf_he.errors import CorruptFileError, HEError, ModelMismatchError, ParameterError, WrongKeyError
from hf_he.packing import Packing, ScoreLayout
from hf_he.refresh import LARGEST_REFRESH
from hf_he.serialization import pack, quoted, unpack

BATCH_KIND = "encrypted_batch"
RESULT_KIND = "encrypted_result"
MAX_BATCHES = 256
MAX_CIPHERTEXTS = 512
"""Of one message."""
SEQUENCE_LENGTH = 32
EVENT_HEADER = "X-HF-HE-Event"
SEQUENCE_HEADER = "X-HF-HE-Sequence"
MAX_ERROR_CHARACTERS = 4000

_NAME = re.compile(r"[a-z0-9_]{1,32}")
_HEX = re.compile(r"[0-9a-f]{16}")
_NUMBER, _NUMBERS, _TABLE, _LIST, _TEXT = "a number", "a list of numbers", "a table of numbers", "a list", "a name"
_REPORT = {
    "backend": _TEXT, "security_bits": _NUMBER, "seconds": _NUMBER, "seconds_by_batch": _NUMBERS, "by_op": _TABLE, "by_primitive": _TABLE,
    "operations": _TABLE, "refreshes": _NUMBER, "bootstraps": _NUMBER, "peak_memory_bytes": _NUMBER, "trace": _LIST,
}  # fmt: skip


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
        patterns = {"backend": _NAME, "parameter_fingerprint": _HEX, "model_fingerprint": _HEX, "key_id": _HEX}
        for name, pattern in patterns.items():
            if not pattern.fullmatch(metadata.get(name, "")):
                raise CorruptFileError(f"the message does not name its {name}: write it again with this version of hf_he")
        return cls(*(metadata[name] for name in patterns))


@dataclass(frozen=True)
class EncryptedBatch:
    """Sentences on their way to the server: `batches` ciphertexts-worth of embeddings and attention masks, as backend bytes.

    `embeddings` holds one ciphertext tensor [batches, hidden / c], `attention_mask` one of [batches, 1], with c `features` per ciphertext.
    """

    identity: Identity
    batches: int
    features: int
    embeddings: bytes = field(repr=False)
    attention_mask: bytes = field(repr=False)
    batch_id: str = field(default_factory=lambda: secrets.token_hex(8))

    def to_bytes(self) -> bytes:
        arrays = {"embeddings": as_array(self.embeddings), "attention_mask": as_array(self.attention_mask)}
        numbers = {"batches": str(self.batches), "features": str(self.features)}
        return pack(BATCH_KIND, arrays, {**self.identity.to_metadata(), "batch_id": self.batch_id, **numbers})

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedBatch:
        arrays, metadata = unpack(data, BATCH_KIND)
        batches, features = small_number(metadata, "batches"), _features(metadata)
        parts = as_bytes(arrays, "embeddings"), as_bytes(arrays, "attention_mask")
        return cls(Identity.from_metadata(metadata), batches, features, *parts, _batch_id(metadata))


@dataclass(frozen=True)
class EncryptedResult:
    """Logits on their way back, one ciphertext tensor [batches, blocks] of `features` each, with the server's measurements (`report`, JSON-ready)."""

    identity: Identity
    batches: int
    features: int
    batch_id: str
    logits: bytes = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    def to_bytes(self) -> bytes:
        arrays = {"logits": as_array(self.logits), "report": as_array(json.dumps(self.report).encode())}
        numbers = {"batches": str(self.batches), "features": str(self.features)}
        return pack(RESULT_KIND, arrays, {**self.identity.to_metadata(), "batch_id": self.batch_id, **numbers})

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedResult:
        arrays, metadata = unpack(data, RESULT_KIND)
        batches, features = small_number(metadata, "batches"), _features(metadata)
        return cls(Identity.from_metadata(metadata), batches, features, _batch_id(metadata), as_bytes(arrays, "logits"), read_report(arrays))


def read_report(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The server's measurements inside a message. Raises CorruptFileError when an entry is missing or of another type."""
    try:
        report = json.loads(as_bytes(arrays, "report"))
    except (ValueError, RecursionError):
        raise CorruptFileError("the report inside the result is not JSON: run the inference again") from None
    for name, kind in _REPORT.items():
        if not isinstance(report, dict) or not _is(kind, report.get(name)):
            raise CorruptFileError(f"{name} of the report inside the result is not {kind}: client and server need the same version of hf_he")
    return report


def error_to_json(error: BaseException) -> dict[str, str]:
    """Class name and message of an hf_he error. Anything else is reported without its text, which belongs in the server's log."""
    if isinstance(error, HEError):
        return {"error": type(error).__name__, "message": str(error).encode("utf-8", "backslashreplace").decode()}
    return {"error": "HEError", "message": f"internal error in the server ({type(error).__name__}): see the server's log"}


def error_from_json(data: Any) -> HEError:
    """The typed error a server reported, its message shortened and without control characters."""
    name, message = (data.get("error"), data.get("message")) if isinstance(data, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(message, str):
        return HEError(f"the server answered with something that is not an hf_he error: {quoted(data)}")
    message = "".join(character for character in message[:MAX_ERROR_CHARACTERS] if character.isprintable() or character == "\n")
    found = getattr(errors, name, None)
    return found(message) if isinstance(found, type) and issubclass(found, HEError) else HEError(message)


def max_batches(config: Any, packing: Packing) -> int:
    """Packed batches that one message may hold."""
    return min(MAX_BATCHES, max(1, MAX_CIPHERTEXTS // (packing.blocks(config.hidden_size) + 1)))


def widest_batch(config: Any, packing: Packing) -> int:
    """Ciphertexts in the widest message that asks for a refresh of a state of the model, or of the scores of one feature block."""
    hidden, wide = map(packing.blocks, (config.hidden_size, config.intermediate_size))
    scores = packing.tokens if packing.features == 1 else ScoreLayout(packing, config.num_attention_heads // hidden).ciphertexts
    return min(LARGEST_REFRESH, max(hidden, wide, scores))


def _is(kind: str, value: Any) -> bool:
    if kind == _NUMBER:
        return type(value) in (int, float) and abs(value) < 2.0**63 and math.isfinite(value)
    if kind == _TEXT:
        return isinstance(value, str) and _NAME.fullmatch(value) is not None
    if kind == _TABLE:
        return isinstance(value, dict) and all(_is(_TEXT, name) and _is(_NUMBER, number) for name, number in value.items())
    return isinstance(value, list) and (kind == _LIST or all(_is(_NUMBER, number) for number in value))


def as_array(data: bytes) -> np.ndarray:
    """Bytes as an array of a container."""
    return np.frombuffer(data, dtype=np.uint8)


def as_bytes(arrays: dict[str, np.ndarray], name: str) -> bytes:
    """The inverse. Raises CorruptFileError for a missing or other array."""
    array = arrays.get(name)
    if array is None or array.dtype != np.uint8 or array.ndim != 1:
        raise CorruptFileError(f"the message holds no {name!r}: write it again with this version of hf_he")
    return array.tobytes()


def small_number(metadata: dict[str, str], name: str) -> int:
    """A number of batches, 1 to MAX_BATCHES, out of metadata. Raises CorruptFileError for anything else."""
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= MAX_BATCHES):
        raise CorruptFileError(f"the message's {name} must be a number from 1 to {MAX_BATCHES}: split the input into smaller files, or write it again")
    return int(text)


def _features(metadata: dict[str, str]) -> int:
    text = metadata.get("features", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and int(text) >= 1):
        raise CorruptFileError("the message does not say how many features a ciphertext holds: write it again with this version of hf_he")
    return int(text)


def _batch_id(metadata: dict[str, str]) -> str:
    text = metadata.get("batch_id", "")
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise CorruptFileError("the message's batch_id is not 16 hex digits: write it again with this version of hf_he")
    return text
