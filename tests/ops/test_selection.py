"""Rows of encrypted columns against numpy."""

import numpy as np
import pytest

from hf_he.ops import selection
from hf_he.ops.operand import Operand


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_of_a_fused_projection(lab, part):
    heads, head_dim, n, c = 4, 4, 2, 16
    values = lab.random(n, 3 * c).numpy()
    rows = np.arange(3 * c).reshape(heads, 3, head_dim)[:, part].reshape(-1)
    slots = np.tile(values.reshape(n * 3, c), lab.packing.slots // c)
    vectors = Operand(lab.session, 3 * c, lab.backend.encrypt(slots, lab.secret, 3))
    out = selection.selected_rows(vectors, n, rows)
    assert out.ciphertext.batch_shape == (n,) and out.level == 2
    found = lab.backend.decrypt(out.ciphertext, lab.secret)
    np.testing.assert_allclose(found, np.tile(selection.reference(values, rows), lab.packing.slots // c), atol=2e-8)
    assert selection.selected_rows(vectors, n, rows) is out
    assert set(lab.backend.rotations_used) <= selection.rotations(c)


def test_a_selection_over_two_blocks(lab):
    values, rows = lab.random(1, 40).numpy(), np.array([39, 0, 17, *range(16, 39)])
    slots = np.tile(np.pad(values, ((0, 0), (0, 8))).reshape(3, 16), lab.packing.slots // 16)
    out = selection.encrypted(lab.session, lab.backend.encrypt(slots, lab.secret, 2), 1, rows)
    found = lab.backend.decrypt(out, lab.secret)[:, :16].reshape(-1)
    np.testing.assert_allclose(found[: len(rows)], values[0, rows], atol=2e-8)
    np.testing.assert_allclose(found[len(rows) :], 0.0, atol=2e-8)
