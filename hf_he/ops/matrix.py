"""Linear layers whose whole weight matrix is encrypted, as full fine-tuning needs them: states times matrices, forward and backward.

The method is that of Jiang, Kim, Lauter and Song (CCS 2018), by blocks: with R_s the rotation of each lane by s features, cyclic in the lane,

    y_o[t] = sum_is d_ois * R_s x_i[t]        d_ois[f] = W_oi[f, f + s]

and diagonal s = m T + t of a block lies in lane t of ciphertext m, so that a matrix is dense: in * out / (T c) ciphertexts per sequence. x is
sheared (lane t by t features) and then rotated by m T + u features, which is what meets the matrix rotated by u lanes. The u = g b + a are split into baby
and giant steps as in `hf_he.ops.attention`: the matrix is rotated b - 1 times instead of T - 1, everything else is on the side of the state.
The gradient of the state is the same product with the matrix sheared the other way, that of the matrix the same products summed over lanes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_he.backends.base import Ciphertext
from hf_he.errors import ShapeError
from hf_he.ops import reduce
from hf_he.ops.context import OperationContext
from hf_he.packing import TOKEN_BABY_STEPS, Packing

DEPTH = 3
"""Levels from a state to its product with a matrix: shear, masks of the rotated state, product."""


def parts(packing: Packing) -> int:
    """Ciphertexts of one block of a matrix. Raises ShapeError for more tokens than features per ciphertext."""
    if packing.tokens > packing.features:
        raise ShapeError(f"encrypted matrices need at most as many tokens as features per ciphertext, got {packing.tokens} and {packing.features}")
    return packing.features // packing.tokens


def _diagonals(packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of a block that the places [parts, tokens, c] hold."""
    offsets = np.arange(packing.features).reshape(parts(packing), packing.tokens, 1)
    rows = np.broadcast_to(np.arange(packing.features), (*offsets.shape[:2], packing.features))
    return rows, (rows + offsets) % packing.features


def pack_matrix(weight: np.ndarray, packing: Packing) -> np.ndarray:
    """[out, in] -> [parts * in_blocks * out_blocks, slots], the same for every sequence."""
    c, (rows, columns) = packing.features, _diagonals(packing)
    outputs, inputs = (packing.blocks(size) for size in weight.shape)
    padded = np.zeros((outputs * c, inputs * c))
    padded[: weight.shape[0], : weight.shape[1]] = weight
    values = padded.reshape(outputs, c, inputs, c)[:, rows, :, columns].transpose(0, 4, 3, 1, 2)
    return np.repeat(values[..., None, :], packing.sequences, axis=-2).reshape(-1, packing.slots)


def unpack_matrix(slots: np.ndarray, packing: Packing, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `pack_matrix`: [out, in]."""
    c, (rows, columns) = packing.features, _diagonals(packing)
    outputs, inputs = (packing.blocks(size) for size in shape)
    values = slots.reshape(parts(packing), inputs, outputs, packing.tokens, packing.sequences, c)[..., 0, :]
    padded = np.empty((outputs, c, inputs, c))
    padded[:, rows, :, columns] = values.transpose(0, 3, 4, 2, 1)
    return padded.reshape(outputs * c, inputs * c)[: shape[0], : shape[1]]


def encrypted(context: OperationContext, state: Ciphertext, matrix: Ciphertext, level: int, sign: int = 1) -> Ciphertext:
    """matrix [parts * in_blocks * out_blocks] times `state` [in_blocks] -> [out_blocks], canonical at `level`.

    `state` is at `level` + DEPTH or higher, `matrix` at `level` + 1 or higher. `sign` -1: for a matrix from `transposed`. With b baby steps, (b - 1)
    rotations of the matrix, about 4 c of each state, T / b of each output.
    """
    backend, packing = context.backend, context.packing
    inputs = parts(packing) * state.count
    outputs = matrix.count // inputs
    with backend.log.measure("linear"):
        matrix = backend.reshape(backend.match_level(matrix, level + 1), (inputs, outputs))
        rotated = backend.rotate(matrix, _lanes(packing, range(_babies(packing))))
        sums = []
        for operands in _operands(context, backend.match_level(state, level + DEPTH), sign):
            total = None
            for a in range(_babies(packing)):
                product = backend.sum(backend.multiply(backend.take(rotated, a), backend.reshape(backend.take(operands, a), (inputs, 1))))
                total = product if total is None else backend.add(total, product)
            sums.append(total)
        return backend.rescale(backend.sum_rotated(backend.relinearize(backend.stack(sums)), _giants(packing)))


def transposed(context: OperationContext, matrix: Ciphertext, in_blocks: int, level: int) -> Ciphertext:
    """The matrix with which `encrypted(sign=-1)` multiplies by the transpose, at `level`, one below `matrix`: [parts * out_blocks * in_blocks]."""
    backend, packing = context.backend, context.packing
    count = parts(packing)
    out_blocks = matrix.count // (count * in_blocks)
    matrix = backend.reshape(backend.match_level(matrix, level + 1), (count, in_blocks, out_blocks))
    with backend.log.measure("linear"):
        sheared = [_sheared(context, backend.take(matrix, m), -1, m * packing.tokens) for m in range(count)]
        return backend.stack([backend.take(backend.take(part, i), o) for part in sheared for o in range(out_blocks) for i in range(in_blocks)])


def weight_gradient(context: OperationContext, state: Ciphertext, gradient: Ciphertext, level: int) -> Ciphertext:
    """Gradient of the matrix [parts * in_blocks * out_blocks], canonical at `level`, summed over tokens and sequences.

    `state` [in_blocks] is at `level` + DEPTH or higher (+ 1 with several sequences), the `gradient` of the output [out_blocks] at `level` + 1 (+ 1).
    """
    backend, packing = context.backend, context.packing
    several = packing.sequences > 1
    level += several
    inputs, outputs = parts(packing) * state.count, gradient.count
    with backend.log.measure("linear"):
        lagging = backend.rotate(backend.match_level(gradient, level + 1), [-step for step in _giants(packing)])
        sums: list[Ciphertext] = []
        for g, operands in enumerate(_operands(context, backend.match_level(state, level + DEPTH), 1)):
            right = backend.reshape(backend.take(lagging, g), (1, outputs))
            products = [backend.multiply(backend.reshape(backend.take(operands, a), (inputs, 1)), right) for a in range(_babies(packing))]
            sums = [backend.add(total, product) for total, product in zip(sums, products, strict=True)] if sums else products
        total = backend.relinearize(backend.stack(sums))
        total = backend.rescale(backend.sum_rotated(total, _lanes(packing, range(0, -_babies(packing), -1))))
        total = backend.reshape(total, (inputs * outputs,))
        if several:
            for step in _sequence_steps(packing):
                total = reduce.rotate_and_add(context, total, step)
            total = context.multiply_constant(total, "first sequence", lambda: _first_sequence(packing))
            for step in _sequence_steps(packing):
                total = reduce.rotate_and_add(context, total, -step)
        return total


def _operands(context: OperationContext, state: Ciphertext, sign: int) -> Iterator[Ciphertext]:
    """Per giant step, [babies, parts * blocks]: in lane t, `state` of token t - g b rotated by sign * (m T + (t + a) mod T) features. Two levels."""
    backend, packing = context.backend, context.packing
    tokens, c, count, babies = packing.tokens, packing.features, parts(packing), _babies(packing)
    sheared = _sheared(context, state, sign, 0)
    for g in range(tokens // babies):
        operands = []
        for a in range(babies):
            shifts = [(sign * (m * tokens + g * babies + a)) % c for m in range(count)]
            rotated = backend.rotate(sheared, [shift - wrapped for shift in shifts for wrapped in (0, c)])
            scale = context.canonical_factor(sheared.level, sheared.scale)
            masks = context.constant(("rotated", g, a, sign), sheared.level, scale, lambda u=g * babies + a, s=shifts: _rotation_masks(packing, u, s, sign))
            operands.append(backend.rescale(backend.multiply_plain_sum(masks, rotated)))
        stacked = backend.reshape(backend.stack(operands), (babies, count * state.count))
        yield backend.take(backend.rotate(stacked, [-g * babies * packing.token_stride]), 0)


def _rotation_masks(packing: Packing, u: int, shifts: list[int], sign: int) -> np.ndarray:
    """[parts, 2 parts, slots] 0/1. Lanes t < T - u of part m take the rotation by shifts[m], the others, where t + u wraps, the part before's;
    and each rotation within a lane consists of one by `shift` and one by `shift` - c slots."""
    count, tokens = len(shifts), packing.tokens
    masks = np.zeros((count, count, 2, tokens, packing.sequences, packing.features))
    for m in range(count):
        for lanes, source in ((slice(0, tokens - u), m), (slice(tokens - u, tokens), (m - 1) % count)):
            inside = packing.features - shifts[source]
            masks[m, source, 0, lanes, :, :inside] = 1.0
            masks[m, source, 1, lanes, :, inside:] = 1.0
    return masks.reshape(count, 2 * count, packing.slots)


def _sheared(context: OperationContext, ct: Ciphertext, sign: int, first: int) -> Ciphertext:
    """Lane t rotated by sign * (first + t) features, cyclic in the lane: one level, 2 T masks in baby and giant steps."""
    backend, packing = context.backend, context.packing
    babies, giants = _shear_steps(packing, sign, first)
    rotated = backend.rotate(ct, babies)
    scale = context.canonical_factor(ct.level, ct.scale)
    masks = context.constant(("shear", sign, first), ct.level, scale, lambda: _shear_masks(packing, sign, first, babies, giants))
    return backend.rescale(backend.sum_rotated(backend.multiply_plain_sum(masks, rotated), giants))


def _shear_steps(packing: Packing, sign: int, first: int) -> tuple[list[int], list[int]]:
    """Baby steps, and giant steps in slots such that their sums are all rotations that a shear takes."""
    width = 1 << (packing.tokens.bit_length() // 2)
    offsets = {shift - wrapped for shift in _shears(packing, sign, first) for wrapped in (0, packing.features)}
    return list(range(width)), sorted({offset // width * width for offset in offsets})


def _shears(packing: Packing, sign: int, first: int) -> list[int]:
    return [sign * (first + t) % packing.features for t in range(packing.tokens)]


def _shear_masks(packing: Packing, sign: int, first: int, babies: list[int], giants: list[int]) -> np.ndarray:
    """[giants, babies, slots] 0/1, each rotated back by its giant step."""
    masks = np.zeros((len(giants), len(babies), packing.tokens, packing.sequences, packing.features))
    for t, shift in enumerate(_shears(packing, sign, first)):
        inside = packing.features - shift
        for offset, features in ((shift, slice(0, inside)), (shift - packing.features, slice(inside, None))):
            masks[giants.index(offset // len(babies) * len(babies)), offset % len(babies), t, :, features] = 1.0
    flat = masks.reshape(len(giants), len(babies), packing.slots)
    return np.stack([np.roll(rows, giant, axis=-1) for rows, giant in zip(flat, giants, strict=True)])


def _babies(packing: Packing) -> int:
    return min(TOKEN_BABY_STEPS, packing.tokens)


def _lanes(packing: Packing, tokens: range) -> list[int]:
    return [token * packing.token_stride for token in tokens]


def _giants(packing: Packing) -> list[int]:
    return _lanes(packing, range(0, packing.tokens, _babies(packing)))


def _sequence_steps(packing: Packing) -> list[int]:
    return [packing.features * step for step in reduce.power_steps(1, packing.sequences)]


def _first_sequence(packing: Packing) -> np.ndarray:
    return reduce.first_of(packing.sequences).repeat(packing.features)


def rotations(packing: Packing) -> set[int]:
    """Rotation steps of `encrypted`, `transposed` and `weight_gradient`."""
    lanes = _lanes(packing, range(_babies(packing)))
    steps = {*lanes, *_giants(packing), *_sequence_steps(packing)}
    steps |= {-step for step in steps}
    for sign in (1, -1):
        for first in range(0, packing.features if sign < 0 else 1, packing.tokens):
            babies, giants = _shear_steps(packing, sign, first)
            steps |= {*babies, *giants}
    steps |= set(range(-packing.features, packing.features))
    return {step % packing.slots for step in steps} - {0}
