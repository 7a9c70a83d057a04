"""Operation counts by primitive and level, and what each of them costs on the native engine of this machine."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_he.backends.base import Ciphertext, Plaintext
from hf_he.backends.counting import CountingBackend, results
from hf_he.backends.native import NativeBackend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.packing import Packing
from hf_he.planner import CountingSession

Units = Counter[tuple[str, int]]
"""How much of what at which level. Rotations are counted as decompositions and hoisted steps, or as summed steps and their divisions; sums and
sums of products with plaintexts of all slots as terms and results. "Component" names are per component."""

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
PAIR = 2
"""Ciphertexts that one bootstrap carries."""


class PricedBackend(CountingBackend):
    """A counting backend that keeps apart what is priced apart."""

    def reset(self) -> None:
        super().reset()
        self.units: Units = Counter()

    def take_units(self) -> Units:
        """What was counted since the last time."""
        units = self.units
        self.reset()
        return units

    def refresh(self, backend: Any, ct: Ciphertext, level: int, iterations: int = 1) -> Ciphertext:
        if self.parameters.bootstrap_moduli:
            self.units["refresh", 0] += ct.count * iterations
        else:
            self.units["refresh", ct.level] += ct.count
        return super().refresh(backend, ct, level, iterations)

    def _rotate(self, a: Ciphertext, steps: Sequence[int]) -> None:
        moving = sum(1 for s in steps if s)
        self.units["decompose", a.level] += a.count * bool(moving)
        self.units["hoisted rotation", a.level] += a.count * moving
        super()._rotate(a, steps)

    def _sum_rotated(self, a: Ciphertext, steps: Sequence[int]) -> None:
        rest, moving = a.count // a.batch_shape[0], sum(1 for s in steps if s)
        self.units["summed rotation", a.level] += rest * moving
        self.units["sum of rotations", a.level] += rest * bool(moving)
        super()._sum_rotated(a, steps)

    def _relinearize(self, a: Ciphertext) -> None:
        self.units["relinearize", a.level] += a.count
        super()._relinearize(a)

    def _rescale(self, a: Ciphertext) -> None:
        self.units["rescale component", a.level] += a.count * a.components
        super()._rescale(a)

    def _multiply(self, a: Ciphertext, b: Ciphertext) -> None:
        self.units["multiply", a.level] += results(a, b)
        super()._multiply(a, b)

    def _add(self, a: Ciphertext, b: Ciphertext) -> None:
        self.units["add component", a.level] += results(a, b) * max(a.components, b.components)
        super()._add(a, b)

    def _sum(self, a: Ciphertext) -> None:
        self.units["sum component", a.level] += a.count * a.components
        self.units["sum of components", a.level] += a.count // a.batch_shape[0] * a.components
        super()._sum(a)

    def _add_plain(self, a: Ciphertext, b: Plaintext) -> None:
        self.units["add component", a.level] += results(a, b) * a.components
        super()._add_plain(a, b)

    def _multiply_plain(self, a: Ciphertext, b: Plaintext) -> None:
        self.units["full-slot multiply_plain" if self._fills(b) else "multiply_plain", a.level] += results(a, b)
        super()._multiply_plain(a, b)

    def _multiply_plain_sum(self, plain: Any, a: Ciphertext) -> None:
        count = plain.batch_shape[0] * a.count
        if self._fills(plain):
            self.units["full-slot product", a.level] += count
            self.units["sum of full-slot products", a.level] += count // a.batch_shape[0]
        else:
            self.units["multiply_plain_sum", a.level] += count
        super()._multiply_plain_sum(plain, a)

    def _fills(self, plain: Plaintext) -> bool:
        """Whether it takes the memory of all slots: one that repeats stays in cache, and has another kernel."""
        return plain.period == self.parameters.slots

    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> None:
        self.units["weight", a.level] += weights.shape[0] * a.count
        super()._linear_combination(weights, a)

    def _multiply_integer(self, a: Ciphertext, value: int) -> None:
        self.units["multiply_scalar", a.level] += a.count

    def _encode(self, values: np.ndarray, level: int, scale: float) -> None:
        self.units["encode", level] += values.size // values.shape[-1]

    def _copies(self, a: Ciphertext, *args: Any) -> None:
        self.units["add component", a.level] += a.count * a.components

    _negate = _add_scalar = _copies

    def _drop_level(self, a: Ciphertext, level: int) -> None:
        self.units["copy component", level] += a.count * a.components

    def _stack(self, items: Sequence[Ciphertext]) -> None:
        self.units["copy component", items[0].level] += sum(item.count * item.components for item in items)


class PricedSession(CountingSession):
    """A session on a PricedBackend."""

    def __init__(self, parameters: CKKSParameters, packing: Packing) -> None:
        super().__init__(parameters, packing)
        self.backend = self.refresh = PricedBackend(parameters)


class Prices:
    """Seconds of each unit of one parameter set on the native engine, measured when first asked for: medians of `runs`."""

    def __init__(self, parameters: CKKSParameters, runs: int = 3, refresh: bool = True) -> None:
        self.backend = NativeBackend(parameters)
        self.runs = runs
        self._secret = self.backend.generate_secret_key()
        bootstrapping = refresh and bool(parameters.bootstrap_moduli)
        self.backend.load_evaluation_keys(self.backend.generate_evaluation_keys(self._secret, STEPS, bootstrapping=bootstrapping))
        self._generator = np.random.default_rng(0)
        self._fresh = self.backend.encrypt(self._generator.uniform(-1, 1, (len(STEPS), parameters.slots)), self._secret)
        self._known: dict[tuple[str, int], float] = {}

    def seconds(self, units: Units, announce: Callable[[str], None] = lambda text: None) -> dict[str, float]:
        """Total seconds by unit."""
        total: Counter[str] = Counter()
        for (name, level), count in units.items():
            if count:
                if (name, level) not in self._known:
                    announce(f"{name} at level {level}")
                total[name] += count * self.of(name, level)
        return dict(total)

    def of(self, name: str, level: int) -> float:
        """Seconds of one unit at `level`."""
        if (name, level) not in self._known:
            self._measure(name, level)
        return self._known[name, level]

    def _measure(self, name: str, level: int) -> None:
        for whole, part, few, run in _SPLIT:
            if name in (whole, part):
                first, all_ = run(self, level, few), run(self, level, len(STEPS))
                step = (all_ - first) / (len(STEPS) - few)
                self._known[part, level], self._known[whole, level] = step, max(first - few * step, 0.0)
                return
        self._known[name, level] = _MEASURES[name](self, level)

    def _at(self, level: int, count: int) -> Ciphertext:
        return self.backend.take(self.backend.drop_level(self._fresh, level), slice(0, count))

    def _median(self, run: Callable[[], Any]) -> float:
        run()
        times = []
        for _ in range(self.runs):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return statistics.median(times)

    def _rotations(self, level: int, count: int) -> float:
        a = self._at(level, 1)
        return self._median(lambda: self.backend.rotate(a, STEPS[:count]))

    def _summed(self, level: int, count: int) -> float:
        a = self._at(level, count)
        return self._median(lambda: self.backend.sum_rotated(a, STEPS[:count]))

    def _sum(self, level: int, count: int) -> float:
        """Per component."""
        a = self._at(level, count)
        return self._median(lambda: self.backend.sum(a)) / 2

    def _full_products(self, level: int, count: int) -> float:
        """Of every one of 8 results."""
        a, plain = self._at(level, count), self.backend.encode(self._full(len(STEPS), count), level, 1.0)
        return self._median(lambda: self.backend.multiply_plain_sum(plain, a)) / len(STEPS)

    def _full(self, *shape: int) -> np.ndarray:
        return self._generator.uniform(-1, 1, (*shape, self.backend.parameters.slots))

    def _relinearize(self, level: int) -> float:
        a = self._products(level)
        return self._median(lambda: self.backend.relinearize(a)) / a.count

    def _products(self, level: int) -> Ciphertext:
        """Three components; which values they hold does not matter for their time."""
        a = self._at(level, 4)
        return self.backend.multiply(a, a)

    def _rescale(self, level: int) -> float:
        a = self._at(level, 4)
        return self._median(lambda: self.backend.rescale(a)) / (2 * a.count)

    def _multiply(self, level: int) -> float:
        a, b = self._at(level, 8), self._at(level, 1)
        return self._median(lambda: self.backend.multiply(a, b)) / a.count

    def _add(self, level: int) -> float:
        a = self._at(level, 8)
        return self._median(lambda: self.backend.add(a, a)) / (2 * a.count)

    def _multiply_plain(self, level: int) -> float:
        return self._multiply_by(level, self._generator.uniform(-1, 1, 128))

    def _multiply_full_plain(self, level: int) -> float:
        return self._multiply_by(level, self._full())

    def _multiply_by(self, level: int, values: np.ndarray) -> float:
        a, plain = self._at(level, 4), self.backend.encode(values, level, 1.0)
        return self._median(lambda: self.backend.multiply_plain(a, plain)) / a.count

    def _multiply_plain_sum(self, level: int) -> float:
        a, plain = self._at(level, 8), self.backend.encode(self._generator.uniform(-1, 1, (8, 8, 128)), level, 1.0)
        return self._median(lambda: self.backend.multiply_plain_sum(plain, a)) / (8 * a.count)

    def _multiply_scalar(self, level: int) -> float:
        a = self._at(level, 4)
        return self._median(lambda: self.backend.multiply_scalar(a, 1.0, 3.0)) / a.count

    def _encode(self, level: int) -> float:
        values = self._full(2)
        return self._median(lambda: self.backend.encode(values, level)) / 2

    def _copy(self, level: int) -> float:
        parts = [self.backend.take(self._at(level, 4), i) for i in range(4)]
        return self._median(lambda: self.backend.stack(parts)) / (2 * len(parts))

    def _refresh(self, level: int) -> float:
        """A bootstrap of a pair, per ciphertext; or what a client does, without the network."""
        if self.backend.parameters.bootstrap_moduli:
            a = self._at(0, PAIR)
            a = self.backend.encrypt(self._generator.uniform(-1, 1, (PAIR, self.backend.parameters.slots)), self._secret, 0)
            return self._median(lambda: self.backend.bootstrap(a)) / PAIR
        a = self._at(level, 1)

        def answer() -> None:
            data = self.backend.serialize(a)
            values = self.backend.decrypt(self.backend.deserialize(data, "ciphertext"), self._secret)
            self.backend.deserialize(self.backend.serialize(self.backend.encrypt(values, self._secret)), "ciphertext")

        return self._median(answer)


_MEASURES: dict[str, Callable[[Prices, int], float]] = {
    "relinearize": Prices._relinearize,
    "rescale component": Prices._rescale,
    "multiply": Prices._multiply,
    "add component": Prices._add,
    "multiply_plain": Prices._multiply_plain,
    "full-slot multiply_plain": Prices._multiply_full_plain,
    "multiply_plain_sum": Prices._multiply_plain_sum,
    "multiply_scalar": Prices._multiply_scalar,
    "encode": Prices._encode,
    "copy component": Prices._copy,
    "refresh": Prices._refresh,
}

_SPLIT: tuple[tuple[str, str, int, Callable[[Prices, int, int], float]], ...] = (
    ("decompose", "hoisted rotation", 1, Prices._rotations),
    ("sum of rotations", "summed rotation", 2, Prices._summed),
    ("sum of components", "sum component", 1, Prices._sum),
    ("sum of full-slot products", "full-slot product", 1, Prices._full_products),
)
"""What a call costs once and per term: names of both, and the two numbers of terms (the second that of STEPS) that tell them apart."""
