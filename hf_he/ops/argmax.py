"""The largest of many logits as a one-hot vector, on ciphertexts: iterated squaring and normalisation.

From w = ((1 + x / bound) / 2)^2, which increases with the logit x, w <- w^2 / sum w^2 doubles the exponent every time: the share of the largest logit
tends to 1 and all others to 0. Everything happens on one ciphertext, with its values spread over the lanes as hf_he.ops.uniform spreads wide
states; a sum takes log2 of their number of rotations, the reciprocal a guess and Goldschmidt's iteration.

What it resolves: after k iterations two logits that differ by g around x are in the ratio exp(2^(k + 1) g / (bound + x)). With 12 iterations and a bound of
16, g = 0.01 at x = 8 is a ratio of 30. Closer logits give a blend, which the largest entry of the result shows.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from hf_he.approximation import Reciprocal, fit_reciprocal
from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import reduce
from hf_he.ops.context import OperationContext
from hf_he.ops.goldschmidt import evaluate_reciprocal
from hf_he.ops.uniform import Spread
from hf_he.packing import Packing

LOGIT_BOUND = 16.0
ITERATIONS = 12
MAX_CANDIDATES = 4096


def normaliser(candidates: int) -> Reciprocal:
    """1 / sum w^2 on an interval of length 2, whose slope towards [-1, 1] is 1; from less than 1 / candidates, all alike, on."""
    low = min(1e-3, 0.9 / candidates)
    return fit_reciprocal((low, low + 2.0), 31, 4)


def reference(logits: torch.Tensor, iterations: int = ITERATIONS, bound: float = LOGIT_BOUND) -> torch.Tensor:
    """[V] -> [V] near a one-hot vector, by the same polynomials."""
    approximation = normaliser(len(logits))
    w = ((1.0 + logits / bound) / 2.0).square() / math.sqrt(len(logits))
    for _ in range(iterations):
        squares = w.square()
        w = squares * approximation(squares.sum())
    return w


def encrypted(context: OperationContext, logits: Ciphertext, candidates: int, iterations: int = ITERATIONS, bound: float = LOGIT_BOUND) -> Ciphertext:
    """[1] spread logits in [-bound, bound] -> [1] near a one-hot vector, at level 1 or higher.

    An iteration takes 12 levels, or two refreshes where there are 7, and log2(candidates) rotations.

    Raises ShapeError for more candidates than one ciphertext holds, or than MAX_CANDIDATES: shares that small drown in the noise.
    """
    backend, packing = context.backend, context.packing
    spread = Spread.of(candidates, packing)
    if candidates > MAX_CANDIDATES or spread.ciphertexts > 1 or logits.batch_shape != (1,):
        raise ShapeError(f"an encrypted choice among {candidates} tokens does not work: at most {min(MAX_CANDIDATES, packing.slots)}; let the client choose")
    approximation = normaliser(candidates)
    low, high = approximation.interval
    with backend.log.measure("selection"):
        x = context.ensure_level(logits, 2)
        start, inside = 0.5 * candidates**-0.25, np.ones(candidates)
        slope = context.canonical_factor(x.level, x.scale)
        plain = context.constant(("argmax", candidates, bound), x.level, slope, lambda: start / bound * spread.place(inside))
        x = backend.rescale(backend.multiply_plain(x, plain))
        x = backend.add_plain(x, context.constant(("argmax", candidates), x.level, x.scale, lambda: start * spread.place(inside)))
        w = context.square(x)
        for _ in range(iterations):
            squares = context.square(context.ensure_level(w, 4))
            total = squares
            for step in lane_steps(packing, candidates):
                total = reduce.rotate_and_add(context, total, step)
            inverse = evaluate_reciprocal(context, backend.add_scalar(total, -0.5 * (high + low)), approximation, 2)
            level = min(2, inverse.level)
            squares = context.ensure_level(squares, level)
            w = context.product(backend.match_level(squares, level), backend.match_level(inverse, level))
        return context.ensure_level(w, 1)


def lane_steps(packing: Packing, candidates: int) -> list[int]:
    """Rotations that sum over all places of the spread vector, which is periodic."""
    spread = Spread.of(candidates, packing)
    return reduce.power_steps(1, spread.split * spread.c)


def rotations(packing: Packing, candidates: int) -> set[int]:
    """Rotation steps of `encrypted`."""
    return set(lane_steps(packing, candidates))
