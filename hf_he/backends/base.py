"""The HEBackend contract: batched CKKS operations and nothing model-shaped.

`HEBackend` checks operands, keeps levels and scales exact, counts and times every primitive, and hands the arithmetic to the
adapter's `_methods`. Levels, scales and traces are therefore the same on every backend by construction.

Conventions
- A ciphertext at level l can be rescaled l times. Its canonical scale is `parameters.scale_at(l)`, with
  scale_at(l - 1) = scale_at(l)^2 / q_l, so a product of two canonical operands is canonical again after `rescale`.
- `rotate(ct, s)` moves slot i + s to slot i (left rotation, cyclic over the slots).
- Values are real vectors of `parameters.slots` entries. `encode` also takes vectors of a power-of-two period p | slots: they stand
  for their periodic continuation and stay compact.
- Nothing relinearises, rescales or changes levels implicitly.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_he.backends.adapter import Adapter, broadcast
from hf_he.backends.log import OperationLog
from hf_he.backends.values import Ciphertext, EvaluationKeys, Plaintext
from hf_he.errors import BackendUnavailableError, LevelError, MissingKeyError, ParameterError, ShapeError, WrongKeyError
from hf_he.secret_key import refuse_secret_key

if TYPE_CHECKING:
    from hf_he.ckks.parameters import CKKSParameters

ITERATION_GAIN = 2**12
"""What the error of a bootstrap, below 2^-13, can be multiplied by before it is bootstrapped itself."""


class HEBackend(Adapter):
    """One backend bound to one parameter set. A server calls `load_evaluation_keys`; secret keys are only ever arguments."""

    name: str
    bootstraps = False
    """Whether `bootstrap` works with parameters that have moduli for it."""
    iterates = True
    """Whether `bootstrap` takes more than one iteration."""
    default_refresh = "bootstrap"
    """What the demo does where both policies are possible: the server refreshes by itself, or ("client") nobody waits for minutes."""
    default_parameters = "n14"
    """Parameter set where the client refreshes."""
    devices: tuple[str, ...] = ("cpu",)
    """Kinds of device; a backend with more than one takes a `device` when it is made."""
    demo_sentences = 32
    """How many `hf-he demo` classifies unless told, on a CPU: those of a few minutes."""
    evaluation_key_type: type | None = None
    """Of the payload of evaluation keys, which names its parameters in `fingerprint`; None: not checked."""

    def __init__(self, parameters: CKKSParameters) -> None:
        self.parameters = parameters
        self.log = OperationLog()
        self.evaluation_keys: EvaluationKeys | None = None

    @classmethod
    def availability(cls) -> tuple[bool, str]:
        """Whether this backend runs here, and why not."""
        return True, "available"

    @staticmethod
    def check_device_name(device: str) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ParameterError(f"a device is cpu, cuda or cuda:N, got {device!r}")

    @classmethod
    def check_device(cls, device: str) -> None:
        """Raises ParameterError for what names no device, BackendUnavailableError for one that this backend never runs on."""
        cls.check_device_name(device)
        if device.partition(":")[0] not in cls.devices:
            raise BackendUnavailableError(
                f"the {cls.name} backend runs on a CPU only: leave --device out, or choose --backend fhelium (or desilo) for {device}"
            )

    @classmethod
    def placed_on(cls, device: str | None) -> str:
        """The kind of device on which a backend made with this `device` computes."""
        return (device or "cpu").partition(":")[0]

    def capabilities(self) -> dict[str, bool]:
        return {"bootstrap": self.bootstraps and bool(self.parameters.bootstrap_moduli), "conjugate": True, "periodic_plaintexts": True}

    # ---- keys ----
    @abstractmethod
    def generate_secret_key(self) -> Any:
        """A fresh secret key. Its type has no payload in repr, refuses pickling, and carries `key_id`."""

    @abstractmethod
    def generate_evaluation_keys(
        self,
        secret_key: Any,
        rotations: Iterable[int] | Mapping[int, int],
        *,
        conjugation: bool = False,
        bootstrapping: bool = False,
        bootstrapping_slots: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationKeys:
        """Relinearisation and Galois keys, and those of `bootstrap` (gigabytes). `progress`, if given, is called with (done, total).

        With `bootstrapping_slots`, a power of two, `bootstrap` is for vectors that repeat with this period, and costs less (native and simulator).
        `rotations` are steps, or steps with the highest level each is used at: a key takes less the lower its level.
        Raises BackendUnavailableError when bootstrapping keys are asked for and the backend or its parameters cannot bootstrap.
        """

    @abstractmethod
    def generate_public_key(self, secret_key: Any) -> Any:
        """An encryption key anyone may hold."""

    def load_evaluation_keys(self, keys: EvaluationKeys) -> None:
        """Use these keys. Raises SecretKeyOnServerError for a secret key or anything that carries one, ParameterError for anything but keys of this backend
        and parameter set."""
        refuse_secret_key(keys, "load_evaluation_keys")
        if not isinstance(keys, EvaluationKeys):
            raise ParameterError(f"evaluation keys are made by generate_evaluation_keys, got {type(keys).__name__}")
        if self.evaluation_key_type is not None:
            if not isinstance(keys.payload, self.evaluation_key_type):
                raise ParameterError("these evaluation keys were made by another backend: generate them with this one")
            if keys.payload.fingerprint != self.parameters.fingerprint:
                raise ParameterError("these evaluation keys were generated for other CKKS parameters: generate them again")
        self.evaluation_keys = keys

    # ---- encoding and encryption ----
    def encode(self, values: np.ndarray, level: int, scale: float | None = None) -> Plaintext:
        """Encode [*batch, period] reals (period a power of two dividing slots) at `level`; default scale `scale_at(level)`.

        Raises ShapeError, LevelError, ParameterError for a scale that is none, and ScaleMismatchError for values that do not fit the modulus.
        """
        values = self._reals(values)
        period = values.shape[-1]
        if period < 1 or period & (period - 1) or self.parameters.slots % period:
            raise ShapeError(f"a plaintext's period must be a power of two dividing {self.parameters.slots} slots, got {period}")
        if not np.isfinite(values).all():
            raise ShapeError("cannot encode NaN or infinity: check the values (and the model weights) before encoding")
        self._check_level(level)
        scale = self.parameters.scale_at(level) if scale is None else scale
        self._check_scale(scale)
        self._check_fits(values, scale, level)
        with self.log.primitive("encode", level, math.prod(values.shape[:-1])):
            payload = self._encode(values, level, scale)
        return Plaintext(payload, values.shape[:-1], level, scale, period)

    def encrypt(self, values: np.ndarray, key: Any, level: int | None = None) -> Ciphertext:
        """Encrypt [*batch, slots] reals under a public or secret key at `level` (default: the top), at the canonical scale. Errors as `encode`."""
        values = self._reals(values)
        if values.shape[-1] != self.parameters.slots:
            raise ShapeError(f"encrypt takes [*batch, {self.parameters.slots}] values, got {tuple(values.shape)}")
        if not np.isfinite(values).all():
            raise ShapeError("cannot encrypt NaN or infinity: check the input")
        level = self.parameters.max_level if level is None else level
        self._check_level(level)
        self._check_fits(values, self.parameters.scale_at(level), level)
        self._check_fingerprint(key)
        with self.log.primitive("encrypt", level, math.prod(values.shape[:-1])):
            payload = self._encrypt(values, key, level, self.parameters.scale_at(level))
        return Ciphertext(payload, values.shape[:-1], level, self.parameters.scale_at(level), key.key_id)

    def decrypt(self, ct: Ciphertext, secret_key: Any) -> np.ndarray:
        """[*batch, slots] float64. Raises WrongKeyError when the key is not the ciphertext's."""
        self._check_fingerprint(secret_key)
        if ct.key_id != secret_key.key_id:
            raise WrongKeyError(
                f"this ciphertext was encrypted under key {ct.key_id}, not {secret_key.key_id}: use the key file written by the same `hf-he keygen`"
            )
        if not ct.count:
            return np.zeros((*ct.batch_shape, self.parameters.slots))
        with self.log.primitive("decrypt", ct.level, ct.count):
            return self._decrypt(ct, secret_key)

    # ---- linear, no level ----
    def add(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._check_pair(a, b, same_scale=True)
        shape = broadcast(a.batch_shape, b.batch_shape)
        with self.log.primitive("add", a.level, math.prod(shape)):
            payload = self._add(a, b)
        return replace(a, payload=payload, batch_shape=shape, components=max(a.components, b.components))

    def subtract(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        self._check_pair(a, b, same_scale=True)
        shape = broadcast(a.batch_shape, b.batch_shape)
        with self.log.primitive("add", a.level, math.prod(shape)):
            payload = self._subtract(a, b)
        return replace(a, payload=payload, batch_shape=shape, components=max(a.components, b.components))

    def negate(self, a: Ciphertext) -> Ciphertext:
        with self.log.primitive("add", a.level, a.count):
            return replace(a, payload=self._negate(a))

    def add_plain(self, a: Ciphertext, b: Plaintext) -> Ciphertext:
        self._check_plain(a, b)
        self._check_scales(a.scale, b.scale)
        shape = broadcast(a.batch_shape, b.batch_shape)
        with self.log.primitive("add", a.level, math.prod(shape)):
            return replace(a, payload=self._add_plain(a, b), batch_shape=shape)

    def add_scalar(self, a: Ciphertext, value: float) -> Ciphertext:
        value = self._check_scalar(value)
        self._check_fits(np.array(value), a.scale, a.level)
        with self.log.primitive("add", a.level, a.count):
            return replace(a, payload=self._add_scalar(a, value))

    def sum(self, a: Ciphertext) -> Ciphertext:
        """Sum over the leading batch axis, of at least one entry."""
        self._check_terms(a)
        with self.log.primitive("add", a.level, a.count - a.count // a.batch_shape[0]):
            return replace(a, payload=self._sum(a), batch_shape=a.batch_shape[1:])

    # ---- products: the scale becomes the product of the scales; rescale afterwards ----
    def multiply(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        """Batched ciphertext product with 3 components; `relinearize` (possibly after sums) before the next product or rotation."""
        self._check_pair(a, b)
        self._check_two(a)
        self._check_two(b)
        self._check_product(a, b.scale)
        shape = broadcast(a.batch_shape, b.batch_shape)
        with self.log.primitive("multiply", a.level, math.prod(shape)):
            payload = self._multiply(a, b)
        return replace(a, payload=payload, batch_shape=shape, scale=a.scale * b.scale, components=3)

    def multiply_plain(self, a: Ciphertext, b: Plaintext) -> Ciphertext:
        self._check_plain(a, b)
        self._check_product(a, b.scale)
        shape = broadcast(a.batch_shape, b.batch_shape)
        with self.log.primitive("multiply_plain", a.level, math.prod(shape)):
            return replace(a, payload=self._multiply_plain(a, b), batch_shape=shape, scale=a.scale * b.scale)

    def multiply_plain_sum(self, plain: Plaintext, a: Ciphertext) -> Ciphertext:
        """sum_k plain[g, k] * a[k, *batch] -> [g, *batch]: the fused inner loop of a diagonal matrix product."""
        self._check_plain(a, plain)
        self._check_product(a, plain.scale)
        self._check_matrix("multiply_plain_sum", "plaintexts [g, k]", plain.batch_shape, a)
        shape = (plain.batch_shape[0], *a.batch_shape[1:])
        with self.log.primitive("multiply_plain", a.level, plain.batch_shape[0] * a.count):
            return replace(a, payload=self._multiply_plain_sum(plain, a), batch_shape=shape, scale=a.scale * plain.scale)

    def multiply_scalar(self, a: Ciphertext, value: float, scale: float | None = None) -> Ciphertext:
        """Multiply by round(value * scale), scale defaulting to `scale_at(level)`.

        Raises ParameterError for a value or scale that is none, and ScaleMismatchError when that integer, or 1 at the scale of the product, does not fit
        the modulus. The products themselves must fit too: that is up to the encrypted values, and the simulator tells.
        """
        scale = self.parameters.scale_at(a.level) if scale is None else scale
        self._check_product(a, scale)
        value = self._check_scalar(value)
        self._check_fits(np.array(value), scale, a.level)
        factor = round(value * scale)
        with self.log.primitive("multiply_scalar", a.level, a.count):
            return replace(a, payload=self._multiply_integer(a, factor), scale=a.scale * scale)

    def linear_combination(self, weights: np.ndarray, a: Ciphertext, scale: float = 1.0) -> Ciphertext:
        """Integer weights [out, in] (|w| < 2^25), standing for weights / scale, times ciphertexts [in, *batch] -> [out, *batch].

        The scale becomes the product of the scales. Raises ShapeError for weights that do not fit, ScaleMismatchError when the modulus is too small.
        """
        weights = np.asarray(weights)
        self._check_matrix("linear_combination", "weights [out, in]", weights.shape, a)
        if not np.issubdtype(weights.dtype, np.integer) or max(int(weights.max()), -int(weights.min())) >= 2**25:
            raise ShapeError("linear_combination takes integer weights below 2^25 in magnitude: scale and round them first")
        self._check_product(a, scale)
        with self.log.primitive("linear_combination", a.level, weights.shape[0] * a.count):
            payload = self._linear_combination(weights, a)
        return replace(a, payload=payload, batch_shape=(weights.shape[0], *a.batch_shape[1:]), scale=a.scale * scale)

    def relinearize(self, a: Ciphertext) -> Ciphertext:
        if a.components == 2:
            return a
        self._keys_for(a)
        with self.log.primitive("relinearize", a.level, a.count):
            return replace(a, payload=self._relinearize(a), components=2)

    def rescale(self, a: Ciphertext) -> Ciphertext:
        """Divide by the last prime: one level, scale / q_level. Works on 2 or 3 components."""
        if a.level < 1:
            raise LevelError("no level left to rescale: refresh the ciphertext first, or choose parameters with more levels")
        with self.log.primitive("rescale", a.level, a.count):
            payload = self._rescale(a)
        return replace(a, payload=payload, level=a.level - 1, scale=a.scale / self.parameters.moduli[a.level])

    def relinearize_rescale(self, a: Ciphertext) -> Ciphertext:
        """`rescale(relinearize(a))`, in one step where the backend has one: cheaper, and rounded once."""
        return self.rescale(self.relinearize(a))

    def drop_level(self, a: Ciphertext, level: int) -> Ciphertext:
        """Forget limbs down to `level`; the scale stays what it was (use `match_level` for a canonical result)."""
        self._check_level(level)
        if level > a.level:
            raise LevelError(f"cannot drop from level {a.level} to {level}")
        return a if level == a.level else replace(a, payload=self._drop_level(a, level), level=level)

    def match_level(self, a: Ciphertext, level: int) -> Ciphertext:
        """The same values at a lower level and its canonical scale; free (the scale is not looked at) when already there, else one scalar product and
        rescale. Raises LevelError, and ScaleMismatchError for a product that was not rescaled."""
        if a.level == level:
            return a
        if level > a.level:
            raise LevelError(f"this ciphertext is at level {a.level}, level {level} was asked for: refresh it first")
        self._check_level(level)
        a = self.drop_level(a, level + 1)
        return self.rescale(self.multiply_scalar(a, 1.0, scale=self._matching_factor(a, level)))

    # ---- automorphisms ----
    def rotate(self, a: Ciphertext, steps: Sequence[int]) -> Ciphertext:
        """All rotations of `a` by `steps`, hoisted: [len(steps), *batch]. Step 0 is a copy and needs no key."""
        steps = self._check_steps(a, steps)
        with self.log.primitive("rotate", a.level, a.count * sum(s != 0 for s in steps)):
            return replace(a, payload=self._rotate(a, steps), batch_shape=(len(steps), *a.batch_shape))

    def sum_rotated(self, a: Ciphertext, steps: Sequence[int]) -> Ciphertext:
        """sum_g rotate(a[g], steps[g]) for a [g, *batch] -> [*batch]: the giant steps of a matrix product, one ModDown."""
        self._check_terms(a)
        steps = self._check_steps(a, steps)
        if len(steps) != a.batch_shape[0]:
            raise ShapeError(f"sum_rotated needs one step per leading entry: {len(steps)} steps for {a.batch_shape[0]}")
        rest = a.count // a.batch_shape[0]
        with self.log.primitive("rotate", a.level, rest * sum(s != 0 for s in steps)):
            return replace(a, payload=self._sum_rotated(a, steps), batch_shape=a.batch_shape[1:])

    def conjugate(self, a: Ciphertext) -> Ciphertext:
        self._check_two(a)
        if not self._keys_for(a).conjugation:
            raise MissingKeyError("no conjugation key: generate the evaluation keys with conjugation=True")
        with self.log.primitive("conjugate", a.level, a.count):
            return replace(a, payload=self._conjugate(a))

    # ---- refresh ----
    def bootstrap(self, a: Ciphertext, iterations: int = 1) -> Ciphertext:
        """The same values at `max_level` and its canonical scale, without the secret key: [*batch] at any level to [*batch].

        With 2 `iterations` the error of the first is bootstrapped too, ITERATION_GAIN times as large, and subtracted (Bae, Cheon, Cho, Kim and Kim,
        "META-BTS", CCS 2022): twice the time, no level; 2^-14.8 became 2^-21.6 at N = 2^16.
        Values are meant to be within [-1, 1]; the result is then within 2^-13 at N = 2^16, and beyond that range the error grows with the cube of
        the coefficients. Two ciphertexts of a batch share one bootstrap. Raises MissingKeyError without bootstrapping keys, and
        BackendUnavailableError where the parameters have no moduli for it.
        """
        self._check_two(a)
        if not self.capabilities()["bootstrap"]:
            raise BackendUnavailableError("these parameters do not bootstrap: use the parameter set n16-bootstrap, or --refresh client")
        if self._keys_for(a).bootstrapping is None:
            raise MissingKeyError("no bootstrapping keys: generate the evaluation keys with bootstrapping=True")
        if iterations < 1:
            raise ParameterError(f"bootstrapping takes at least one iteration, got {iterations}")
        if iterations > 1 and not self.iterates:
            raise BackendUnavailableError(f"the {self.name} backend bootstraps in one iteration only: use --backend native")
        a = self.match_level(a, 0)
        self._check_scales(a.scale, self.parameters.scale_at(0))
        top = self.parameters.max_level
        with self.log.primitive("bootstrap", a.level, a.count):
            fresh = replace(a, payload=self._bootstrap(a), level=top, scale=self.parameters.scale_at(top))
        for i in range(1, iterations):
            gain = ITERATION_GAIN**i
            error = self.subtract(a, self.match_level(fresh, 0))
            error = replace(error, payload=self._multiply_integer(error, gain))
            with self.log.primitive("bootstrap", a.level, a.count):
                correction = replace(fresh, payload=self._bootstrap(error, gain))
            fresh = self.add(fresh, correction)
        return fresh

    # ---- batch structure: views where the payload allows ----
    def take(self, a: Ciphertext, index: int | slice) -> Ciphertext:
        """Index the leading batch axis as a Python sequence. Raises ShapeError for a position outside it."""
        self._check_axis(a)
        size, rest = a.batch_shape[0], a.batch_shape[1:]
        if isinstance(index, slice):
            return replace(a, payload=self._take(a, index), batch_shape=(len(range(*index.indices(size))), *rest))
        return replace(a, payload=self._take(a, self._check_index(index, size)), batch_shape=rest)

    def stack(self, items: Sequence[Ciphertext]) -> Ciphertext:
        """Stack ciphertexts of one level, scale and shape along a new leading axis."""
        if not items:
            raise ShapeError("stack needs at least one ciphertext")
        first = items[0]
        for other in items[1:]:
            self._check_pair(first, other, same_scale=True)
            if other.batch_shape != first.batch_shape or other.components != first.components:
                raise ShapeError("stack needs ciphertexts of one batch shape and component count")
        return replace(first, payload=self._stack(items), batch_shape=(len(items), *first.batch_shape))

    def reshape(self, a: Ciphertext, batch_shape: tuple[int, ...]) -> Ciphertext:
        if math.prod(batch_shape) != a.count or any(n < 0 for n in batch_shape):
            raise ShapeError(f"cannot reshape a batch of {a.batch_shape} to {batch_shape}: give every axis its length")
        return replace(a, payload=self._reshape(a, batch_shape), batch_shape=batch_shape)

    # ---- bytes: the container of hf_he.serialization; loaders raise CorruptFileError, ParameterError or WrongKeyError ----
    @abstractmethod
    def serialize(self, item: Any, *, allow_secret: bool = False) -> bytes:
        """Bytes of a Ciphertext, EvaluationKeys without their bootstrapping half, public key, or (with allow_secret=True) a secret key."""

    @abstractmethod
    def deserialize(self, data: bytes, kind: str) -> Any:
        """The inverse; kind in {"ciphertext", "evaluation_keys", "public_key", "secret_key"} must match what the bytes hold."""

    @abstractmethod
    def save_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> int:
        """Write the bootstrapping half of `keys`, which `serialize` refuses, into a folder; returns the bytes written."""

    def write_bootstrapping_keys(self, secret_key: Any, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> int:
        """Make the keys of `bootstrap` and write them as `save_bootstrapping_keys` would; one by one, never all in memory, where the backend can."""
        return self.save_bootstrapping_keys(self.generate_evaluation_keys(secret_key, (), bootstrapping=True, progress=progress), folder)

    @abstractmethod
    def load_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> EvaluationKeys:
        """`keys` completed by what save_bootstrapping_keys wrote. Raises CorruptFileError, ParameterError or WrongKeyError."""
