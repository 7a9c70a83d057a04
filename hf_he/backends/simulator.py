"""The simulator: plaintext values behind the HEBackend contract, with the levels, scales, overflows and noise of real CKKS.

It protects nothing. A payload holds what the slots of the encoded polynomial hold, that is value * scale, and an estimate of the error;
"encryption" adds noise from `simulator_kernels`, as do key switching, rescaling and encoding, so results carry errors of the size a real
backend gives, and a wrong scale gives wrong values here too. Levels, scales, operation counts and traces come from the base class and
are those of every other backend.

Noise model: a polynomial with independent coefficient errors of standard deviation s has slot errors of s * sqrt(N / 2), since the
canonical embedding multiplies the variance by N and splits it over real and imaginary parts. Coefficient errors follow the usual
average-case analysis for uniform ternary secrets (variance 2/3): fresh encryption, digit-wise key switching divided by P, rounding
in rescaling and in encoding. `noise` reports the estimate.
"""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_he.backends.base import Ciphertext, EvaluationKeys, HEBackend, Plaintext
from hf_he.backends.simulator_kernels import NoiseSource, largest_magnitude, product_sums
from hf_he.ckks.bootstrapping.plan import BootstrapPlan
from hf_he.ckks.encoder import to_coefficients, to_values
from hf_he.ckks.parameters import ERROR_STANDARD_DEVIATION, CKKSParameters
from hf_he.errors import BackendUnavailableError, CorruptFileError, ParameterError, ScaleMismatchError, SecretKeyOnServerError, WrongKeyError
from hf_he.secret_key import SecretKeyBase, new_key_id
from hf_he.serialization import pack, read_file, unpack_for, write_file

TERNARY_VARIANCE = 2.0 / 3.0
ROUNDING_VARIANCE = 1.0 / 12.0
BOOTSTRAP_NOISE = 2.0**-49.95
"""Error of a bootstrapped slot per N^(3/2) and per unit of q_0 / scale: rounding in the double angles at scale 2^50, N / 6 per slot, amplified and
summed over the coefficients; fitted to the native engine at N = 2^11 and 2^16."""
_ARRAYS = {
    "ciphertext": {"values": "float64", "noise": "float64"},
    "evaluation_keys": {"rotations": "int64", "levels": "int64"},
    "public_key": {},
    "secret_key": {},
}
"""The arrays of each kind of file, by dtype."""


class SimulatorSecretKey(SecretKeyBase):
    """Only a name: the simulator has nothing to hide."""


@dataclass(frozen=True)
class SimulatorPublicKey:
    key_id: str
    fingerprint: str


@dataclass(frozen=True)
class SimulatedBootstrapping:
    """Whose bootstrapping keys these would be, and how many distinct slots they would be for."""

    key_id: str
    period: int


@dataclass(frozen=True)
class Slots:
    """value * scale, [*batch, slots] (a plaintext: [*batch, period]), and the estimated standard deviation [*batch] of its error."""

    values: np.ndarray
    noise: np.ndarray


class SimulatorBackend(HEBackend):
    """HEBackend on plaintext values; see the module's text for what is exact and what is modelled."""

    name = "simulator"
    bootstraps = True

    def __init__(self, parameters: CKKSParameters, seed: int | None = None) -> None:
        super().__init__(parameters)
        self._source = NoiseSource(secrets.randbits(64) if seed is None else seed)
        self.rotations_used: Counter[int] = Counter()
        self._key_switch = [self._key_switch_noise(level) for level in range(parameters.max_level + 1)]
        self._largest = [2.0 ** min(parameters.log2_modulus(level) - 1, 1023.0) for level in range(parameters.max_level + 1)]

    def capabilities(self) -> dict[str, bool]:
        return {**super().capabilities(), "simulated": True}

    def noise(self, ct: Ciphertext) -> np.ndarray:
        """[*batch] estimated standard deviation of the errors of the decrypted values."""
        return np.broadcast_to(ct.payload.noise, ct.batch_shape) / ct.scale

    # ---- keys ----
    def generate_secret_key(self) -> SimulatorSecretKey:
        return SimulatorSecretKey(new_key_id(), self.parameters.fingerprint)

    def generate_public_key(self, secret_key: SimulatorSecretKey) -> SimulatorPublicKey:
        self._check_fingerprint(secret_key)
        return SimulatorPublicKey(secret_key.key_id, secret_key.fingerprint)

    def generate_evaluation_keys(
        self,
        secret_key: SimulatorSecretKey,
        rotations: Iterable[int] | Mapping[int, int],
        *,
        conjugation: bool = False,
        bootstrapping: bool = False,
        bootstrapping_slots: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationKeys:
        self._check_fingerprint(secret_key)
        if bootstrapping and not self.capabilities()["bootstrap"]:
            raise BackendUnavailableError("these parameters have no moduli for bootstrapping: use the parameter set n16-bootstrap, or --refresh client")
        levels = self._levels_of(rotations)
        extra = SimulatedBootstrapping(secret_key.key_id, BootstrapPlan(self.parameters, bootstrapping_slots).period) if bootstrapping else None
        if progress is not None:
            progress(len(levels), len(levels))
        lower = {step: level for step, level in levels.items() if level < self.parameters.max_level}
        return EvaluationKeys(None, secret_key.key_id, frozenset(levels), conjugation, extra, lower)

    # ---- bytes ----
    def serialize(self, item: Any, *, allow_secret: bool = False) -> bytes:
        metadata = {"backend": self.name, "parameters": json.dumps(self.parameters.to_dict()), "fingerprint": self.parameters.fingerprint}
        metadata["key_id"] = item.key_id
        if isinstance(item, Ciphertext):
            metadata |= {"level": str(item.level), "scale": item.scale.hex(), "components": str(item.components)}
            return pack("ciphertext", {"values": item.payload.values, "noise": item.payload.noise}, metadata)
        if isinstance(item, EvaluationKeys):
            steps = np.array(sorted(item.rotations), dtype=np.int64)
            if item.bootstrapping is not None:
                raise ParameterError("write bootstrapping keys with save_bootstrapping_keys into a folder, and the others without them")
            levels = np.array([item.levels.get(step, self.parameters.max_level) for step in steps.tolist()], dtype=np.int64)
            return pack("evaluation_keys", {"rotations": steps, "levels": levels}, {**metadata, "conjugation": str(int(item.conjugation))})
        if isinstance(item, SimulatorPublicKey):
            return pack("public_key", {}, metadata)
        if isinstance(item, SecretKeyBase):
            if not allow_secret:
                raise SecretKeyOnServerError("serialising a secret key needs allow_secret=True: do it on the client only, into a file only its owner reads")
            return pack("secret_key", {}, metadata)
        raise ParameterError(f"the simulator cannot serialise a {type(item).__name__}")

    def deserialize(self, data: bytes, kind: str) -> Any:
        if kind not in _ARRAYS:
            raise ParameterError(f"unknown kind {kind!r}: one of {', '.join(_ARRAYS)}")
        arrays, metadata = unpack_for(data, kind, self.name, self.parameters.fingerprint)
        if {name: array.dtype.name for name, array in arrays.items()} != _ARRAYS[kind]:
            raise CorruptFileError(f"this {kind} file misses or garbles its arrays: write it again with this version of hf_he")
        try:
            return self._read(kind, arrays, metadata)
        except (KeyError, ValueError, OverflowError):
            raise CorruptFileError(f"this {kind} file misses or garbles a field: write it again with this version of hf_he") from None

    def save_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> int:
        return self._write_bootstrapping_key(keys.bootstrapping, folder)

    def write_bootstrapping_keys(self, secret_key: SimulatorSecretKey, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> int:
        self._check_fingerprint(secret_key)
        if not self.capabilities()["bootstrap"]:
            raise BackendUnavailableError("these parameters have no moduli for bootstrapping: use the parameter set n16-bootstrap, or --refresh client")
        return self._write_bootstrapping_key(SimulatedBootstrapping(secret_key.key_id, self.parameters.slots), folder)

    def _write_bootstrapping_key(self, key: SimulatedBootstrapping, folder: str | Path) -> int:
        metadata = {"backend": self.name, "fingerprint": self.parameters.fingerprint, "key_id": key.key_id}
        data = pack("bootstrapping_keys", {"period": np.array(key.period, dtype=np.int64)}, metadata)
        write_file(Path(folder) / "simulated.keys", data)
        return len(data)

    def load_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> EvaluationKeys:
        data = read_file(Path(folder) / "simulated.keys", "bootstrapping-key")
        arrays, metadata = unpack_for(data, "bootstrapping_keys", self.name, self.parameters.fingerprint)
        if metadata["key_id"] != keys.key_id:
            raise WrongKeyError(f"the bootstrapping keys do not belong to key {keys.key_id}: use one key folder")
        try:
            plan = BootstrapPlan(self.parameters, int(arrays["period"].item()))
        except (KeyError, ValueError, OverflowError, TypeError, ParameterError):
            raise CorruptFileError("these bootstrapping keys do not say how many slots they are for: make them again with `hf-he keygen`") from None
        return replace(keys, bootstrapping=SimulatedBootstrapping(keys.key_id, plan.period))

    def _read(self, kind: str, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Any:
        key_id = metadata["key_id"]
        if kind == "secret_key":
            return SimulatorSecretKey(key_id, self.parameters.fingerprint)
        if kind == "public_key":
            return SimulatorPublicKey(key_id, self.parameters.fingerprint)
        if kind == "evaluation_keys":
            steps = arrays["rotations"]
            if steps.ndim != 1 or (np.diff(steps, prepend=0) <= 0).any() or (steps >= self.parameters.slots).any() or metadata["conjugation"] not in ("0", "1"):
                raise ValueError
            levels, top = arrays["levels"], self.parameters.max_level
            if levels.shape != steps.shape or ((levels < 0) | (levels > top)).any():
                raise ValueError
            lower = {step: level for step, level in zip(steps.tolist(), levels.tolist(), strict=True) if level < top}
            return EvaluationKeys(None, key_id, frozenset(steps.tolist()), metadata["conjugation"] == "1", levels=lower)
        values, noise = arrays["values"].copy(), arrays["noise"].copy()
        level, scale, components = int(metadata["level"]), float.fromhex(metadata["scale"]), int(metadata["components"])
        if values.ndim < 1 or values.shape[-1] != self.parameters.slots or noise.shape != values.shape[:-1] or components not in (2, 3):
            raise ValueError
        if not (0 <= level <= self.parameters.max_level and 0 < scale < math.inf and math.log2(scale) < self.parameters.log2_modulus(level)):
            raise ValueError
        if not (np.isfinite(values).all() and np.isfinite(noise).all() and (noise >= 0).all()):
            raise ValueError
        return Ciphertext(Slots(values, noise), values.shape[:-1], level, scale, key_id, components)

    # ---- noise model: coefficient variances ----
    def _slot_noise(self, coefficient_variance: float) -> float:
        return math.sqrt(coefficient_variance * self.parameters.ring_degree / 2)

    def _rounding_noise(self, components: int) -> float:
        secret = self.parameters.ring_degree * TERNARY_VARIANCE
        return self._slot_noise(ROUNDING_VARIANCE * sum(secret**power for power in range(components)))

    def _key_switch_noise(self, level: int) -> float:
        p = self.parameters
        special = sum(math.log2(q) for q in p.special_moduli)
        variance = 0.0
        for start in range(0, level + 1, p.digit_size):
            digit = sum(math.log2(q) for q in p.moduli[start : min(start + p.digit_size, level + 1)])
            variance += p.ring_degree * ROUNDING_VARIANCE * ERROR_STANDARD_DEVIATION**2 * 4.0 ** (digit - special)
        return math.hypot(self._slot_noise(variance), self._rounding_noise(2))

    def _noisy(self, values: np.ndarray, noise: np.ndarray, added: float, level: int) -> Slots:
        """`values` with fresh noise of standard deviation `added`."""
        values, largest = self._source.added(values, added)
        return self._checked(values, np.hypot(noise, added), level, largest)

    def _checked(self, values: np.ndarray, noise: np.ndarray, level: int, largest: float | None = None) -> Slots:
        largest = largest_magnitude(values) if largest is None else largest
        if largest > self._largest[level]:
            raise ScaleMismatchError(
                f"a slot holds 2^{math.log2(largest):.1f}, which overflows the modulus 2^{self.parameters.log2_modulus(level):.1f} of level {level}: "
                "a value left its range, or the ciphertext must be refreshed at a higher level first"
            )
        return Slots(values, noise)

    # ---- encoding and encryption ----
    def _encode(self, values: np.ndarray, level: int, scale: float) -> Slots:
        # a vector of period p has 2p non-zero coefficients, each rounded: the slot error shrinks with the period
        noise = math.sqrt(ROUNDING_VARIANCE * values.shape[-1])
        return self._noisy(values * scale, np.zeros(values.shape[:-1]), noise, level)

    def _encrypt(self, values: np.ndarray, key: Any, level: int, scale: float) -> Slots:
        public = not isinstance(key, SecretKeyBase)
        factor = 1 + 2 * self.parameters.ring_degree * TERNARY_VARIANCE if public else 1
        noise = self._slot_noise(ERROR_STANDARD_DEVIATION**2 * factor + ROUNDING_VARIANCE)
        return self._noisy(values * scale, np.zeros(values.shape[:-1]), noise, level)

    def _decrypt(self, ct: Ciphertext, secret_key: SecretKeyBase) -> np.ndarray:
        return ct.payload.values / ct.scale

    # ---- linear ----
    def _add(self, a: Ciphertext, b: Ciphertext) -> Slots:
        x, y = a.payload, b.payload
        return self._checked(x.values + y.values, np.hypot(x.noise, y.noise), a.level)

    def _subtract(self, a: Ciphertext, b: Ciphertext) -> Slots:
        x, y = a.payload, b.payload
        return self._checked(x.values - y.values, np.hypot(x.noise, y.noise), a.level)

    def _negate(self, a: Ciphertext) -> Slots:
        return Slots(-a.payload.values, a.payload.noise)

    def _add_plain(self, a: Ciphertext, b: Plaintext) -> Slots:
        x, y = a.payload, b.payload
        return self._checked(self._with_period(np.add, x.values, y.values), np.hypot(x.noise, y.noise), a.level)

    def _add_scalar(self, a: Ciphertext, value: float) -> Slots:
        return self._checked(a.payload.values + round(value * a.scale), a.payload.noise, a.level)

    def _sum(self, a: Ciphertext) -> Slots:
        return self._checked(a.payload.values.sum(0), np.sqrt(np.square(a.payload.noise).sum(0)), a.level)

    # ---- products ----
    def _multiply(self, a: Ciphertext, b: Ciphertext) -> Slots:
        x, y = a.payload, b.payload
        noise = np.hypot(_rms(x.values) * y.noise, _rms(y.values) * x.noise)
        return self._checked(x.values * y.values, noise, a.level)

    def _multiply_plain(self, a: Ciphertext, b: Plaintext) -> Slots:
        x, y = a.payload, b.payload
        noise = np.hypot(_rms(x.values) * y.noise, _rms(y.values) * x.noise)
        return self._checked(self._with_period(np.multiply, x.values, y.values), noise, a.level)

    def _multiply_plain_sum(self, plain: Plaintext, a: Ciphertext) -> Slots:
        x, y = a.payload, plain.payload
        values, largest = product_sums(y.values, x.values)
        variance = np.tensordot(np.square(y.noise), np.square(_rms(x.values)), axes=1) + np.tensordot(np.square(_rms(y.values)), np.square(x.noise), axes=1)
        return self._checked(values, np.sqrt(variance), a.level, largest)

    def _multiply_integer(self, a: Ciphertext, value: int) -> Slots:
        return self._checked(a.payload.values * float(value), a.payload.noise * abs(float(value)), a.level)

    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> Slots:
        x, weights = a.payload, weights.astype(np.float64)
        values = np.tensordot(weights, x.values, axes=1)
        variance = np.tensordot(np.square(weights), np.square(x.noise), axes=1)
        return self._checked(values, np.sqrt(variance), a.level)

    def _relinearize(self, a: Ciphertext) -> Slots:
        return self._noisy(a.payload.values, a.payload.noise, self._key_switch[a.level], a.level)

    def _rescale(self, a: Ciphertext) -> Slots:
        q = self.parameters.moduli[a.level]
        return self._noisy(a.payload.values / q, a.payload.noise / q, self._rounding_noise(a.components), a.level - 1)

    def _drop_level(self, a: Ciphertext, level: int) -> Slots:
        return self._checked(a.payload.values, a.payload.noise, level)

    # ---- automorphisms ----
    def _rotate(self, a: Ciphertext, steps: tuple[int, ...]) -> Slots:
        values, largest = self._source.rotated(a.payload.values, steps, self._key_switch[a.level])
        return self._checked(values, self._rotated_noise(np.stack([a.payload.noise] * len(steps)), steps, a.level), a.level, largest)

    def _sum_rotated(self, a: Ciphertext, steps: tuple[int, ...]) -> Slots:
        values, largest = self._source.sum_rotated(a.payload.values, steps, self._key_switch[a.level])
        noise = self._rotated_noise(a.payload.noise, steps, a.level)
        return self._checked(values, np.sqrt(np.square(noise).sum(0)), a.level, largest)

    def _rotated_noise(self, noise: np.ndarray, steps: tuple[int, ...], level: int) -> np.ndarray:
        """[steps, *batch] errors after these rotations, which are counted."""
        for step in steps:
            if step:
                self.rotations_used[step] += math.prod(noise.shape[1:])
        added = np.array([self._key_switch[level] if step else 0.0 for step in steps])
        return np.hypot(noise, added.reshape(-1, *[1] * (noise.ndim - 1)))

    def _conjugate(self, a: Ciphertext) -> Slots:
        return self._noisy(a.payload.values, a.payload.noise, self._key_switch[a.level], a.level)

    # ---- refresh ----
    def _bootstrap(self, a: Ciphertext, divisor: int = 1) -> Slots:
        """The average over the repetitions, the sine in place of the reduction modulo q_0, coefficient by coefficient, and the measured noise."""
        p, period = self.parameters, self.evaluation_keys.bootstrapping.period
        modulus, scale = p.moduli[0], p.scale_at(p.max_level) / divisor
        values = a.payload.values.reshape(*a.batch_shape, -1, period).mean(-2)
        reduced = np.sin(2 * np.pi / modulus * to_coefficients(values, 1.0)) * (modulus / (2 * np.pi))
        noise = BOOTSTRAP_NOISE * p.ring_degree * math.sqrt(2 * period) * modulus / p.scale_at(0) * scale
        fresh, _ = self._source.added(to_values(reduced, 1.0) * (scale / a.scale), noise)
        spread = np.hypot(a.payload.noise * (scale / a.scale), noise)
        return self._noisy(np.tile(fresh, p.slots // period), spread, self._rounding_noise(2), p.max_level)

    # ---- batch structure ----
    def _take(self, a: Ciphertext, index: int | slice) -> Slots:
        return Slots(a.payload.values[index], a.payload.noise[index])

    def _stack(self, items: Sequence[Ciphertext]) -> Slots:
        return Slots(np.stack([i.payload.values for i in items]), np.stack([i.payload.noise for i in items]))

    def _reshape(self, a: Ciphertext, batch_shape: tuple[int, ...]) -> Slots:
        return Slots(a.payload.values.reshape(*batch_shape, self.parameters.slots), a.payload.noise.reshape(batch_shape))

    def _with_period(self, operation: np.ufunc, values: np.ndarray, periodic: np.ndarray) -> np.ndarray:
        """operation(values, periodic), [*batch, period] plaintext values being continued over all slots."""
        period = periodic.shape[-1]
        out = operation(values.reshape(*values.shape[:-1], -1, period), periodic[..., None, :])
        return out.reshape(*out.shape[:-2], self.parameters.slots)


def _rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.vecdot(values, values) / values.shape[-1])
