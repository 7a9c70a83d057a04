"""A backend without values: it keeps levels, scales and shapes as every other, and counts operations, rotation levels and estimated time.

Times are those of one core, in number-theoretic transforms: what each primitive of RNS-CKKS with hybrid key switching does of them (Han and Ki,
CT-RSA 2020), and what the native engine takes for one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_he.backends.adapter import broadcast
from hf_he.backends.base import Ciphertext, EvaluationKeys, HEBackend, Plaintext
from hf_he.ckks.parameters import CKKSParameters

TRANSFORM_SECONDS = 2.1e-10
"""Per N log2 N: 48 us at N = 2^14, 220 us at 2^16, as measured between other work."""

POINTWISE = 0.15
"""A pointwise product of two rows in a fused kernel, in transforms."""

COMBINED = 0.018
"""One integer weight times one row in a matrix product over ciphertexts, in transforms: 20 G products a second on one core."""

PASS = 0.9
"""Writing one row of a new ciphertext where nothing else is done with it: at N = 2^16 memory, not arithmetic, sets the pace."""

BOOTSTRAP_TRANSFORMS = 16_000
"""Of one bootstrap: 3.5 seconds on one core at N = 2^16, half a run of two ciphertexts."""

ROUND_TRIP_SECONDS = 0.1
"""A refresh by the client: one message each way, whatever it holds."""

ANSWER_TRANSFORMS = 220
"""What the client does per ciphertext: decryption, encryption, checksums; 10 ms at N = 2^14 with 7 levels."""


def results(a: Ciphertext, b: Ciphertext | Plaintext) -> int:
    """How many ciphertexts an operation on both gives: the entries of their broadcast batch shape, more than either has for (4, 1) and (1, 5)."""
    return math.prod(broadcast(a.batch_shape, b.batch_shape))


class CountingBackend(HEBackend):
    """Every operation costs microseconds; nothing is encrypted and nothing can be decrypted."""

    name = "counting"
    KEY_ID = "0" * 16

    def __init__(self, parameters: CKKSParameters) -> None:
        super().__init__(parameters)
        self.evaluation_keys = EvaluationKeys(None, self.KEY_ID, frozenset(range(1, parameters.slots)))
        self._transform = TRANSFORM_SECONDS * parameters.ring_degree * math.log2(parameters.ring_degree)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.log.reset()
        self.seconds: Counter[str] = Counter()
        self.rotation_levels: dict[int, int] = {}
        self.relinearization_level = 0
        self.refreshes: list[tuple[int, int]] = []

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def fresh(self, level: int) -> Ciphertext:
        """A batch [1] at a level's canonical scale."""
        return Ciphertext(None, (1,), level, self.parameters.scale_at(level), self.KEY_ID)

    def refresh(self, backend: HEBackend, ct: Ciphertext, level: int, iterations: int = 1) -> Ciphertext:
        """As a RefreshPolicy: the top level, at the cost of bootstraps where the parameters bootstrap, of a round trip otherwise."""
        top = self.parameters.max_level
        self.refreshes.append((ct.level, ct.count))
        bootstraps = bool(self.parameters.bootstrap_moduli)
        each = BOOTSTRAP_TRANSFORMS if bootstraps else ANSWER_TRANSFORMS
        self.seconds["refresh"] += ct.count * each * self._transform * (iterations if bootstraps else 1) + (0.0 if bootstraps else ROUND_TRIP_SECONDS)
        return replace(ct, level=top, scale=self.parameters.scale_at(top))

    @property
    def count(self) -> int:
        return len(self.refreshes)

    def _spend(self, transforms: float) -> None:
        self.seconds[self.log.scope] += transforms * self._transform

    def _switching(self, level: int, digits: int, products: int, divisions: int) -> float:
        """Transforms of `digits` decompositions, `products` inner products with keys and `divisions` by the special moduli."""
        p, limbs = self.parameters, level + 1
        special = len(p.special_moduli)
        dnum = -(-limbs // p.digit_size)
        rows = limbs + special
        return digits * dnum * rows + products * 2 * dnum * rows * POINTWISE + divisions * 2 * rows

    def _rotate(self, a: Ciphertext, steps: Sequence[int]) -> None:
        moving = [s for s in steps if s]
        self._use(moving, a.level)
        self._spend(a.count * self._switching(a.level, bool(moving), len(moving), len(moving)))

    def _sum_rotated(self, a: Ciphertext, steps: Sequence[int]) -> None:
        moving = [s for s in steps if s]
        self._use(moving, a.level)
        self._spend(a.count // a.batch_shape[0] * self._switching(a.level, len(moving), len(moving), 1))

    def _use(self, steps: Sequence[int], level: int) -> None:
        for step in steps:
            self.rotation_levels[step] = max(level, self.rotation_levels.get(step, 0))

    def _relinearize(self, a: Ciphertext) -> None:
        self.relinearization_level = max(self.relinearization_level, a.level)
        self._spend(a.count * (self._switching(a.level, 1, 1, 1) + 2 * (a.level + 1) * PASS))

    def _rescale(self, a: Ciphertext) -> None:
        self._spend(a.count * a.components * (a.level + 1) * (1 + PASS))

    def _multiply(self, a: Ciphertext, b: Ciphertext) -> None:
        self._spend(3 * results(a, b) * (a.level + 1) * PASS)

    def _add(self, a: Ciphertext, b: Ciphertext) -> None:
        self._spend(results(a, b) * max(a.components, b.components) * (a.level + 1) * PASS)

    def _subtract(self, a: Ciphertext, b: Ciphertext) -> None:
        self._add(a, b)

    def _sum(self, a: Ciphertext) -> None:
        self._spend(a.count * a.components * (a.level + 1) * PASS)

    def _add_plain(self, a: Ciphertext, b: Plaintext) -> None:
        self._spend(results(a, b) * a.components * (a.level + 1) * PASS)

    def _multiply_plain(self, a: Ciphertext, b: Plaintext) -> None:
        self._spend(results(a, b) * a.components * (a.level + 1) * POINTWISE)

    def _multiply_plain_sum(self, plain: Any, a: Ciphertext) -> None:
        self._spend(2 * plain.batch_shape[0] * a.count * (a.level + 1) * POINTWISE)

    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> None:
        self._spend(weights.shape[0] * a.count * a.components * (a.level + 1) * COMBINED)

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    _encode = _encrypt = _decrypt = _negate = _add_scalar = _multiply_integer = _nothing
    _drop_level = _conjugate = _bootstrap = _take = _stack = _reshape = _nothing
    generate_secret_key = generate_public_key = generate_evaluation_keys = _nothing
    serialize = deserialize = save_bootstrapping_keys = write_bootstrapping_keys = load_bootstrapping_keys = _nothing
