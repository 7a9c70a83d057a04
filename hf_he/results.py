"""What an encrypted inference produced: sentences with both predictions, measurements, and the stable JSON contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_he.errors import CorruptFileError
from hf_he.measurement import peak_memory_bytes


@dataclass(frozen=True)
class Sentence:
    """One input. `plaintext_logits` come from polynomial mode on the client, `logits` from the ciphertexts; `refused` says why neither."""

    text: str
    label: int | None
    tokens: int
    truncated: bool
    refused: str | None = None
    plaintext_logits: tuple[float, ...] | None = None
    logits: tuple[float, ...] | None = None

    def with_logits(self, logits: Iterable[float]) -> Sentence:
        return replace(self, logits=tuple(float(value) for value in logits))

    @property
    def prediction(self) -> int | None:
        return _argmax(self.logits)

    @property
    def plaintext_prediction(self) -> int | None:
        return _argmax(self.plaintext_logits)

    @property
    def max_logit_error(self) -> float | None:
        if self.logits is None or self.plaintext_logits is None:
            return None
        return max(abs(a - b) for a, b in zip(self.logits, self.plaintext_logits, strict=True))

    def to_json(self) -> dict[str, Any]:
        computed = {"prediction": self.prediction, "plaintext_prediction": self.plaintext_prediction, "max_logit_error": self.max_logit_error}
        return asdict(self) | computed

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sentence:
        try:
            numbers = {name: None if data[name] is None else tuple(map(float, data[name])) for name in ("plaintext_logits", "logits")}
            types = {"text": str, "label": int | None, "tokens": int, "truncated": bool, "refused": str | None}
            if not all(isinstance(data[name], wanted) for name, wanted in types.items()):
                raise TypeError
            return cls(**{name: data[name] for name in types}, **numbers)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CorruptFileError("the notes of this batch are not readable: encrypt the sentences again") from None


@dataclass(frozen=True)
class InferenceResult:
    """Sentences with decrypted logits, the server's report, and what the client measured.

    `seconds` may hold keygen, encrypt and decrypt; `sizes` evaluation_keys, ciphertext_in and ciphertext_out (bytes). `setup_peak` is the peak
    memory of this process while there was no server process, if measured apart.
    """

    sentences: Sequence[Sentence]
    report: Mapping[str, Any] = field(repr=False)
    label_names: Mapping[int, str] = field(repr=False, default_factory=dict)
    seconds: Mapping[str, float] = field(repr=False, default_factory=dict)
    sizes: Mapping[str, int] = field(repr=False, default_factory=dict)
    setup_peak: int = field(repr=False, default=0)

    @property
    def answered(self) -> list[Sentence]:
        return [sentence for sentence in self.sentences if sentence.logits is not None]

    @property
    def labels(self) -> list[str | None]:
        """Predicted label names, None for refused sentences."""
        return [self.label_name(sentence.prediction) for sentence in self.sentences]

    @property
    def logits(self) -> list[tuple[float, ...] | None]:
        """Decrypted logits [num_labels] of each sentence, None for refused ones; of a regression, the number."""
        return [sentence.logits for sentence in self.sentences]

    def label_name(self, index: int | None) -> str | None:
        return None if index is None else self.label_names.get(index, str(index))

    @property
    def agreement(self) -> float | None:
        """Share of answered sentences whose encrypted prediction equals the plaintext polynomial one."""
        compared = [s for s in self.answered if s.plaintext_logits is not None]
        return _mean(s.prediction == s.plaintext_prediction for s in compared)

    @property
    def accuracy(self) -> float | None:
        """Share of answered sentences with a known label that are right; None when no label is known."""
        return _mean(s.prediction == s.label for s in self.answered if s.label is not None)

    @property
    def max_logit_error(self) -> float | None:
        return max((s.max_logit_error for s in self.answered if s.max_logit_error is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """The JSON contract of `hf-he demo --json` and `hf-he infer --json`. Unmeasured numbers are null."""
        report, seconds = self.report, dict(self.seconds)
        seconds.setdefault("keygen", None)
        server = report["seconds"]
        parts = [seconds.get("keygen"), seconds.get("encrypt"), server, seconds.get("decrypt")]
        seconds.setdefault("total", sum(part for part in parts if part is not None))
        client_peak, server_peak = peak_memory_bytes(), report["peak_memory_bytes"]
        return {
            "backend": report["backend"],
            "security_bits": report["security_bits"],
            "sentences": [sentence.to_json() for sentence in self.sentences],
            "agreement": self.agreement,
            "max_logit_error": self.max_logit_error,
            "accuracy": self.accuracy,
            "refused": sum(sentence.refused is not None for sentence in self.sentences),
            "seconds": seconds | {"server": server, "by_op": report["by_op"], "by_primitive": report["by_primitive"]},
            "operations": report["operations"],
            "refreshes": report["refreshes"],
            "bootstraps": report["bootstraps"],
            "peak_memory_gb": max(self.setup_peak, client_peak + server_peak) / 1e9,
            "peak_memory_gb_by_process": {"client": max(self.setup_peak, client_peak) / 1e9, "server": server_peak / 1e9},
            "bytes": {name: self.sizes.get(name) for name in ("evaluation_keys", "ciphertext_in", "ciphertext_out")},
        }


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reports of several messages as one: times and counts add up, the peak memory is the largest."""
    merged = dict(reports[0])
    for report in reports[1:]:
        for name in ("seconds", "refreshes", "bootstraps", "seconds_by_batch", "trace"):
            merged[name] = merged[name] + report[name]
        for name in ("by_op", "by_primitive", "operations"):
            merged[name] = dict(Counter(merged[name]) + Counter(report[name]))
        merged["peak_memory_bytes"] = max(merged["peak_memory_bytes"], report["peak_memory_bytes"])
    return merged


def _argmax(logits: tuple[float, ...] | None) -> int | None:
    return None if logits is None else max(range(len(logits)), key=logits.__getitem__)


def _mean(outcomes: Iterable[bool]) -> float | None:
    values = list(outcomes)
    return sum(values) / len(values) if values else None
