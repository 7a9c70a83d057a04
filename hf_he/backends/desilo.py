"""The DESILO FHE backend: a closed library under a non-commercial licence, on a CPU or a CUDA device.

DESILO chooses its moduli itself, hides its scales, and rescales within every product. The contract's levels and scales are kept beside it: with S_l
the canonical scale of level l, a payload at level l holds the slots value * scale / S_l, and one whose product is not yet rescaled
(`pending`) already sits one level lower in the library and holds value * scale / S_l^2. Rescaling then costs nothing, and every scale the
contract asks for becomes an ordinary factor.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hf_he.backends import desilo_files as files
from hf_he.backends.base import Ciphertext, EvaluationKeys, HEBackend, Plaintext
from hf_he.backends.keys import LibraryKeys, LibraryPublicKey
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import BackendUnavailableError, ParameterError, SecretKeyOnServerError
from hf_he.secret_key import SecretKeyBase, new_key_id

SUPPORTED_VERSION = "2.0"
LICENCE = "DESILO FHE is closed source and licensed for non-commercial use only; hf_he's own licence does not cover it"
SMALLEST_SCALE = 2.0**25
"""Factors of a smaller scale are integers that multiply the residues; others are real factors, which take their level at once."""


class LicenceWarning(UserWarning):
    """Shown once per process when this backend is selected."""


class DesiloSecretKey(SecretKeyBase):
    def __init__(self, key_id: str, fingerprint: str, key: Any) -> None:
        super().__init__(key_id, fingerprint)
        self.key = key


class DesiloPublicKey(LibraryPublicKey):
    """DESILO FHE's."""


class DesiloKeys(LibraryKeys):
    """DESILO FHE's, its rotation keys those of fixed steps."""


@dataclass(frozen=True, eq=False)
class BootstrapKeys:
    conjugation: Any = field(repr=False)
    roll: Any = field(repr=False)
    small: Any = field(repr=False)


@dataclass(frozen=True, eq=False)
class Values:
    """The library's ciphertexts of a batch, in C order."""

    items: list[Any]
    pending: bool = False


class DesiloBackend(HEBackend):
    """HEBackend on DESILO FHE 2.0; `device` is "cpu", "cuda" or "cuda:N" (needs one of the `desilofhe-cuXXX` packages).

    A parameter set is served by the library's engine of the same slots with more levels, because its keys do not reach the highest one; its own
    moduli count for security, 128 bits by the vendor's statement. Raises BackendUnavailableError when there is no such engine.
    """

    name = "desilo"
    devices = ("cpu", "cuda")
    bootstraps = True
    iterates = False
    default_refresh = "client"
    default_parameters = "n14-6"
    demo_sentences = 2
    evaluation_key_type = DesiloKeys

    def __init__(self, parameters: CKKSParameters, device: str | None = None) -> None:
        super().__init__(parameters)
        warnings.warn(LICENCE, LicenceWarning, stacklevel=3)
        self._engine = _engine(parameters, device or "cpu")

    @classmethod
    def availability(cls) -> tuple[bool, str]:
        if find_spec("desilofhe") is None:
            return False, "DESILO FHE is not installed: pip install 'hf-he[desilo]' (closed source, non-commercial licence)"
        found = installed_version()
        if found is None:
            return False, "the module desilofhe belongs to no installed package: pip install 'hf-he[desilo]'"
        if not found.startswith(f"{SUPPORTED_VERSION}."):
            return False, f"DESILO FHE {found} is installed, this adapter is written for {SUPPORTED_VERSION}: pip install 'desilofhe=={SUPPORTED_VERSION}.*'"
        return True, f"DESILO FHE {found}; {LICENCE}"

    # ---- keys ----
    def generate_secret_key(self) -> DesiloSecretKey:
        return DesiloSecretKey(new_key_id(), self.parameters.fingerprint, self._engine.create_secret_key())

    def generate_public_key(self, secret_key: DesiloSecretKey) -> DesiloPublicKey:
        self._check_fingerprint(secret_key)
        return DesiloPublicKey(secret_key.key_id, secret_key.fingerprint, self._engine.create_public_key(secret_key.key))

    def generate_evaluation_keys(
        self,
        secret_key: DesiloSecretKey,
        rotations: Iterable[int],
        *,
        conjugation: bool = False,
        bootstrapping: bool = False,
        bootstrapping_slots: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationKeys:
        self._check_fingerprint(secret_key)
        engine, secret = self._engine, secret_key.key
        extra = None
        if bootstrapping:
            self._check_bootstraps_all_slots(bootstrapping_slots)
            extra = BootstrapKeys(engine.create_conjugation_key(secret), engine.create_roll_key(secret), engine.create_small_bootstrap_key(secret))
        steps = sorted({self._rotation_step(s) for s in rotations} - {0})
        keys = {}
        for done, step in enumerate(steps, start=1):
            keys[step] = engine.create_fixed_rotation_key(secret, step)
            if progress is not None:
                progress(done, len(steps))
        conjugating = engine.create_conjugation_key(secret) if conjugation else None
        payload = DesiloKeys(engine.create_relinearization_key(secret), keys, conjugating, fingerprint=self.parameters.fingerprint)
        return EvaluationKeys(payload, secret_key.key_id, frozenset(steps), conjugation, extra)

    @property
    def _keys(self) -> DesiloKeys:
        return self.evaluation_keys.payload

    # ---- bytes ----
    def serialize(self, item: Any, *, allow_secret: bool = False) -> bytes:
        if isinstance(item, Ciphertext):
            return files.write_ciphertext(self._engine, self.parameters, item)
        if isinstance(item, EvaluationKeys):
            return files.write_evaluation_keys(self._engine, self.parameters, item)
        if isinstance(item, DesiloPublicKey):
            return files.write_key(self.parameters, "public_key", item.key_id, self._engine.serialize_public_key(item.key))
        if isinstance(item, DesiloSecretKey):
            if not allow_secret:
                raise SecretKeyOnServerError("serialising a secret key needs allow_secret=True: do it on the client only, into a file only its owner reads")
            return files.write_key(self.parameters, "secret_key", item.key_id, self._engine.serialize_secret_key(item.key))
        raise ParameterError(f"the desilo backend cannot serialise a {type(item).__name__}")

    def deserialize(self, data: bytes, kind: str) -> Any:
        engine, parameters = self._engine, self.parameters
        if kind == "ciphertext":
            return files.read_ciphertext(engine, parameters, data)
        if kind == "evaluation_keys":
            return files.read_evaluation_keys(engine, parameters, data)
        if kind == "public_key":
            key_id, key = files.read_key(engine.deserialize_public_key, parameters, kind, data)
            return DesiloPublicKey(key_id, parameters.fingerprint, key)
        if kind == "secret_key":
            key_id, key = files.read_key(engine.deserialize_secret_key, parameters, kind, data)
            return DesiloSecretKey(key_id, parameters.fingerprint, key)
        raise ParameterError(f"unknown kind {kind!r}: one of ciphertext, evaluation_keys, public_key, secret_key")

    def save_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> int:
        return files.save_bootstrapping_keys(self._engine, self.parameters, keys, Path(folder))

    def load_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> EvaluationKeys:
        return files.load_bootstrapping_keys(self._engine, self.parameters, keys, Path(folder))

    # ---- the contract's scales ----
    def _reference(self, level: int, pending: bool) -> float:
        return self.parameters.scale_at(level) ** (2 if pending else 1)

    def _pending(self, ct: Ciphertext) -> list[Any]:
        """The items as those of a product that is not rescaled."""
        if ct.payload.pending:
            return ct.payload.items
        factor = 1.0 / self.parameters.scale_at(ct.level)
        return [self._engine.multiply(item, factor) for item in ct.payload.items]

    def _together(self, a: Ciphertext, b: Ciphertext) -> tuple[list[Any], list[Any], bool]:
        """The items of both over the common batch shape, in one form."""
        pending = a.payload.pending or b.payload.pending
        x, y = (self._pending(ct) if pending else ct.payload.items for ct in (a, b))
        return *_broadcast(x, a.batch_shape, y, b.batch_shape), pending

    def _map(self, a: Ciphertext, function: Callable[[Any], Any]) -> Values:
        return Values([function(item) for item in a.payload.items], a.payload.pending)

    # ---- encoding and encryption ----
    def _encode(self, values: np.ndarray, level: int, scale: float) -> Encoded:
        return Encoded(self, values.reshape(-1, values.shape[-1]), scale)

    def _encrypt(self, values: np.ndarray, key: Any, level: int, scale: float) -> Values:
        rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
        return Values([self._engine.encrypt(row, key.key, level) for row in rows])

    def _decrypt(self, ct: Ciphertext, secret_key: DesiloSecretKey) -> np.ndarray:
        factor = self._reference(ct.level, ct.payload.pending) / ct.scale
        copies = (self._engine.clone(item) for item in ct.payload.items)  # decrypting leaves a product useless
        rows = [np.asarray(self._engine.decrypt(copy, secret_key.key)).real * factor for copy in copies]
        return np.stack(rows).reshape(*ct.batch_shape, self.parameters.slots)

    # ---- linear ----
    def _add(self, a: Ciphertext, b: Ciphertext) -> Values:
        x, y, pending = self._together(a, b)
        return Values([self._engine.add(i, j) for i, j in zip(x, y, strict=True)], pending)

    def _subtract(self, a: Ciphertext, b: Ciphertext) -> Values:
        x, y, pending = self._together(a, b)
        return Values([self._engine.subtract(i, j) for i, j in zip(x, y, strict=True)], pending)

    def _negate(self, a: Ciphertext) -> Values:
        return self._map(a, self._engine.negate)

    def _add_plain(self, a: Ciphertext, b: Plaintext) -> Values:
        plain = b.payload.at(self._reference(a.level, a.payload.pending))
        x, y = _broadcast(a.payload.items, a.batch_shape, plain, b.batch_shape)
        return Values([self._engine.add(i, j) for i, j in zip(x, y, strict=True)], a.payload.pending)

    def _add_scalar(self, a: Ciphertext, value: float) -> Values:
        shifted = value * a.scale / self._reference(a.level, a.payload.pending)
        return self._map(a, lambda item: self._engine.add(item, shifted))

    def _sum(self, a: Ciphertext) -> Values:
        rest = a.count // a.batch_shape[0]
        return Values([self._total(a.payload.items[i::rest]) for i in range(rest)], a.payload.pending)

    def _total(self, items: Sequence[Any]) -> Any:
        total = items[0]
        for item in items[1:]:
            total = self._engine.add(total, item)
        return total

    # ---- products ----
    def _multiply(self, a: Ciphertext, b: Ciphertext) -> Values:
        x, y = _broadcast(a.payload.items, a.batch_shape, b.payload.items, b.batch_shape)
        return Values([self._engine.multiply(i, j) for i, j in zip(x, y, strict=True)], True)

    def _multiply_plain(self, a: Ciphertext, b: Plaintext) -> Values:
        plain = b.payload.at(self.parameters.scale_at(a.level))
        x, y = _broadcast(a.payload.items, a.batch_shape, plain, b.batch_shape)
        return Values([self._engine.multiply(i, j) for i, j in zip(x, y, strict=True)], True)

    def _multiply_plain_sum(self, plain: Plaintext, a: Ciphertext) -> Values:
        groups, terms = plain.batch_shape
        factors = plain.payload.at(self.parameters.scale_at(a.level))
        rest, items = a.count // terms, a.payload.items
        sums = []
        for g in range(groups):
            for i in range(rest):
                sums.append(self._total([self._engine.multiply(items[k * rest + i], factors[g * terms + k]) for k in range(terms)]))
        return Values(sums, True)

    def multiply_scalar(self, a: Ciphertext, value: float, scale: float | None = None) -> Ciphertext:
        self._factor_scale = self.parameters.scale_at(a.level) if scale is None else scale
        return super().multiply_scalar(a, value, scale)

    def _multiply_integer(self, a: Ciphertext, value: int) -> Values:
        if a.payload.pending or self._factor_scale < SMALLEST_SCALE:
            return self._map(a, lambda item: self._engine.multiply(item, value))
        factor = value / self.parameters.scale_at(a.level)
        return Values([self._engine.multiply(item, factor) for item in a.payload.items], True)

    def linear_combination(self, weights: np.ndarray, a: Ciphertext, scale: float = 1.0) -> Ciphertext:
        self._factor_scale = scale
        return super().linear_combination(weights, a, scale)

    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> Values:
        """Integers stay integers for a scale of 1; otherwise the weights are real factors and take their level."""
        rest, items = a.count // a.batch_shape[0], a.payload.items
        real = not a.payload.pending and self._factor_scale > 1
        rows = weights / self.parameters.scale_at(a.level) if real else weights
        sums = [self._engine.weighted_sum(items[i::rest], [0, *row.tolist()]) for row in rows for i in range(rest)]
        return Values(sums, a.payload.pending or real)

    def _relinearize(self, a: Ciphertext) -> Values:
        return self._map(a, lambda item: self._engine.relinearize(item, self._keys.relinearization))

    def _rescale(self, a: Ciphertext) -> Values:
        return Values(self._pending(a))

    def _drop_level(self, a: Ciphertext, level: int) -> Values:
        return self._map(a, lambda item: self._engine.level_down(item, level - a.payload.pending))

    # ---- automorphisms ----
    def _rotate(self, a: Ciphertext, steps: tuple[int, ...]) -> Values:
        moving = [s for s in steps if s]
        keys = [self._keys.rotations[s] for s in moving]
        turned = [dict(zip(moving, self._engine.rotate_many(item, keys), strict=True)) if keys else {} for item in a.payload.items]
        rows = [turned[i][s] if s else item for s in steps for i, item in enumerate(a.payload.items)]
        return Values(rows, a.payload.pending)

    def _sum_rotated(self, a: Ciphertext, steps: tuple[int, ...]) -> Values:
        rest, items = a.count // len(steps), a.payload.items
        keys = self._keys.rotations
        rows = [[self._engine.rotate(items[g * rest + i], keys[s]) if s else items[g * rest + i] for g, s in enumerate(steps)] for i in range(rest)]
        return Values([self._total(row) for row in rows], a.payload.pending)

    def _conjugate(self, a: Ciphertext) -> Values:
        return self._map(a, lambda item: self._engine.conjugate(item, self._keys.conjugation))

    # ---- refresh ----
    def _bootstrap(self, a: Ciphertext, divisor: int = 1) -> Values:
        keys, relinearization = self.evaluation_keys.bootstrapping, self._keys.relinearization

        def fresh(item: Any) -> Any:
            item = self._engine.bootstrap(item, relinearization, keys.conjugation, keys.roll, keys.small)
            return self._engine.level_down(item, self.parameters.max_level)

        return self._map(a, fresh)

    # ---- batch structure ----
    def _take(self, a: Ciphertext, index: int | slice) -> Values:
        rest = a.count // a.batch_shape[0]
        chosen = [index] if isinstance(index, int) else range(*index.indices(a.batch_shape[0]))
        return Values([a.payload.items[g * rest + i] for g in chosen for i in range(rest)], a.payload.pending)

    def _stack(self, items: Sequence[Ciphertext]) -> Values:
        pending = any(item.payload.pending for item in items)
        rows = (self._pending(item) if pending else item.payload.items for item in items)
        return Values([value for row in rows for value in row], pending)

    def _reshape(self, a: Ciphertext, batch_shape: tuple[int, ...]) -> Values:
        return a.payload


class Encoded:
    """Rows of a plaintext, encoded for products or for sums when first used so."""

    def __init__(self, backend: DesiloBackend, rows: np.ndarray, scale: float) -> None:
        self._backend = backend
        self._rows = rows
        self._scale = scale
        self._encoded: dict[float, list[Any]] = {}

    def at(self, reference: float) -> list[Any]:
        """One library plaintext per row of value * scale / reference; usable at every level."""
        if reference not in self._encoded:
            repeats = self._backend.parameters.slots // self._rows.shape[-1]
            encode = self._backend._engine.encode_to_light_plaintext
            self._encoded[reference] = [encode(np.tile(row * (self._scale / reference), repeats)) for row in self._rows]
        return self._encoded[reference]


def installed_version() -> str | None:
    """Of `desilofhe`, or of the package of it for one version of CUDA, which has a name of its own."""
    names = ((found.metadata["Name"] or "", found.version) for found in distributions())
    return next((version for name, version in names if name.lower().replace("_", "-").partition("-")[0] == "desilofhe"), None)


def _broadcast(x: list[Any], x_shape: tuple[int, ...], y: list[Any], y_shape: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    shape = np.broadcast_shapes(x_shape, y_shape)
    left, right = (np.broadcast_to(np.arange(len(z)).reshape(s), shape).ravel() for z, s in ((x, x_shape), (y, y_shape)))
    return [x[i] for i in left], [y[j] for j in right]


@cache
def _engine(parameters: CKKSParameters, device: str) -> Any:
    """The library's engine with the slots of `parameters`, at least their levels, and every core.

    One per process, because in 2.0.0 a rotation key that one engine has read breaks another of the same kind (recipes/benchmarks/desilo_keys.py).
    """
    import desilofhe

    kind, _, index = device.partition(":")
    threads = int(os.environ.get("NUMBA_NUM_THREADS", os.cpu_count() or 1))
    place = {"mode": "gpu", "device_id": int(index or 0)} if kind == "cuda" else {"mode": "parallel", "thread_count": threads}
    options = {"bootstrap": True} if parameters.bootstrap_moduli else {"max_level": parameters.max_level + 1}
    try:
        engine = desilofhe.Engine(**place, **options)
    except (RuntimeError, ValueError) as error:
        if kind == "cuda":
            raise BackendUnavailableError(
                f"DESILO FHE makes no engine on {device} ({error}): install the desilofhe-cuXXX package of this machine's CUDA, or use --device cpu"
            ) from error
        raise BackendUnavailableError(f"DESILO FHE makes no engine with {parameters.max_level + 1} levels on {device}: {error}") from error
    if engine.slot_count != parameters.slots or engine.max_level <= parameters.max_level:
        found = f"{engine.slot_count} slots and {engine.max_level} levels"
        raise BackendUnavailableError(
            f"DESILO FHE chooses its own rings: asked for {parameters.max_level + 1} levels it has {found}, these parameters {parameters.slots} slots; "
            "use --parameters n14-6, or n16-bootstrap"
        )
    return engine
