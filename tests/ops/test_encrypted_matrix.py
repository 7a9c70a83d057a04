"""Encrypted weight matrices against numpy: products, products with the transpose, gradients of the matrix."""

import numpy as np
import pytest
import torch

from hf_he.ops import matrix
from hf_he.packing import Packing

SHAPES = [(16, 8, (16, 16)), (16, 16, (16, 16)), (8, 4, (16, 24)), (16, 8, (32, 16)), (8, 8, (5, 13))]
"""features per ciphertext, tokens, (out, in); the Lab has 1024 slots."""


def problem(make_lab, features, tokens, shape):
    lab = make_lab(features=features, tokens=tokens)
    weight = lab.random(*shape) / shape[1] ** 0.5
    ct = lab.backend.encrypt(matrix.pack_matrix(weight.numpy(), lab.packing), lab.secret)
    return lab, weight, ct, lab.states(shape[1]), lab.states(shape[0])


@pytest.mark.parametrize(("features", "tokens", "shape"), SHAPES, ids=str)
def test_products_and_gradients(make_lab, features, tokens, shape):
    lab, weight, ct, x, dy = problem(make_lab, features, tokens, shape)
    state, gradient = lab.encrypt(x).ciphertext, lab.encrypt(dy).ciphertext
    lab.check(matrix.encrypted(lab.session, state, ct, 2), x @ weight.T)
    turned = matrix.transposed(lab.session, ct, lab.packing.blocks(shape[1]), 4)
    lab.check(matrix.encrypted(lab.session, gradient, turned, 1, sign=-1), dy @ weight)
    found = matrix.weight_gradient(lab.session, state, gradient, 1)
    slots = lab.backend.decrypt(found, lab.secret)
    assert found.level == 1 and found.batch_shape == ct.batch_shape
    expected = torch.einsum("bto,bti->oi", dy, x).numpy()
    np.testing.assert_allclose(matrix.unpack_matrix(slots, lab.packing, shape), expected, atol=4e-7)
    np.testing.assert_allclose(slots, matrix.pack_matrix(expected, lab.packing), atol=4e-7)


@pytest.mark.parametrize(("features", "tokens", "shape"), SHAPES, ids=str)
def test_rotations_are_promised(make_lab, features, tokens, shape):
    lab, _, ct, x, dy = problem(make_lab, features, tokens, shape)
    state, gradient = lab.encrypt(x).ciphertext, lab.encrypt(dy).ciphertext
    matrix.encrypted(lab.session, state, ct, 0)
    matrix.encrypted(lab.session, gradient, matrix.transposed(lab.session, ct, lab.packing.blocks(shape[1]), 4), 0, sign=-1)
    matrix.weight_gradient(lab.session, state, gradient, 0)
    assert set(lab.backend.rotations_used) <= matrix.rotations(lab.packing)


def test_packing_is_inverted():
    packing = Packing(1024, 32, 8, 4)
    weight = np.random.default_rng(0).standard_normal((40, 70))
    packed = matrix.pack_matrix(weight, packing)
    assert packed.shape == (4 * 3 * 2, 1024)
    np.testing.assert_array_equal(matrix.unpack_matrix(packed, packing, weight.shape), weight)
