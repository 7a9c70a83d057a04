"""The smallest backend that keeps the contract, as a model for another one: slots in plaintext, as value * scale, in numpy. It protects nothing.

Levels, scales, checks, counts and traces come from HEBackend; an adapter holds keys, bytes, and one method per primitive on payloads that fit.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_he.backends.base import Ciphertext, EvaluationKeys, HEBackend, Plaintext
from hf_he.errors import BackendUnavailableError, CorruptFileError, ParameterError, SecretKeyOnServerError
from hf_he.secret_key import SecretKeyBase, new_key_id
from hf_he.serialization import pack, unpack_for


class PublicKey:
    def __init__(self, key_id: str, fingerprint: str) -> None:
        self.key_id, self.fingerprint = key_id, fingerprint


class FifthBackend(HEBackend):
    name = "fifth"

    # ---- keys ----
    def generate_secret_key(self) -> SecretKeyBase:
        return SecretKeyBase(new_key_id(), self.parameters.fingerprint)

    def generate_public_key(self, secret_key: SecretKeyBase) -> PublicKey:
        self._check_fingerprint(secret_key)
        return PublicKey(secret_key.key_id, secret_key.fingerprint)

    def generate_evaluation_keys(
        self, secret_key, rotations, *, conjugation=False, bootstrapping=False, bootstrapping_slots=0, progress=None
    ) -> EvaluationKeys:
        self._check_fingerprint(secret_key)
        if bootstrapping:
            raise BackendUnavailableError("the fifth backend does not bootstrap: use --refresh client")
        return EvaluationKeys(None, secret_key.key_id, frozenset(self._levels_of(rotations)), conjugation)

    # ---- bytes ----
    def serialize(self, item: Any, *, allow_secret: bool = False) -> bytes:
        metadata = {"backend": self.name, "parameters": json.dumps(self.parameters.to_dict()), "fingerprint": self.parameters.fingerprint}
        metadata |= {"key_id": item.key_id, "salt": secrets.token_hex(8)}
        if isinstance(item, Ciphertext):
            metadata |= {"level": str(item.level), "scale": item.scale.hex(), "components": str(item.components)}
            return pack("ciphertext", {"slots": item.payload}, metadata)
        if isinstance(item, EvaluationKeys):
            metadata["conjugation"] = str(int(item.conjugation))
            return pack("evaluation_keys", {"rotations": np.array(sorted(item.rotations), dtype=np.int64)}, metadata)
        if isinstance(item, SecretKeyBase) and not allow_secret:
            raise SecretKeyOnServerError("serialising a secret key needs allow_secret=True")
        return pack("secret_key" if isinstance(item, SecretKeyBase) else "public_key", {}, metadata)

    def deserialize(self, data: bytes, kind: str) -> Any:
        arrays, metadata = unpack_for(data, kind, self.name, self.parameters.fingerprint)
        try:
            if kind == "ciphertext":
                slots, level = arrays["slots"].copy(), int(metadata["level"])
                self._check_level(level)
                return Ciphertext(slots, slots.shape[:-1], level, float.fromhex(metadata["scale"]), metadata["key_id"], int(metadata["components"]))
            if kind == "evaluation_keys":
                return EvaluationKeys(None, metadata["key_id"], frozenset(arrays["rotations"].tolist()), metadata["conjugation"] == "1")
        except (KeyError, ValueError):
            raise CorruptFileError(f"this {kind} file misses or garbles a field") from None
        if kind not in ("secret_key", "public_key"):
            raise ParameterError(f"unknown kind {kind!r}")
        return {"secret_key": SecretKeyBase, "public_key": PublicKey}[kind](metadata["key_id"], self.parameters.fingerprint)

    def save_bootstrapping_keys(self, keys: EvaluationKeys, folder) -> int:
        raise BackendUnavailableError("the fifth backend does not bootstrap: use --refresh client")

    def load_bootstrapping_keys(self, keys: EvaluationKeys, folder) -> EvaluationKeys:
        raise BackendUnavailableError("the fifth backend does not bootstrap: use --refresh client")

    # ---- primitives: a payload is [*batch, slots] ----
    def _encode(self, values: np.ndarray, level: int, scale: float) -> np.ndarray:
        return np.tile(np.rint(values * scale), self.parameters.slots // values.shape[-1])

    def _encrypt(self, values: np.ndarray, key: Any, level: int, scale: float) -> np.ndarray:
        return np.rint(values * scale)

    def _decrypt(self, ct: Ciphertext, secret_key: SecretKeyBase) -> np.ndarray:
        return ct.payload / ct.scale

    def _add(self, a: Ciphertext, b: Ciphertext | Plaintext) -> np.ndarray:
        return a.payload + b.payload

    def _subtract(self, a: Ciphertext, b: Ciphertext) -> np.ndarray:
        return a.payload - b.payload

    def _negate(self, a: Ciphertext) -> np.ndarray:
        return -a.payload

    _add_plain = _add

    def _add_scalar(self, a: Ciphertext, value: float) -> np.ndarray:
        return a.payload + round(value * a.scale)

    def _sum(self, a: Ciphertext) -> np.ndarray:
        return a.payload.sum(0)

    def _multiply(self, a: Ciphertext, b: Ciphertext | Plaintext) -> np.ndarray:
        return a.payload * b.payload

    _multiply_plain = _multiply

    def _multiply_plain_sum(self, plain: Plaintext, a: Ciphertext) -> np.ndarray:
        return np.einsum("gks,k...s->g...s", plain.payload, a.payload)

    def _multiply_integer(self, a: Ciphertext, value: int) -> np.ndarray:
        return a.payload * float(value)

    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> np.ndarray:
        return np.tensordot(weights.astype(np.float64), a.payload, axes=1)

    def _relinearize(self, a: Ciphertext) -> np.ndarray:
        return a.payload

    def _rescale(self, a: Ciphertext) -> np.ndarray:
        return np.rint(a.payload / self.parameters.moduli[a.level])

    def _drop_level(self, a: Ciphertext, level: int) -> np.ndarray:
        return a.payload

    def _rotate(self, a: Ciphertext, steps: tuple[int, ...]) -> np.ndarray:
        return np.stack([np.roll(a.payload, -step, axis=-1) for step in steps])

    def _sum_rotated(self, a: Ciphertext, steps: tuple[int, ...]) -> np.ndarray:
        return sum(np.roll(row, -step, axis=-1) for row, step in zip(a.payload, steps, strict=True))

    def _conjugate(self, a: Ciphertext) -> np.ndarray:
        return a.payload

    def _bootstrap(self, a: Ciphertext, divisor: int = 1) -> np.ndarray:
        raise NotImplementedError("HEBackend.bootstrap refuses: `bootstraps` is False")

    def _take(self, a: Ciphertext, index: int | slice) -> np.ndarray:
        return a.payload[index]

    def _stack(self, items: Sequence[Ciphertext]) -> np.ndarray:
        return np.stack([item.payload for item in items])

    def _reshape(self, a: Ciphertext, batch_shape: tuple[int, ...]) -> np.ndarray:
        return a.payload.reshape(*batch_shape, self.parameters.slots)
