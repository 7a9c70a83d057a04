"""The adapter's side of a backend: payloads in, payloads out, operands already checked; and those checks."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_he.backends.values import Ciphertext, EvaluationKeys, Plaintext
from hf_he.errors import BackendUnavailableError, LevelError, MissingKeyError, ParameterError, ScaleMismatchError, ShapeError, WrongKeyError

if TYPE_CHECKING:
    from hf_he.ckks.parameters import CKKSParameters

SCALE_TOLERANCE = 1e-9
LEAST_FACTOR = 2.0**20
"""A factor is rounded to an integer: below this, the rounding would be an error that no noise estimate knows of."""


class Adapter(ABC):
    """What an adapter implements: one method per primitive. Batch shapes, levels, scales and keys fit when they are called."""

    parameters: CKKSParameters
    evaluation_keys: EvaluationKeys | None

    @abstractmethod
    def _encode(self, values: np.ndarray, level: int, scale: float) -> Any: ...
    @abstractmethod
    def _encrypt(self, values: np.ndarray, key: Any, level: int, scale: float) -> Any: ...
    @abstractmethod
    def _decrypt(self, ct: Ciphertext, secret_key: Any) -> np.ndarray: ...
    @abstractmethod
    def _add(self, a: Ciphertext, b: Ciphertext) -> Any: ...
    @abstractmethod
    def _subtract(self, a: Ciphertext, b: Ciphertext) -> Any: ...
    @abstractmethod
    def _negate(self, a: Ciphertext) -> Any: ...
    @abstractmethod
    def _add_plain(self, a: Ciphertext, b: Plaintext) -> Any: ...
    @abstractmethod
    def _add_scalar(self, a: Ciphertext, value: float) -> Any: ...
    @abstractmethod
    def _sum(self, a: Ciphertext) -> Any: ...
    @abstractmethod
    def _multiply(self, a: Ciphertext, b: Ciphertext) -> Any: ...
    @abstractmethod
    def _multiply_plain(self, a: Ciphertext, b: Plaintext) -> Any: ...
    @abstractmethod
    def _multiply_plain_sum(self, plain: Plaintext, a: Ciphertext) -> Any: ...
    @abstractmethod
    def _multiply_integer(self, a: Ciphertext, value: int) -> Any: ...
    @abstractmethod
    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> Any: ...
    @abstractmethod
    def _relinearize(self, a: Ciphertext) -> Any: ...
    @abstractmethod
    def _rescale(self, a: Ciphertext) -> Any: ...
    @abstractmethod
    def _drop_level(self, a: Ciphertext, level: int) -> Any: ...
    @abstractmethod
    def _rotate(self, a: Ciphertext, steps: tuple[int, ...]) -> Any: ...
    @abstractmethod
    def _sum_rotated(self, a: Ciphertext, steps: tuple[int, ...]) -> Any: ...
    @abstractmethod
    def _conjugate(self, a: Ciphertext) -> Any: ...
    @abstractmethod
    def _bootstrap(self, a: Ciphertext, divisor: int = 1) -> Any: ...
    @abstractmethod
    def _take(self, a: Ciphertext, index: int | slice) -> Any: ...
    @abstractmethod
    def _stack(self, items: Sequence[Ciphertext]) -> Any: ...
    @abstractmethod
    def _reshape(self, a: Ciphertext, batch_shape: tuple[int, ...]) -> Any: ...

    # ---- checks ----
    def _check_level(self, level: int) -> None:
        if not isinstance(level, int | np.integer) or not 0 <= level <= self.parameters.max_level:
            raise LevelError(f"a level is an integer of 0..{self.parameters.max_level} with these parameters, not {level!r}")

    def _reals(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        if np.iscomplexobj(values):
            raise ShapeError("slots are real: pass .real, or the real and the imaginary part as two vectors")
        if not values.ndim:
            raise ShapeError("slots are vectors, got a single number: pass np.array([value]) to encode, or use add_scalar and multiply_scalar")
        return values.astype(np.float64, copy=False)

    def _check_fingerprint(self, key: Any) -> None:
        if key.fingerprint != self.parameters.fingerprint:
            raise ParameterError("this key was generated for other CKKS parameters: use the parameter set named in its file, or generate new keys")

    def _levels_of(self, rotations: Iterable[int] | Mapping[int, int]) -> dict[int, int]:
        """Highest level of each rotation step asked for, in ascending order."""
        top = self.parameters.max_level
        asked = rotations.items() if isinstance(rotations, Mapping) else ((step, top) for step in rotations)
        levels: dict[int, int] = {}
        for step, level in asked:
            self._check_level(level)
            step = self._rotation_step(step)
            levels[step] = max(level, levels.get(step, 0))
        return {step: levels[step] for step in sorted(levels.keys() - {0})}

    def _rotation_step(self, step: int) -> int:
        """The same rotation as a step of 0 ... slots - 1."""
        try:
            return operator.index(step) % self.parameters.slots
        except TypeError:
            raise ShapeError(f"a rotation step is a whole number of slots, not {step!r}") from None

    def _check_pair(self, a: Ciphertext, b: Ciphertext, same_scale: bool = False) -> None:
        if a.key_id != b.key_id:
            raise WrongKeyError("the two ciphertexts belong to different secret keys")
        if a.level != b.level:
            raise LevelError(f"operands are at levels {a.level} and {b.level}: bring them together with match_level")
        if same_scale:
            self._check_scales(a.scale, b.scale)

    def _check_scales(self, a: float, b: float) -> None:
        if abs(a / b - 1) > SCALE_TOLERANCE:
            raise ScaleMismatchError(f"scales 2^{math.log2(a):.4f} and 2^{math.log2(b):.4f} differ: rescale, or use match_level")

    def _check_plain(self, a: Ciphertext, b: Plaintext) -> None:
        if a.level != b.level:
            raise LevelError(f"the plaintext was encoded at level {b.level}, the ciphertext is at {a.level}: encode it at the ciphertext's level")

    def _check_scale(self, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ParameterError(f"a scale must be positive and finite, got {scale}: leave it out for the canonical one of the level")

    def _check_product(self, a: Ciphertext, scale: float) -> None:
        self._check_scale(scale)
        bits = math.log2(a.scale * scale)
        if bits > self.parameters.log2_modulus(a.level) - 1:
            raise ScaleMismatchError(f"a scale of 2^{bits:.1f} does not fit the modulus of level {a.level}: rescale before multiplying")

    def _check_fits(self, values: np.ndarray, scale: float, level: int) -> None:
        """Plaintext values times their scale must stay below half the modulus: beyond it they would come back as other values."""
        largest = float(np.abs(values).max(initial=0.0))
        if largest and math.log2(largest) + math.log2(scale) > self.parameters.log2_modulus(level) - 1:
            raise ScaleMismatchError(
                f"a value of 2^{math.log2(largest):.1f} at a scale of 2^{math.log2(scale):.1f} does not fit the modulus of level {level}: "
                "encode it at a higher level or a smaller scale"
            )

    def _matching_factor(self, a: Ciphertext, level: int) -> float:
        """The integer, but for rounding, that `a` times and rescaled to `level` is canonical there."""
        factor = self.parameters.scale_at(level) * self.parameters.moduli[level + 1] / a.scale
        if factor < LEAST_FACTOR:
            raise ScaleMismatchError(f"a scale of 2^{math.log2(a.scale):.1f} is too large to be matched to level {level}: rescale the product first")
        return factor

    def _check_scalar(self, value: float) -> float:
        if np.iscomplexobj(value):
            raise ParameterError("a scalar operand must be real: multiply or add its real and its imaginary part apart")
        value = float(value)
        if not math.isfinite(value):
            raise ParameterError(f"a scalar operand must be finite, got {value}: check the weights")
        return value

    def _check_bootstraps_all_slots(self, bootstrapping_slots: int) -> None:
        if not self.parameters.bootstrap_moduli:
            raise BackendUnavailableError("these parameters do not bootstrap: use the parameter set n16-bootstrap, or --refresh client")
        if bootstrapping_slots not in (0, self.parameters.slots):
            raise BackendUnavailableError("this backend bootstraps all slots only: leave bootstrapping_slots out, or use --backend native")

    def _check_two(self, a: Ciphertext) -> None:
        if a.components != 2:
            raise ShapeError("this ciphertext has 3 components: relinearize it first")

    def _check_axis(self, a: Ciphertext) -> None:
        if not a.batch_shape:
            raise ShapeError("this operation works on the leading batch axis; the ciphertext has none")

    def _check_terms(self, a: Ciphertext) -> None:
        self._check_axis(a)
        if not a.batch_shape[0]:
            raise ShapeError(f"a sum needs at least one entry along the leading batch axis, the batch is {a.batch_shape}: leave the empty sum out")

    def _check_matrix(self, operation: str, what: str, shape: tuple[int, ...], a: Ciphertext) -> None:
        if len(shape) != 2 or not a.batch_shape or shape[1] != a.batch_shape[0] or 0 in shape:
            raise ShapeError(
                f"{operation} takes {what}, each at least 1, and as many ciphertexts along the leading batch axis as columns, "
                f"got {tuple(shape)} and {a.batch_shape}"
            )

    def _check_index(self, index: int, size: int) -> int:
        """The position 0..size - 1 that an integer, counted from the end if negative, stands for."""
        try:
            position = operator.index(index)
        except TypeError:
            raise ShapeError(f"take needs an integer or a slice, got {type(index).__name__}: take positions one by one and stack them") from None
        if not -size <= position < size:
            raise ShapeError(f"position {position} is outside a leading batch axis of {size}: take 0..{size - 1}, or a negative one counted from its end")
        return position % size

    def _keys_for(self, a: Ciphertext) -> EvaluationKeys:
        if self.evaluation_keys is None:
            raise MissingKeyError("no evaluation keys are loaded: call load_evaluation_keys first")
        if self.evaluation_keys.key_id != a.key_id:
            raise WrongKeyError(f"the ciphertext belongs to key {a.key_id}, the loaded evaluation keys to {self.evaluation_keys.key_id}")
        return self.evaluation_keys

    def _check_steps(self, a: Ciphertext, steps: Sequence[int]) -> tuple[int, ...]:
        self._check_two(a)
        steps = tuple(map(self._rotation_step, steps))
        if not steps:
            raise ShapeError("a rotation takes at least one step: leave the call out for none")
        if any(steps):
            keys = self._keys_for(a)
            missing = sorted({s for s in steps if s} - keys.rotations)
            if missing:
                raise MissingKeyError(f"no Galois key for rotation steps {missing}: list them when generating the evaluation keys")
            low = sorted(s for s in set(steps) if keys.levels.get(s, a.level) < a.level)
            if low:
                raise MissingKeyError(
                    f"the Galois keys for rotation steps {low} serve lower levels than {a.level} only: generate the evaluation keys for the levels of their use"
                )
        return steps


def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        raise ShapeError(f"batch shapes {a} and {b} do not broadcast") from None
