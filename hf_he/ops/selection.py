"""Some rows of a matrix with encrypted columns, in another order: what cutting a fused projection into queries, keys and values asks of an adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np

from hf_he.backends.base import Ciphertext
from hf_he.ops import reduce
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand


def selected_rows(vectors: Operand, n: int, rows: np.ndarray) -> Operand:
    """n periodic column vectors, row-major [n, blocks], with their entries `rows`: computed once per vectors and rows, one level below them."""
    key = ("rows", rows.tobytes())
    if key not in vectors.shared:
        ciphertext = encrypted(vectors.context, vectors.ensure(1), n, rows)
        vectors.shared[key] = Operand(vectors.context, len(rows), ciphertext)
    return vectors.shared[key]


def reference(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[n, features] -> [n, len(rows)]."""
    return values[:, rows]


def encrypted(context: OperationContext, vectors: Ciphertext, n: int, rows: np.ndarray) -> Ciphertext:
    """[n * blocks] -> [n * blocks of the selection]: a mask for every distance that entries move, rotated there by powers of two."""
    return _moved(context, vectors, n, enumerate(rows.tolist()), len(rows), ("rows", rows.tobytes()))


def put_back(context: OperationContext, vectors: Ciphertext, n: int, rows: np.ndarray, features: int) -> Ciphertext:
    """The transposed selection, for gradients: entry i of each of n selected vectors goes to `rows[i]` of `features`, where several add up. One level."""
    return _moved(context, vectors, n, ((row, i) for i, row in enumerate(rows.tolist())), features, ("put back", rows.tobytes(), features))


def _moved(context: OperationContext, vectors: Ciphertext, n: int, pairs: Iterable[tuple[int, int]], features: int, tag: tuple[Hashable, ...]) -> Ciphertext:
    """Vectors of `features` entries that are sums of entries of `vectors`, by pairs (target, source)."""
    backend, c = context.backend, context.packing.features
    per_vector = vectors.count // n
    out_blocks = context.packing.blocks(features)
    moves: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros((out_blocks, c)))
    for target, source in pairs:
        moves[source // c, (source - target) % c][target // c, target % c] = 1.0
    with backend.log.measure("linear"):
        apart = backend.reshape(vectors, (n, per_vector))
        parts, masks = [], []
        for (block, distance), mask in moves.items():
            column = backend.stack([backend.take(backend.take(apart, i), block) for i in range(n)])
            for step in _powers(distance):
                column = backend.take(backend.rotate(column, [step]), 0)
            parts.append(column)
            masks.append(mask)
        scale = context.canonical_factor(vectors.level, vectors.scale)
        plain = context.constant((*tag, c), vectors.level, scale, lambda: np.stack(masks, axis=1))
        out = backend.rescale(backend.multiply_plain_sum(plain, backend.stack(parts)))
        return backend.stack([backend.take(backend.take(out, block), i) for i in range(n) for block in range(out_blocks)])


def _powers(distance: int) -> list[int]:
    return [1 << bit for bit in range(distance.bit_length()) if distance >> bit & 1]


def rotations(c: int) -> set[int]:
    """Rotation steps of `encrypted`, at most."""
    return set(reduce.power_steps(1, c))
