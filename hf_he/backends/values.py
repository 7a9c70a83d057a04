"""What backends hand out: batches of ciphertexts and plaintexts, and the keys of a server. Payloads belong to the backend that made them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Ciphertext:
    """A batch of CKKS ciphertexts. `payload` belongs to the backend; `key_id` names the secret key it was encrypted under."""

    payload: Any = field(repr=False)
    batch_shape: tuple[int, ...]
    level: int
    scale: float
    key_id: str
    components: int = 2

    @property
    def count(self) -> int:
        return math.prod(self.batch_shape)


@dataclass(frozen=True, eq=False)
class Plaintext:
    """A batch of encoded vectors, `period` distinct slots each, usable with ciphertexts at exactly `level`."""

    payload: Any = field(repr=False)
    batch_shape: tuple[int, ...]
    level: int
    scale: float
    period: int


@dataclass(frozen=True, eq=False)
class EvaluationKeys:
    """Public material a server needs: relinearisation, Galois keys for `rotations`, optionally conjugation and bootstrapping.

    `levels`: the highest level at which a rotation can be used, where that is not the top.
    """

    payload: Any = field(repr=False)
    key_id: str
    rotations: frozenset[int]
    conjugation: bool = False
    bootstrapping: Any = field(default=None, repr=False)
    levels: Mapping[int, int] = field(default_factory=dict, repr=False)
