"""Gaussian-kernel attention between ciphertexts against the plaintext formula."""

import pytest
import torch
from torch.nn import functional as F

from hf_he.approximation import kernel_exponential
from hf_he.ops import attention
from hf_he.ops.operand import Operand


def heads_of(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def operands(lab, tensors):
    return [lab.encrypt(x).operand for x in tensors]


@pytest.mark.parametrize(
    ("features", "tokens", "heads"),
    [(16, 8, 2), (16, 16, 2), (16, 8, 1), (16, 4, 4), (32, 32, 4), (8, 16, 2), (64, 8, 1), (16, 1, 2)],
    ids=lambda v: str(v),
)
@pytest.mark.parametrize("squarings", [3, 7])
def test_against_plaintext(make_lab, features, tokens, heads, squarings):
    lab = make_lab(features=features, tokens=tokens)
    q, k, v = (0.5 * lab.states() for _ in range(3))
    keep = (torch.rand(lab.packing.sequences, tokens, generator=lab.generator) < 0.7).double()
    kernel = kernel_exponential((-8.0, 0.0), squarings)
    expected = attention.reference(*(heads_of(x, heads) for x in (q, k, v)), keep[:, None, None, :], 0.3, kernel)
    mask = lab.encrypt_mask(keep).ciphertext
    out = attention.encrypted(lab.session, *operands(lab, (q, k, v)), mask, heads, 0.3, kernel)
    lab.check(out, expected.reshape(q.shape), tolerance=3e-6)
    assert out.level == 0


def test_without_a_mask(lab):
    q, k, v = (0.5 * lab.states() for _ in range(3))
    kernel = kernel_exponential((-8.0, 0.0), 4)
    out = attention.encrypted(lab.session, *operands(lab, (q, k, v)), None, 2, 0.3, kernel)
    lab.check(out, attention.reference(*(heads_of(x, 2) for x in (q, k, v)), None, 0.3, kernel).reshape(q.shape))


def test_projections_are_one_product_at_the_lowest_level(lab):
    x = lab.encrypt(lab.states())
    weights = [lab.random(16, 16) for _ in range(3)]
    waiting = [F.linear(x, w).operand for w in weights]
    lab.backend.log.reset()
    projected = attention.project(*waiting)
    assert [p.level for p in projected] == [attention.DEFAULT_LEVELS.query] * 3
    assert {entry.level for entry in lab.backend.log.trace if entry.primitive == "rotate"} == {attention.DEFAULT_LEVELS.query + 1}
    assert sum(entry.primitive == "rescale" for entry in lab.backend.log.trace) == 1
    separate = attention.project(*(Operand(lab.session, 16, w.compute(2)) for w in waiting))
    for one, other in zip(projected, separate, strict=True):
        torch.testing.assert_close(lab.decrypt(one, 16), lab.decrypt(other, 16), atol=1e-7, rtol=0)


def test_only_one_ciphertext_is_refreshed_at_a_time(lab):
    sizes = []
    answer = lab.session.refresh.callback
    lab.session.refresh.callback = lambda data: (sizes.append(lab.backend.deserialize(data, "ciphertext").count), answer(data))[1]
    tensors = operands(lab, [0.5 * lab.states() for _ in range(3)])
    attention.encrypted(lab.session, *tensors, None, 2, 0.3, kernel_exponential((-8.0, 0.0), 6))
    assert sizes == [1, 1]


@pytest.mark.parametrize(("features", "tokens", "heads"), [(16, 8, 2), (16, 16, 4), (32, 32, 1), (8, 16, 2)])
def test_rotations_are_the_promised_ones(make_lab, features, tokens, heads):
    lab = make_lab(features=features, tokens=tokens)
    attention.encrypted(lab.session, *operands(lab, [lab.states() for _ in range(3)]), None, heads, 0.1, kernel_exponential((-64.0, 0.0), 7))
    assert set(lab.backend.rotations_used) == attention.rotations(lab.packing, heads)
