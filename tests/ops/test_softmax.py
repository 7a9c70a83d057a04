"""Softmax attention between ciphertexts, the baseline of `hf-he bench finetune`, against torch's softmax and its autograd."""

import pytest
import torch

from hf_he.approximation import fit_reciprocal, kernel_exponential
from hf_he.ops import softmax
from hf_he.ops.softmax import Softmax

SHAPES = [(16, 8, 2), (16, 16, 2), (16, 8, 1), (16, 4, 4), (32, 32, 4), (8, 16, 2), (32, 16, 1)]
SCALING = 0.3


def heads_of(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


@pytest.fixture(scope="module")
def form():
    return Softmax(4.0, kernel_exponential((-8.0, 0.0), 9), fit_reciprocal((1e-3, 4.0), 31, 7))


def problem(lab):
    tensors = [0.7 * lab.states() for _ in range(3)]
    keep = (torch.rand(lab.packing.sequences, lab.packing.tokens, generator=lab.generator) < 0.7).double()
    keep[:, 0] = 1.0
    return tensors, lab.states(), keep


def exact(tensors, keep, heads):
    q, k, v = (heads_of(x, heads) for x in tensors)
    scores = SCALING * (q @ k.transpose(-1, -2))
    if keep is not None:
        scores = scores.masked_fill(keep[:, None, None, :] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(tensors[0].shape)


def run(lab, tensors, keep, heads, form):
    mask = None if keep is None else lab.encrypt_mask(keep).ciphertext
    return softmax.forward(lab.session, *(lab.encrypt(x).operand for x in tensors), mask, heads, SCALING, form)


@pytest.mark.parametrize(("features", "tokens", "heads"), SHAPES, ids=str)
def test_forward_and_gradients(make_lab, form, features, tokens, heads):
    lab = make_lab(features=features, tokens=tokens, levels=12)
    tensors, do, keep = problem(lab)
    out, saved = run(lab, tensors, keep, heads, form)
    assert out.batch_shape == (1,) and out.level == 1
    reference = softmax.reference(*(heads_of(x, heads) for x in tensors), keep[:, None, None, :], SCALING, form).reshape(do.shape)
    lab.check(out, reference, 1e-5)
    torch.testing.assert_close(reference, exact(tensors, keep, heads), atol=2e-2, rtol=0)
    leaves = [x.clone().requires_grad_() for x in tensors]
    softmax.reference(*(heads_of(x, heads) for x in leaves), keep[:, None, None, :], SCALING, form).reshape(do.shape).backward(do)
    gradients = softmax.backward(lab.session, saved, lab.encrypt(do).operand)
    for operand, leaf in zip(gradients, leaves, strict=True):
        assert operand.ciphertext.batch_shape == (1,) and operand.ciphertext.level == 1
        error = lab.decrypt(operand.ciphertext, features) - leaf.grad
        assert error.norm() <= 1e-5 * leaf.grad.norm()


def test_without_a_mask(lab, form):
    tensors, _, _ = problem(lab)
    out, _ = run(lab, tensors, None, 2, form)
    torch.testing.assert_close(lab.decrypt(out, 16), exact(tensors, None, 2), atol=2e-2, rtol=0)


def test_several_feature_blocks(make_lab, form):
    lab = make_lab(levels=12)
    tensors, do = [0.7 * lab.states(32) for _ in range(3)], lab.states(32)
    out, saved = run(lab, tensors, None, 4, form)
    leaves = [x.clone().requires_grad_() for x in tensors]
    reference = softmax.reference(*(heads_of(x, 4) for x in leaves), None, SCALING, form).reshape(do.shape)
    lab.check(out, reference.detach(), 1e-5)
    reference.backward(do)
    for operand, leaf in zip(softmax.backward(lab.session, saved, lab.encrypt(do).operand), leaves, strict=True):
        assert (lab.decrypt(operand.ciphertext, 32) - leaf.grad).norm() <= 1e-5 * leaf.grad.norm()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_needed(lab, form, needs):
    tensors, do, keep = problem(lab)
    _, saved = run(lab, tensors, keep, 2, form)
    every = softmax.backward(lab.session, saved, lab.encrypt(do).operand)
    some = softmax.backward(lab.session, saved, lab.encrypt(do, 0).operand, needs)
    assert [gradient is not None for gradient in some] == list(needs)
    i = needs.index(True)
    torch.testing.assert_close(lab.decrypt(some[i].ciphertext, 16), lab.decrypt(every[i].ciphertext, 16), atol=4e-6, rtol=0)


@pytest.mark.parametrize(("features", "tokens", "heads"), [(16, 8, 2), (16, 16, 4), (32, 32, 1), (8, 16, 2)])
def test_rotations_are_the_promised_ones(make_lab, form, features, tokens, heads):
    lab = make_lab(features=features, tokens=tokens)
    tensors, do, keep = problem(lab)
    _, saved = run(lab, tensors, keep, heads, form)
    softmax.backward(lab.session, saved, lab.encrypt(do).operand)
    assert set(lab.backend.rotations_used) == softmax.rotations(lab.packing, heads)
