"""The encrypted choice of the largest logit."""

import pytest
import torch
from test_uniform import decrypt, operand

from hf_he.errors import ShapeError
from hf_he.ops import argmax


@pytest.mark.parametrize("candidates", [5, 16, 50, 1000])
def test_one_hot(lab, candidates):
    logits = 3.0 * lab.random(candidates)
    top = logits.topk(2).values
    logits[logits.argmax()] += max(0.0, 0.05 - float(top[0] - top[1]))
    with lab.session.single_token(uniform=True):
        out = argmax.encrypted(lab.session, operand(lab, logits, 7).ciphertext, candidates)
    expected = argmax.reference(logits)
    torch.testing.assert_close(expected, torch.nn.functional.one_hot(logits.argmax(), candidates).double(), atol=0.1, rtol=0)
    assert out.level >= 1
    chosen = decrypt(lab, out, candidates)
    assert chosen.argmax() == logits.argmax() and chosen.max() > 0.9 * expected.max() and chosen.topk(2).values[1] < 0.1
    assert set(lab.backend.rotations_used) == argmax.rotations(lab.packing, candidates)


def test_reference_resolves_small_differences():
    logits = torch.linspace(-12, 12, 1024, dtype=torch.float64).roll(100)
    close = torch.full((1024,), 8.0, dtype=torch.float64)
    close[7] = 8.04
    for values in (logits, close):
        chosen = argmax.reference(values)
        assert chosen.argmax() == values.argmax() and chosen.max() > 0.99


def test_ties_show_in_the_largest_entry():
    logits = torch.zeros(64, dtype=torch.float64)
    logits[[3, 9]] = 5.0
    chosen = argmax.reference(logits)
    assert chosen[3] == chosen[9] < 0.7


def test_too_many_candidates(lab):
    logits = operand(lab, lab.random(16)).ciphertext
    with pytest.raises(ShapeError, match="let the client choose"):
        argmax.encrypted(lab.session, logits, 5000)
