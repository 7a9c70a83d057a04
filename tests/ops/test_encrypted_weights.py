"""Products with encrypted weights and their gradients, ciphertext by ciphertext, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.ops import weights
from hf_he.ops.operand import Operand
from hf_he.packing import Packing


def encrypt(lab, values):
    rows = weights.reference(values.numpy(), lab.packing)
    return Operand(lab.session, max(values.shape), lab.backend.encrypt(np.tile(rows, lab.packing.slots // rows.shape[1]), lab.secret))


def lanes(lab, ciphertext):
    """[batch, lanes, c]"""
    return lab.backend.decrypt(ciphertext, lab.secret).reshape(ciphertext.count, -1, lab.packing.features)


@given(st.integers(1, 70), st.integers(1, 70))
@settings(deadline=None)
def test_the_fewer_vectors_are_encrypted(out_features, in_features):
    packing, matrix = Packing.fit(1024, 16, 8), np.random.default_rng(0).normal(size=(out_features, in_features))
    shape = matrix.shape
    rows = weights.reference(matrix, packing)
    assert len(rows) == weights.vectors(shape, packing) == min(shape) * packing.blocks(max(shape))
    merged = rows.reshape(min(shape), -1)[:, : max(shape)]
    np.testing.assert_array_equal(merged if weights.orientation(shape) == "rows" else merged.T, matrix)
    assert np.count_nonzero(rows) == matrix.size


@pytest.mark.parametrize("features", [2, 16, 20])
def test_features_are_copied_over_their_lanes(lab, features):
    x = lab.states(features)
    spread = weights.Spread(lab.encrypt(x, level=5).operand)
    found = lanes(lab, spread.at(3))
    expected = x.transpose(0, 1).reshape(-1, features).T[..., None].expand(-1, -1, 16).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert spread.at(2).level == 2 and spread.reach(0) == 3


def test_numbers_of_rows_are_packed_or_spread(lab):
    x, matrix = lab.states(40), lab.random(3, 40)
    expected = x @ matrix.T
    packed = weights.WaitingRows(lab.encrypt(x, level=4).operand, encrypt(lab, matrix), 3)
    assert packed.waiting and packed.level == 2
    lab.check(packed.ciphertext, expected)
    assert lanes(lab, packed.ciphertext)[..., 3:].__abs__().max() < 2e-8
    rows = weights.WaitingRows(lab.encrypt(x, level=1).operand, encrypt(lab, matrix), 3)
    assert rows.level == 5
    spread = lanes(lab, weights.Spread(rows).at(1))
    np.testing.assert_allclose(spread, expected.transpose(0, 1).reshape(-1, 3).T[..., None].expand(-1, -1, 16).numpy(), atol=2e-7)
    assert rows.waiting, "the packed numbers were not needed"


def test_a_gradient_is_the_same_in_all_lanes_and_reduced_once(lab):
    numbers, state = lab.states(2), lab.states(40)
    gradient = weights.vector_gradient(weights.Spread(lab.encrypt(numbers).operand), lab.encrypt(state).operand, 2, 40)
    total = gradient.plus(weights.vector_gradient(weights.Spread(lab.encrypt(numbers).operand), lab.encrypt(state).operand, 2, 40))
    assert total.waiting and total.level == 1
    lab.backend.log.reset()
    found = lanes(lab, total.ciphertext)
    operations = lab.backend.log.operations()
    assert operations["relinearize"] == 6 and operations["rotate"] == 6 * len(weights.lane_steps(lab.packing))
    expected = 2 * weights.reference(torch.einsum("btn,btf->nf", numbers, state).numpy(), lab.packing)
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None], found.shape), atol=1e-6)


def test_gradients_at_different_levels_add_up(lab):
    high, low = (weights.WeightGradient(lab.session, 16, lab.encrypt(lab.states(), level).ciphertext) for level in (5, 2))
    expected = lanes(lab, Operand(lab.session, 16, high.plus(low).ciphertext).ciphertext)
    computed = weights.WeightGradient(lab.session, 16, lab.encrypt(torch.zeros(8, 8, 16, dtype=torch.float64)).ciphertext)
    _ = computed.ciphertext
    np.testing.assert_allclose(lanes(lab, high.plus(low).plus(computed).ciphertext), expected, atol=2e-7)
    assert high.plus(low).level == 2
