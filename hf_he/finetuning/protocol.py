"""What crosses the wire in encrypted fine-tuning, and what the server is told in the clear (`TrainingSettings`).

    training_setup     settings, the encrypted initial adapter                                  -> encrypted_adapter, step 0
    training_step      micro-batches: embeddings, masks, labels, sequence weights, all encrypted -> training_result, encrypted logits and a report
    adapter_request                                                                              -> encrypted_adapter, the dense weights now
    training_question  from the server, where a part of the step runs on the client              -> a ciphertext

Every message names backend, parameters, model and key as in hf_he.protocol, and the run: a random number, and a keyed digest of the order
of the training examples that tells the server nothing about them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

import numpy as np

from hf_he.errors import CorruptFileError, ParameterError, TrainingError
from hf_he.protocol import Identity, as_array, as_bytes, read_report, small_number
from hf_he.serialization import pack, quoted, unpack

SETUP_KIND, STEP_KIND, STEP_RESULT_KIND = "training_setup", "training_step", "training_result"
REQUEST_KIND, ADAPTER_KIND, QUESTION_KIND = "adapter_request", "encrypted_adapter", "training_question"
LOSS, OPTIMIZER = "loss", "optimizer"
MAX_STEPS = 10_000_000
MAX_SETTINGS_BYTES = 2**16

_RUN = re.compile(r"[0-9a-f]{16}")
_ORDER = re.compile(r"[0-9a-f]{32}")
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,64}")
_AGAIN = "client and server need the same version of hf_he"


_ITEMS = {tuple[str, ...]: lambda item: isinstance(item, str), tuple[float, ...]: lambda item: type(item) is float and math.isfinite(item)}


@dataclass(frozen=True)
class TrainingSettings:
    """The public half of a run: what the server computes with, and therefore learns. Raises ParameterError for a value that makes no sense.

    `steps` is the length of the schedule, `sequences` the number of examples in a full step. `eps` and `divisor` are those of
    hf_he.finetuning.optimizer, `loss_bound` and `loss_degree` those of the softmax in hf_he.finetuning.loss. The client multiplies the sequences'
    weights by `loss_scale`, and packing the gradient divides by it: between them gradients are large beside the error of a bootstrap. `gradient_scales`,
    one per trained parameter in the adapter's order or none, bring the gradients of AdamW-HE to one size. `features` per ciphertext: 1 for batches of
    hundreds, 0 for as many as the model is usually packed with. `optimizer_location` and `loss_location` are "server" or "client"; with
    `public_padding_mask` the lengths of the texts are sent in the clear.
    """

    rank: int = 2
    target_modules: tuple[str, ...] = ("query", "key", "value")
    optimizer: str = "adamw"
    learning_rate: float = 4e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    steps: int = 10
    sequences: int = 16
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 2e-2
    divisor: float = 1.0
    weight_decay: float = 0.0
    loss_bound: float = 12.0
    loss_degree: int = 15
    loss_scale: float = 1.0
    gradient_scales: tuple[float, ...] = ()
    features: int = 0
    optimizer_location: str = "server"
    loss_location: str = "server"
    public_padding_mask: bool = False

    def __post_init__(self) -> None:
        choices = {
            "optimizer": ("adamw", "sgd"), "schedule": ("constant", "linear", "cosine"),
            "optimizer_location": ("server", "client"), "loss_location": ("server", "client"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ParameterError(f"{name} must be one of {', '.join(allowed)}, got {quoted(getattr(self, name))}")
        ranges = {
            "rank": (1, 64), "steps": (1, MAX_STEPS), "sequences": (1, 65536), "warmup_steps": (0, MAX_STEPS), "learning_rate": (1e-9, 100.0),
            "momentum": (0.0, 0.9999), "beta1": (0.0, 0.9999), "beta2": (0.0, 0.999999), "eps": (1e-12, 1e6), "divisor": (1e-9, 1e9),
            "weight_decay": (0.0, 0.9999), "loss_bound": (1.0, 100.0), "loss_degree": (3, 127),
            "loss_scale": (1.0, 2.0**16), "features": (0, 2**16),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ParameterError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
        if not all(1e-9 <= scale <= 1e9 for scale in self.gradient_scales):
            raise ParameterError("gradient_scales must be from 1e-9 to 1e9: calibrate them again")
        if self.gradient_scales and self.optimizer == "sgd":
            raise ParameterError("gradient_scales would change the learning rates of sgd: they belong to adamw")
        if not 1 <= len(self.target_modules) <= 16 or not all(_MODULE.fullmatch(name) for name in self.target_modules):
            raise ParameterError("target_modules must name 1 to 16 kinds of linear layers, such as query, key, value")

    def check(self, began: TrainingSettings) -> None:
        """Raise TrainingError when these are not the settings `began` of the run to resume."""
        for name, then in vars(began).items():
            if getattr(self, name) != then:
                raise TrainingError(
                    f"{name} is {getattr(self, name)!r} now and was {then!r} when the run began: resume with the arguments it began with, "
                    "or choose another output folder"
                )

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainingSettings:
        """Raises CorruptFileError for anything but the fields of this class with their types, ParameterError for values out of range."""
        try:
            values = json.loads(data) if len(data) <= MAX_SETTINGS_BYTES else None
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            values = {"features": 0} | values  # settings of earlier versions do not name them
        if not isinstance(values, dict) or values.keys() != {entry.name for entry in fields(cls)}:
            raise CorruptFileError(f"the training settings are not readable: {_AGAIN}")
        for name, hint in get_type_hints(cls).items():
            value = values[name]
            if hint is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
            elif hint in _ITEMS and isinstance(value, list) and all(_ITEMS[hint](item) for item in value):
                value = tuple(value)
            elif type(value) is not hint or (hint is float and not math.isfinite(value)):
                raise CorruptFileError(f"{name} of the training settings is of another type: {_AGAIN}")
            values[name] = value
        return cls(**values)


@dataclass(frozen=True)
class RunId:
    """Which training run, and in which order it takes its examples (a digest under a key that only the client has)."""

    run: str
    order: str

    def check(self, expected: RunId) -> None:
        """Raise TrainingError when a message belongs to another run than `expected`, the server's."""
        if self.run != expected.run:
            raise TrainingError(f"this message belongs to run {self.run}, the server trains {expected.run}: resume that run, or start with an empty folder")
        if self.order != expected.order:
            raise TrainingError("the data or their order changed since the run began: resume with the same data, batch size and seed")

    def to_metadata(self) -> dict[str, str]:
        return {"run": self.run, "order": self.order}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> RunId:
        run, order = metadata.get("run", ""), metadata.get("order", "")
        if not (_RUN.fullmatch(run) and _ORDER.fullmatch(order)):
            raise CorruptFileError(f"the message does not name its training run: {_AGAIN}")
        return cls(run, order)

    @staticmethod
    def step_of(metadata: dict[str, str]) -> int:
        return whole_number(metadata, "step", 0, MAX_STEPS)


@dataclass(frozen=True)
class TrainingSetup:
    """Begin a run: the settings and the encrypted dense weights [count] of the initial adapter."""

    identity: Identity
    run: RunId
    settings: TrainingSettings
    weights: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        arrays = {"settings": as_array(self.settings.to_bytes()), "weights": as_array(self.weights)}
        return pack(SETUP_KIND, arrays, {**self.identity.to_metadata(), **self.run.to_metadata()})

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainingSetup:
        arrays, metadata = unpack(data, SETUP_KIND)
        settings = TrainingSettings.from_bytes(as_bytes(arrays, "settings"))
        return cls(Identity.from_metadata(metadata), RunId.from_metadata(metadata), settings, as_bytes(arrays, "weights"))


@dataclass(frozen=True)
class TrainingStep:
    """One step's examples (or this rank's share of them) in `batches` micro-batches.

    `embeddings` and `labels` [batches, blocks] and `sequence_weights` [batches, 1] are ciphertexts, as is `attention_mask` [batches, 1] unless the
    run's padding masks are public: then `public_mask` holds them, [batches, sequences, tokens] of 0 and 1. `sequences` real examples
    take part in the step, over all ranks; unused lanes carry weight zero.
    """

    identity: Identity
    run: RunId
    step: int
    batches: int
    sequences: int
    embeddings: bytes = field(repr=False)
    labels: bytes = field(repr=False)
    sequence_weights: bytes = field(repr=False)
    attention_mask: bytes | None = field(repr=False, default=None)
    public_mask: np.ndarray | None = field(repr=False, default=None)

    def to_bytes(self) -> bytes:
        arrays = {name: as_array(getattr(self, name)) for name in ("embeddings", "labels", "sequence_weights")}
        if self.attention_mask is not None:
            arrays["attention_mask"] = as_array(self.attention_mask)
        if self.public_mask is not None:
            arrays["public_mask"] = np.asarray(self.public_mask, dtype=bool)
        numbers = {"step": str(self.step), "batches": str(self.batches), "sequences": str(self.sequences)}
        return pack(STEP_KIND, arrays, {**self.identity.to_metadata(), **self.run.to_metadata(), **numbers})

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainingStep:
        arrays, metadata = unpack(data, STEP_KIND)
        batches, mask = small_number(metadata, "batches"), arrays.get("public_mask")
        if mask is not None and (mask.dtype != bool or mask.ndim != 3 or len(mask) != batches):
            raise CorruptFileError(f"the public padding masks must be 0/1 of shape [batches, sequences, tokens]: {_AGAIN}")
        if ("attention_mask" in arrays) == (mask is not None):
            raise CorruptFileError(f"a training step carries either encrypted or public padding masks: {_AGAIN}")
        return cls(
            Identity.from_metadata(metadata),
            RunId.from_metadata(metadata),
            whole_number(metadata, "step", 1, MAX_STEPS),
            batches,
            whole_number(metadata, "sequences", 1, 65536),
            as_bytes(arrays, "embeddings"),
            as_bytes(arrays, "labels"),
            as_bytes(arrays, "sequence_weights"),
            as_bytes(arrays, "attention_mask") if mask is None else None,
            mask,
        )


@dataclass(frozen=True)
class StepResult:
    """A finished step: encrypted logits [batches, blocks] from before the update, and the server's measurements."""

    identity: Identity
    run: RunId
    step: int
    batches: int
    logits: bytes = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    def to_bytes(self) -> bytes:
        arrays = {"logits": as_array(self.logits), "report": as_array(json.dumps(self.report).encode())}
        return pack(STEP_RESULT_KIND, arrays, {**self.identity.to_metadata(), **self.run.to_metadata(), "step": str(self.step), "batches": str(self.batches)})

    @classmethod
    def from_bytes(cls, data: bytes) -> StepResult:
        arrays, metadata = unpack(data, STEP_RESULT_KIND)
        step, batches = whole_number(metadata, "step", 1, MAX_STEPS), small_number(metadata, "batches")
        return cls(Identity.from_metadata(metadata), RunId.from_metadata(metadata), step, batches, as_bytes(arrays, "logits"), read_report(arrays))


@dataclass(frozen=True)
class AdapterRequest:
    """Ask for the dense weights as they are now."""

    identity: Identity
    run: RunId

    def to_bytes(self) -> bytes:
        return pack(REQUEST_KIND, {}, {**self.identity.to_metadata(), **self.run.to_metadata()})

    @classmethod
    def from_bytes(cls, data: bytes) -> AdapterRequest:
        _, metadata = unpack(data, REQUEST_KIND)
        return cls(Identity.from_metadata(metadata), RunId.from_metadata(metadata))


@dataclass(frozen=True)
class EncryptedAdapterMessage:
    """The dense weights [count] after `step` steps."""

    identity: Identity
    run: RunId
    step: int
    weights: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        metadata = {**self.identity.to_metadata(), **self.run.to_metadata(), "step": str(self.step)}
        return pack(ADAPTER_KIND, {"weights": as_array(self.weights)}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedAdapterMessage:
        arrays, metadata = unpack(data, ADAPTER_KIND)
        return cls(Identity.from_metadata(metadata), RunId.from_metadata(metadata), RunId.step_of(metadata), as_bytes(arrays, "weights"))


@dataclass(frozen=True)
class Question:
    """Asked of the client in the middle of a step: the loss gradient of micro-batch `batch` from its logits, or fresh weights from a gradient."""

    about: str
    step: int
    batch: int
    ciphertext: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        return pack(QUESTION_KIND, {"ciphertext": as_array(self.ciphertext)}, {"about": self.about, "step": str(self.step), "batch": str(self.batch)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Question:
        arrays, metadata = unpack(data, QUESTION_KIND)
        about = metadata.get("about")
        if about not in (LOSS, OPTIMIZER):
            raise CorruptFileError(f"a question about {quoted(about)} came from the server: {_AGAIN}")
        return cls(about, whole_number(metadata, "step", 1, MAX_STEPS), whole_number(metadata, "batch", 0, 65536), as_bytes(arrays, "ciphertext"))


def whole_number(metadata: dict[str, str], name: str, low: int, high: int) -> int:
    """A decimal number within [low, high] out of metadata. Raises CorruptFileError for anything else."""
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise CorruptFileError(f"the message's {name} must be a number from {low} to {high}: {_AGAIN}")
    return int(text)
