"""In which order a run takes its examples: a new permutation per epoch out of the seed, so that any step can be repeated."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence

import numpy as np


class DataOrder:
    """`rows` examples in batches of `batch_size`; the last batch of an epoch holds what is left."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    def step(self, number: int) -> list[int]:
        """The rows of step `number`, which counts from 1."""
        epoch, batch = divmod(number - 1, self.steps_per_epoch)
        permutation = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return permutation[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def epoch(self, number: int) -> float:
        """Epochs done after step `number`."""
        return number / self.steps_per_epoch

    def digest(self, key: bytes, texts: Sequence[str], labels: Sequence[float]) -> str:
        """32 hex digits that change with the examples and their order, and that only a holder of `key` can compute."""
        described = json.dumps([self.rows, self.batch_size, self.seed, list(texts), list(labels)]).encode()
        return hmac.new(key, described, hashlib.sha256).hexdigest()[:32]
