"""The non-polynomial functions that can be fitted: values, symmetry, kinks and derivative bounds (for certified errors). numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Function:
    """A real function to approximate.

    `parity` is used on symmetric intervals: "odd", "odd_plus_half" (1/2 + an odd function) or "even_plus_half_identity" (x / 2 + an
    even one). `derivative_bounds(lo, hi)` returns bounds of |f'| and |f''| between the kinks. `root` r > 0 marks v^(-1/r), fitted in
    relative error on positive intervals.
    """

    value: Callable[[np.ndarray], np.ndarray]
    derivative_bounds: Callable[[float, float], tuple[float, float]] | None = None
    parity: str = "none"
    root: int = 0
    kinks: tuple[float, ...] = ()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


FUNCTIONS: dict[str, Function] = {
    "gelu": Function(lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))), lambda low, high: (1.13, 0.8), parity="even_plus_half_identity"),
    "relu": Function(lambda x: np.maximum(x, 0.0), lambda low, high: (1.0, 0.0), parity="even_plus_half_identity", kinks=(0.0,)),
    "silu": Function(lambda x: x * _sigmoid(x), lambda low, high: (1.1, 0.5), parity="even_plus_half_identity"),
    "sigmoid": Function(_sigmoid, lambda low, high: (0.25, 0.1), parity="odd_plus_half"),
    "tanh": Function(np.tanh, lambda low, high: (1.0, 0.77), parity="odd"),
    "exp": Function(np.exp, lambda low, high: (math.exp(high), math.exp(high))),
    "inverse_sqrt": Function(lambda x: 1.0 / np.sqrt(x), root=2),
    "reciprocal": Function(lambda x: 1.0 / x, root=1),
}
