"""Linear layers on feature-major states: one ciphertext per feature (`Packing` with c = 1, slot = token * B + sequence).

A map of such a state is a matrix product over ciphertexts: no rotation, no key, no encoded weight. Weights become small integers, so that
all of it is one modular matrix product on the residues (`HEBackend.linear_combination`), exact up to the rounding of the weights.
It pays when a batch fills the slots with tokens and sequences: the cost per sequence falls with their number. Attention on such states is in
hf_he.ops.feature_major_attention; norms, activations and sums are those of every other packing.
"""

from __future__ import annotations

import math

import numpy as np

from hf_he.backends.base import Ciphertext
from hf_he.errors import LevelError, ShapeError
from hf_he.ops.context import OperationContext

WEIGHT_BITS = 22
"""Integer weights are at most 2^22: 128 products of them and of half a residue are summed exactly before one reduction."""


def quantise(weight: np.ndarray, factor: float) -> tuple[np.ndarray, float, int]:
    """(integers, s, m) with weight = integers / s, rounded, and s * m = factor: what to multiply by so that the scale grows by `factor`.

    weight [out, in] reals, integers [out, in] int64 within 2^WEIGHT_BITS. m is the smallest integer that allows this; each weight is rounded by at
    most 2^-(WEIGHT_BITS + 1) of the largest one (for m > 1; factors below that precision round by 1 / (2 factor)).
    """
    largest = float(np.abs(weight).max(initial=0.0))
    if not math.isfinite(largest):
        raise ShapeError("a weight is NaN or infinite: check the checkpoint")
    multiplier = max(1, math.ceil(factor * largest / 2**WEIGHT_BITS))
    scale = factor / multiplier
    return np.rint(weight * scale).astype(np.int64), scale, multiplier


def reference(states: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """states [in, slots], weight [out, in] -> [out, slots]."""
    return weight @ states


def encrypted(context: OperationContext, state: Ciphertext, weight: np.ndarray, rows: range | None = None) -> Ciphertext:
    """weight [out, in] times `state` [in] -> [out], one level below `state` and canonical there; with `rows`, these outputs only.

    The integer left over by the rounding of the weights multiplies the smaller side. Raises LevelError at level 0.
    """
    backend = context.backend
    if state.batch_shape != (weight.shape[1],):
        raise ShapeError(f"a weight of shape {weight.shape} takes {weight.shape[1]} feature ciphertexts, got a batch of {state.batch_shape}")
    if state.level < 1:
        raise LevelError("a linear map takes one level and none is left: refresh the state first")
    integers, scale, multiplier = quantise(weight, context.canonical_factor(state.level, state.scale))
    integers = integers if rows is None else integers[rows.start : rows.stop]
    first = weight.shape[1] <= weight.shape[0]
    if multiplier > 1 and first:
        state = backend.multiply_scalar(state, 1.0, scale=multiplier)
    out = backend.linear_combination(integers, state, scale)
    if multiplier > 1 and not first:
        out = backend.multiply_scalar(out, 1.0, scale=multiplier)
    return backend.rescale(out)
