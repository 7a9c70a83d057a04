"""What softmax and power softmax share: attention whose weights are divided by their row sums.

With scores s_ij from q_i . k_j, weights w_ij, r_i = 1 / sum_j w_ij and o_i = r_i sum_j w_ij v_j, the usual P (dP - rowsum(dP P)) has
rowsum(dP P)_i = do_i . o_i, so that no row is summed or spread again: with do' = r do,

    ds_ij = w'(s_ij) do'_i . (v_j - o_i)        dv_j = sum_i w_ij do'_i        dq_i = scaling sum_j ds_ij k_j        dk_j = scaling sum_i ds_ij q_i

Scores lie as in `hf_he.ops.attention`; the sums of the gradients are in `hf_he.ops.attention_gradient`.
"""

from __future__ import annotations

from collections.abc import Iterator

from hf_he.backends.base import Ciphertext
from hf_he.ops import attention, reduce
from hf_he.ops.context import OperationContext
from hf_he.packing import ScoreLayout


def dot_products(context: OperationContext, layout: ScoreLayout, q: Ciphertext, rotated_k: Ciphertext) -> Iterator[Ciphertext]:
    """q_i * k_j per giant step, [babies] of 3 components, for `attention.collect`."""
    backend = context.backend
    rotated_q = backend.rotate(q, attention.giant_steps(layout, -1))
    for g in range(layout.giants):
        yield backend.multiply(rotated_k, backend.reshape(backend.take(rotated_q, g), (1,)))


def row_sums(context: OperationContext, layout: ScoreLayout, weights: Ciphertext) -> Ciphertext:
    """Sums of the scores' rows, over every feature of their head in the lane of their query, one level below `weights`; unbatched.

    Sums over the babies of each window, over windows together with the lanes they lag behind by, over the ciphertexts, then from the first
    feature of a head to the others.
    """
    backend = context.backend
    for step in (*reversed(reduce.power_steps(1, layout.babies)), *_window_lane_steps(layout)):
        weights = reduce.rotate_and_add(context, weights, step)
    total = backend.sum_rotated(weights, _ciphertext_steps(layout))
    total = context.multiply_constant(total, ("first of head", layout.head_dim), lambda: reduce.first_of(layout.head_dim))
    return reduce.replicate_features(context, total, layout.head_dim)


def row_rotations(layout: ScoreLayout) -> set[int]:
    """Rotation steps of `row_sums`."""
    copies = {-width for width in reduce.power_steps(1, layout.head_dim)}
    return {*reduce.power_steps(1, layout.babies), *copies, *_window_lane_steps(layout), *_ciphertext_steps(layout)}


def _window_lane_steps(layout: ScoreLayout) -> list[int]:
    """Steps whose rotate-and-add sums the windows of a ciphertext, each from the lanes it is late by."""
    stride = layout.babies * (layout.packing.token_stride + 1)
    return [stride * count for count in reduce.power_steps(1, min(layout.windows, layout.giants))]


def _ciphertext_steps(layout: ScoreLayout) -> list[int]:
    return [s * layout.head_dim * layout.packing.token_stride for s in range(layout.ciphertexts)]
