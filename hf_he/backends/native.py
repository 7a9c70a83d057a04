"""The native backend: hf_he.ckks on the CPU, behind the HEBackend contract."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hf_he.backends.base import Ciphertext, EvaluationKeys, HEBackend, Plaintext
from hf_he.ckks import files
from hf_he.ckks.bootstrapping import files as bootstrapping_files
from hf_he.ckks.bootstrapping.bootstrapper import Bootstrapper
from hf_he.ckks.bootstrapping.keys import BootstrappingKeys, generate_parts
from hf_he.ckks.bootstrapping.plan import BootstrapPlan
from hf_he.ckks.context import context_for
from hf_he.ckks.evaluator import Evaluator
from hf_he.ckks.jit import has_compiled
from hf_he.ckks.keys import PublicKey, SecretKey, SwitchingKeys
from hf_he.ckks.parameters import CKKSParameters
from hf_he.ckks.random import SEED_BYTES
from hf_he.errors import ParameterError, SecretKeyOnServerError, WrongKeyError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Residues:
    """A ciphertext payload: float64 residues [*batch, component, limb, N] in NTT domain.

    `seeds` [*batch, 32], present as long as component 1 is what they expand to, halve the size of its file.
    """

    values: np.ndarray
    seeds: np.ndarray | None = None


class NativeBackend(HEBackend):
    """RNS-CKKS in float64 vectors with two and more threads; N up to 2^16, parameters from hf_he.ckks.parameters."""

    name = "native"
    bootstraps = True
    evaluation_key_type = SwitchingKeys

    def __init__(self, parameters: CKKSParameters) -> None:
        super().__init__(parameters)
        self.context = context_for(parameters)
        self._evaluator = Evaluator(self.context)

    # ---- keys ----
    def generate_secret_key(self) -> SecretKey:
        if not has_compiled():
            logger.warning("Compiling the kernels of the native engine, once for this installation: about a minute of one idle core.")
        return SecretKey.generate(self.context)

    def generate_public_key(self, secret_key: SecretKey) -> PublicKey:
        self._check_fingerprint(secret_key)
        return PublicKey.generate(self.context, secret_key)

    def generate_evaluation_keys(
        self,
        secret_key: SecretKey,
        rotations: Iterable[int] | Mapping[int, int],
        *,
        conjugation: bool = False,
        bootstrapping: bool = False,
        bootstrapping_slots: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationKeys:
        self._check_fingerprint(secret_key)
        extra = BootstrappingKeys.generate(BootstrapPlan(self.parameters, bootstrapping_slots), secret_key, progress) if bootstrapping else None
        top, levels = self.parameters.max_level, self._levels_of(rotations)
        limbs = {self.context.galois_element(step): level + 1 for step, level in levels.items()}
        if conjugation:
            limbs[self.context.conjugation_element] = top + 1
        keys = SwitchingKeys.generate(self.context, secret_key, limbs, progress)
        lower = {step: level for step, level in levels.items() if level < top}
        return EvaluationKeys(keys, secret_key.key_id, frozenset(levels), conjugation, extra, lower)

    def load_evaluation_keys(self, keys: EvaluationKeys) -> None:
        """Use these keys. Raises SecretKeyOnServerError for a secret key, ParameterError for keys of another backend or parameter set."""
        bootstrapping = getattr(keys, "bootstrapping", None)
        if bootstrapping is not None and bootstrapping.fingerprint != self.parameters.fingerprint:
            raise ParameterError("these bootstrapping keys were generated for other CKKS parameters: generate them again")
        super().load_evaluation_keys(keys)
        self.__dict__.pop("_bootstrapper", None)

    @cached_property
    def _bootstrapper(self) -> Bootstrapper:
        return Bootstrapper(BootstrapPlan(self.parameters, self.evaluation_keys.bootstrapping.period))

    @property
    def _keys(self) -> SwitchingKeys:
        return self.evaluation_keys.payload

    # ---- bytes ----
    def serialize(self, item: Any, *, allow_secret: bool = False) -> bytes:
        if isinstance(item, Ciphertext):
            return files.write_ciphertext(self.context, item.payload.values, item.payload.seeds, item.level, item.scale, item.key_id)
        if isinstance(item, EvaluationKeys):
            if item.bootstrapping is not None:
                raise ParameterError("bootstrapping keys take gigabytes: write them with save_bootstrapping_keys into a folder, and the others without them")
            return files.write_switching_keys(self.context, item.payload, item.rotations, item.levels, item.conjugation, item.key_id)
        if isinstance(item, PublicKey):
            return files.write_public_key(self.context, item)
        if isinstance(item, SecretKey):
            if not allow_secret:
                raise SecretKeyOnServerError("serialising a secret key needs allow_secret=True: do it on the client only, into a file only its owner reads")
            return files.write_secret_key(self.context, item)
        raise ParameterError(f"the native backend cannot serialise a {type(item).__name__}")

    def save_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> int:
        return bootstrapping_files.save(keys.bootstrapping, BootstrapPlan(self.parameters, keys.bootstrapping.period), keys.key_id, folder)

    def write_bootstrapping_keys(self, secret_key: SecretKey, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> int:
        self._check_fingerprint(secret_key)
        plan = BootstrapPlan(self.parameters)
        return bootstrapping_files.write(generate_parts(plan, secret_key, progress), plan, secret_key.key_id, folder)

    def load_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> EvaluationKeys:
        extra, key_id = bootstrapping_files.load(self.parameters, folder)
        if key_id != keys.key_id:
            raise WrongKeyError(f"the bootstrapping keys belong to key {key_id}, the evaluation keys to {keys.key_id}: use one key folder")
        return replace(keys, bootstrapping=extra)

    def deserialize(self, data: bytes, kind: str) -> Any:
        if kind == "ciphertext":
            values, seeds, level, scale, key_id = files.read_ciphertext(self.context, data)
            return Ciphertext(Residues(values, seeds), values.shape[:-3], level, scale, key_id, values.shape[-3])
        if kind == "evaluation_keys":
            keys, rotations, levels, conjugation, key_id = files.read_switching_keys(self.context, data)
            return EvaluationKeys(keys, key_id, rotations, conjugation, levels=levels)
        if kind == "public_key":
            return files.read_public_key(self.context, data)
        if kind == "secret_key":
            return files.read_secret_key(self.context, data)
        raise ParameterError(f"unknown kind {kind!r}: one of ciphertext, evaluation_keys, public_key, secret_key")

    # ---- encoding and encryption ----
    def _encode(self, values: np.ndarray, level: int, scale: float) -> np.ndarray:
        return self._evaluator.encode(values, level, scale)

    def _encrypt(self, values: np.ndarray, key: SecretKey | PublicKey, level: int, scale: float) -> Residues:
        return Residues(*self._evaluator.encrypt(values, key, level, scale))

    def _decrypt(self, ct: Ciphertext, secret_key: SecretKey) -> np.ndarray:
        return self._evaluator.decrypt(ct.payload.values, secret_key, ct.scale)

    # ---- linear ----
    def _add(self, a: Ciphertext, b: Ciphertext) -> Residues:
        return Residues(self._evaluator.add(a.payload.values, b.payload.values))

    def _subtract(self, a: Ciphertext, b: Ciphertext) -> Residues:
        return Residues(self._evaluator.add(a.payload.values, b.payload.values, -1.0))

    def _negate(self, a: Ciphertext) -> Residues:
        return Residues(self._evaluator.negate(a.payload.values))

    def _add_plain(self, a: Ciphertext, b: Plaintext) -> Residues:
        return Residues(self._evaluator.add_plain(a.payload.values, b.payload))

    def _add_scalar(self, a: Ciphertext, value: float) -> Residues:
        return Residues(self._evaluator.add_integer(a.payload.values, round(value * a.scale)))

    def _sum(self, a: Ciphertext) -> Residues:
        return Residues(self._evaluator.sum(a.payload.values))

    # ---- products ----
    def _multiply(self, a: Ciphertext, b: Ciphertext) -> Residues:
        return Residues(self._evaluator.multiply(a.payload.values, b.payload.values))

    def _multiply_plain(self, a: Ciphertext, b: Plaintext) -> Residues:
        return Residues(self._evaluator.multiply_plain(a.payload.values, b.payload))

    def _multiply_plain_sum(self, plain: Plaintext, a: Ciphertext) -> Residues:
        return Residues(self._evaluator.multiply_plain_sum(plain.payload, a.payload.values))

    def _multiply_integer(self, a: Ciphertext, value: int) -> Residues:
        return Residues(self._evaluator.multiply_integer(a.payload.values, value))

    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> Residues:
        return Residues(self._evaluator.linear_combination(weights, a.payload.values))

    def _relinearize(self, a: Ciphertext) -> Residues:
        return Residues(self._evaluator.relinearize(a.payload.values, self._keys))

    def relinearize_rescale(self, a: Ciphertext) -> Ciphertext:
        """One division by the special moduli and the last modulus together; logged as the two operations it stands for."""
        if a.components == 2 or a.level < 1:
            return super().relinearize_rescale(a)
        self._keys_for(a)
        with self.log.primitive("relinearize", a.level, a.count):
            payload = Residues(self._evaluator.relinearize_rescale(a.payload.values, self._keys))
        with self.log.primitive("rescale", a.level, a.count):
            return replace(a, payload=payload, level=a.level - 1, scale=a.scale / self.parameters.moduli[a.level], components=2)

    def _rescale(self, a: Ciphertext) -> Residues:
        return Residues(self._evaluator.rescale(a.payload.values))

    def _drop_level(self, a: Ciphertext, level: int) -> Residues:
        return Residues(np.ascontiguousarray(a.payload.values[..., : level + 1, :]), a.payload.seeds)

    # ---- automorphisms ----
    def _rotate(self, a: Ciphertext, steps: tuple[int, ...]) -> Residues:
        return Residues(self._evaluator.rotate(a.payload.values, self._keys, steps))

    def _sum_rotated(self, a: Ciphertext, steps: tuple[int, ...]) -> Residues:
        return Residues(self._evaluator.sum_rotated(a.payload.values, self._keys, steps))

    def _conjugate(self, a: Ciphertext) -> Residues:
        return Residues(self._evaluator.conjugate(a.payload.values, self._keys))

    # ---- refresh ----
    def _bootstrap(self, a: Ciphertext, divisor: int = 1) -> Residues:
        values = a.payload.values
        flat = np.ascontiguousarray(values).reshape(-1, *values.shape[-3:])
        fresh = self._bootstrapper(flat, self.evaluation_keys.bootstrapping, divisor)
        return Residues(fresh.reshape(*a.batch_shape, *fresh.shape[-3:]))

    # ---- batch structure ----
    def _take(self, a: Ciphertext, index: int | slice) -> Residues:
        seeds = a.payload.seeds
        return Residues(a.payload.values[index], None if seeds is None else seeds[index])

    def _stack(self, items: Sequence[Ciphertext]) -> Residues:
        return Residues(np.stack([item.payload.values for item in items]))

    def _reshape(self, a: Ciphertext, batch_shape: tuple[int, ...]) -> Residues:
        values, seeds = a.payload.values, a.payload.seeds
        return Residues(values.reshape(*batch_shape, *values.shape[-3:]), None if seeds is None else seeds.reshape(*batch_shape, SEED_BYTES))
