"""Gradients of the loss from encrypted logits and encrypted labels: nothing is decrypted, and the server never learns a loss.

Labels are one-hot on the features of each sequence's first token; the sequence weights beside them are 1 on the same features of real sequences
and 0 on every other slot. A gradient is a sum over sequences; whoever packs it divides by their public number. For two classes the softmax is a
sigmoid of the logits' difference; for more it is exp and a reciprocal, of logits whose mean is taken off.

A logit outside the bound cannot be seen under encryption: the client calibrates the bound on logits of the polynomial model
(`CrossEntropy.calibrated`) and checks every one it decrypts; the plaintext twin raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hf_he.approximation import Polynomial, Reciprocal, fit_polynomial, fit_reciprocal
from hf_he.backends.base import Ciphertext
from hf_he.errors import ParameterError, RangeError, ShapeError
from hf_he.ops import feature_major, goldschmidt, polynomial
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.packing import Packing
from hf_he.tensor import Labels

SMALLEST_BOUND = 8.0
EXPONENTIAL_BOUND = 3.0
RECIPROCAL_DEGREE = 15


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy over `num_labels` classes: the gradient in the logits is weight * (softmax(logits) - one_hot).

    `bound`: largest |l_1 - l_0| for two classes, largest |l_k - mean| for more. `degree` is that of the sigmoid: error 6.1e-3 with 15 on [-12, 12],
    7.7e-4 with 23, 9.7e-5 with 31; 8.8e-4 with 15 on [-8, 8]. Levels: 2 + its depth. For more classes it is the degree of exp(x / 2^s) on an interval of at
    most 3, which is squared s times, so that small values keep their relative error; the reciprocal of the sum is fitted on what that sum can be while
    no logit leaves the bound, within 1e-3. Levels: 4 + depth of exp + depth of the reciprocal, with refreshes on the way.
    """

    num_labels: int = 2
    bound: float = 12.0
    degree: int = 15

    def __post_init__(self) -> None:
        if self.num_labels < 2:
            raise ParameterError("cross-entropy needs at least two classes: use MeanSquaredError for a regression")
        if not (math.isfinite(self.bound) and self.bound > 0.0):
            raise ParameterError(f"the bound of the logits must be a positive number, got {self.bound!r}")

    @classmethod
    def calibrated(cls, logits: np.ndarray, margin: float = 0.5, degree: int = 15) -> CrossEntropy:
        """For a model whose logits [rows, classes] are these before training, which may widen their spread by `margin`; the bound is at least 8."""
        logits = np.asarray(logits, dtype=np.float64)
        spread = float(np.abs(logit_spread(logits)).max())
        return cls(logits.shape[1], max(SMALLEST_BOUND, math.ceil(spread * (1.0 + margin))), degree)

    @property
    def sigmoid(self) -> Polynomial:
        return fit_polynomial("sigmoid", (-self.bound, self.bound), self.degree)

    @property
    def squarings(self) -> int:
        return max(0, math.ceil(math.log2(self.bound / EXPONENTIAL_BOUND)))

    @property
    def exponential(self) -> Polynomial:
        """exp of what is left of a logit after halving it `squarings` times."""
        bound = self.bound / 2**self.squarings
        return fit_polynomial("exp", (-bound, bound), self.degree)

    @property
    def largest_sum(self) -> float:
        """Of exp(l_k - mean) over the classes: one at the bound, the others as low as that forces them to be."""
        others = self.num_labels - 1
        return math.exp(self.bound) + others * math.exp(-self.bound / others)

    @property
    def reciprocal(self) -> Reciprocal:
        """1 / v of that sum over `largest_sum`, within 1e-3; the smallest v is that of equal logits. Raises ParameterError where none is that close."""
        interval = (self.num_labels / self.largest_sum, 1.0)
        candidates = (fit_reciprocal(interval, RECIPROCAL_DEGREE, steps) for steps in range(1, 16))
        found = next((reciprocal for reciprocal in candidates if reciprocal.max_error < 1e-3), None)
        if found is None:
            raise ParameterError(
                f"the softmax of {self.num_labels} classes whose logits spread by up to {self.bound:g} has no reciprocal within 1e-3: "
                "let the client take the loss (--loss-location client), or lower loss_bound"
            )
        return found

    def reference(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """[rows, classes] gradient with the same polynomials; `labels` [rows] are classes. Raises RangeError for logits beyond the bound."""
        logits = np.asarray(logits, dtype=np.float64)
        spread = logit_spread(logits)
        if np.abs(spread).max() > self.bound:
            raise RangeError(
                f"loss: logits spread by {np.abs(spread).max():.3g}, the softmax was fitted to {self.bound:g}. Calibrate with a larger margin, "
                "or use a lower learning rate."
            )
        if self.num_labels == 2:
            probabilities = self.sigmoid(spread)
        else:
            values = self.exponential(spread / 2**self.squarings) ** 2**self.squarings / self.largest_sum
            probabilities = values * self.reciprocal(values.sum(1, keepdims=True))
        gradient = probabilities - np.eye(self.num_labels)[np.asarray(labels)]
        return gradient if weights is None else np.asarray(weights)[:, None] * gradient

    def gradient(self, context: OperationContext, logits: Operand, labels: Labels) -> Operand:
        """The gradient in the pooled `logits` [1], zero outside of real sequences' logits. Raises ShapeError for another number of classes."""
        if logits.features != self.num_labels:
            raise ShapeError(f"the loss is over {self.num_labels} classes, the model has {logits.features} logits: make the loss for this model")
        with context.backend.log.measure("loss"):
            probabilities = self._sigmoid(context, logits) if self.num_labels == 2 else self._softmax(context, logits)
            return Operand(context, self.num_labels, _weighted_difference(context, probabilities, labels, 1.0), pooled=True)

    def _sigmoid(self, context: OperationContext, logits: Operand) -> Ciphertext:
        depth = polynomial.depth(self.sigmoid.coefficients)
        mapped = _mix(context, logits.ensure(min(depth + 2, context.top)), np.array([[1.0, -1.0], [-1.0, 1.0]]) / self.bound)
        return polynomial.evaluate(context.backend, context.ensure_level(mapped, depth), self.sigmoid.coefficients)

    def _softmax(self, context: OperationContext, logits: Operand) -> Ciphertext:
        backend, k, reciprocal = context.backend, self.num_labels, self.reciprocal
        root = self.largest_sum ** -(0.5**self.squarings)
        coefficients = tuple(root * c for c in self.exponential.coefficients)
        depth = polynomial.depth(coefficients)
        mapped = _mix(context, logits.ensure(min(depth + self.squarings + 2, context.top)), (np.eye(k) - 1.0 / k) / self.bound)
        values = polynomial.evaluate(backend, context.ensure_level(mapped, depth), coefficients)
        for _ in range(self.squarings):
            values = context.square(context.ensure_level(values, 1))
        low, high = reciprocal.interval
        gain = 2.0 / (high - low)
        values = context.ensure_level(values, 1)
        total = _mix(context, values, np.full((k, k), gain))
        shift = np.where(np.arange(context.packing.features) < k, -(high + low) / (high - low), 0.0)
        total = backend.add_plain(total, context.constant(("loss", k, low), total.level, total.scale, lambda: shift))
        inverse = goldschmidt.evaluate_reciprocal(context, total, reciprocal, 2)
        values = context.ensure_level(values, 3)
        values = backend.match_level(values, min(values.level, inverse.level + 1))
        values = backend.rescale(backend.multiply_scalar(values, gain, context.canonical_factor(values.level, values.scale)))
        level = min(values.level, inverse.level)
        return context.product(backend.match_level(values, level), backend.match_level(inverse, level))


@dataclass(frozen=True)
class MeanSquaredError:
    """Squared error of one output per sequence: the gradient is weight * 2 (prediction - target). One level."""

    num_labels: int = 1

    def reference(self, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """[rows, 1] gradient; `labels` [rows] are numbers."""
        gradient = 2.0 * (np.asarray(logits, dtype=np.float64) - np.asarray(labels, dtype=np.float64).reshape(-1, 1))
        return gradient if weights is None else np.asarray(weights)[:, None] * gradient

    def gradient(self, context: OperationContext, logits: Operand, labels: Labels) -> Operand:
        """The gradient in the pooled `logits` [1], zero outside of real sequences' outputs. Raises ShapeError for more outputs."""
        if logits.features != self.num_labels:
            raise ShapeError(f"the squared error is of {self.num_labels} output, the model has {logits.features} logits: use num_labels=1, or cross-entropy")
        with context.backend.log.measure("loss"):
            return Operand(context, self.num_labels, _weighted_difference(context, logits.ensure(1), labels, 2.0), pooled=True)


Loss = CrossEntropy | MeanSquaredError


def logit_spread(logits: np.ndarray) -> np.ndarray:
    """[rows, classes]: what the bound is about, differences of two logits, of more the distances from their mean."""
    if logits.shape[1] == 2:
        return logits - logits[:, ::-1]
    return logits - logits.mean(1, keepdims=True)


def _weighted_difference(context: OperationContext, values: Ciphertext, labels: Labels, factor: float) -> Ciphertext:
    """factor * weights * (values - one_hot), factor 1 or 2: one level."""
    backend = context.backend
    values, one_hot, weights = context.ensure_levels([(values, 1), (labels.one_hot, 1), (labels.weights, 1)])
    level = min(values.level, one_hot.level, weights.level)
    difference = backend.subtract(backend.match_level(values, level), backend.match_level(one_hot, level))
    out = context.product(difference, backend.match_level(weights, level))
    return out if factor == 1.0 else backend.add(out, out)


def _mix(context: OperationContext, ct: Ciphertext, matrix: np.ndarray) -> Ciphertext:
    """The [k, k] `matrix` times features 0 .. k - 1 of every lane; other features become zero. One level, 2 (k - 1) hoisted rotations; with one
    feature per ciphertext none."""
    backend, k, c = context.backend, len(matrix), context.packing.features
    if c == 1:
        return feature_major.encrypted(context, ct, matrix)
    steps = range(1 - k, k)

    def diagonals() -> np.ndarray:
        rows = np.zeros((1, len(steps), c))
        for index, step in enumerate(steps):
            for feature in range(max(0, -step), min(k, k - step)):
                rows[0, index, feature] = matrix[feature, feature + step]
        return rows

    plain = context.constant(("loss", matrix.tobytes()), ct.level, context.canonical_factor(ct.level, ct.scale), diagonals)
    rotated = backend.rotate(backend.take(ct, 0), steps)
    return backend.rescale(backend.multiply_plain_sum(plain, rotated))


def rotations(packing: Packing, num_labels: int) -> set[int]:
    """Rotation steps of the loss over `num_labels` classes."""
    if packing.features == 1:
        return set()
    return {step % packing.slots for step in range(1 - num_labels, num_labels)} - {0}
