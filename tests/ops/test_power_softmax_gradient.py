"""Gradients of power-softmax attention between ciphertexts against torch's autograd of the plaintext formula with the same reciprocal."""

import numpy as np
import pytest
import torch
from test_power_softmax import FORMS, SHAPES, approximation_of, heads_of, padding_of

from hf_he.errors import ShapeError
from hf_he.ops import power_softmax, power_softmax_gradient
from hf_he.packing import pack_attention_mask


def run(lab, heads, form, padding=None, causal=False, policy="recompute", needs=(True, True, True), output=1, level=None, features=None):
    """Encrypted gradients and those of autograd, of queries, keys and values."""
    packing = lab.packing
    tensors = [(0.7 * lab.states(features)).requires_grad_() for _ in range(3)]
    query, key, value = (heads_of(x, heads) for x in tensors)
    keep = torch.ones(packing.sequences, 1, packing.tokens, packing.tokens, dtype=torch.float64)
    keep = keep.tril() if causal else keep
    keep = keep if padding is None else keep * padding[:, None, None, :]
    scaling = query.shape[-1] ** -0.5
    approximation = approximation_of(form, query.detach(), key.detach(), keep, scaling)
    out = power_softmax.reference(query, key, value, keep, scaling, form, approximation).reshape(tensors[0].shape)
    do = lab.states(features)
    if padding is not None and causal:
        do = do * padding[..., None]
    out.backward(do)

    mask = None
    if padding is not None:
        mask = lab.backend.encrypt(pack_attention_mask(padding.numpy(), packing, form.power if form.counts and not causal else None), lab.secret)
    operands = [lab.encrypt(x.detach()).operand for x in tensors]
    levels = power_softmax_gradient.training_levels(lab.session, form, causal or mask is not None)
    found, saved = power_softmax_gradient.forward(lab.session, *operands, mask, heads, scaling, form, approximation, causal, levels, policy)
    rows = torch.ones_like(out) if padding is None or not causal else padding[..., None].expand_as(out)
    torch.testing.assert_close(lab.decrypt(found.ciphertext, out.shape[-1]) * rows, out.detach() * rows, atol=2e-5, rtol=0)
    gradients = power_softmax_gradient.backward(lab.session, saved, lab.encrypt(do, level).operand, needs, output)
    return gradients, [x.grad for x in tensors]


def check(lab, gradients, expected, output=1, tolerance=1e-3):
    for operand, gradient in zip(gradients, expected, strict=True):
        ct = operand.ciphertext
        assert ct.level == output and abs(ct.scale / lab.backend.parameters.scale_at(output) - 1) < 1e-9
        assert (lab.decrypt(ct, gradient.shape[-1]) - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("features", "tokens", "heads"), SHAPES, ids=str)
def test_shapes(make_lab, features, tokens, heads, causal):
    lab = make_lab(features=features, tokens=tokens)
    check(lab, *run(lab, heads, FORMS["p=4"], causal=causal))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_and_masks(lab, name, causal, padded, policy):
    form = FORMS[name]
    if padded and not causal and form.divisor is None and not form.length_agnostic:
        with pytest.raises(ShapeError, match="power_softmax_length_agnostic=True"):
            run(lab, 2, form, padding_of(lab))
    else:
        check(lab, *run(lab, 2, form, padding_of(lab) if padded else None, causal, policy))


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)], ids=str)
def test_only_what_is_needed(lab, needs, policy):
    gradients, expected = run(lab, 2, FORMS["p=4"], causal=True, policy=policy, needs=needs)
    assert [gradient is not None for gradient in gradients] == list(needs)
    check(lab, [g for g in gradients if g is not None], [g for g, needed in zip(expected, needs, strict=True) if needed])


@pytest.mark.parametrize("levels", [7, 15])
@pytest.mark.parametrize("level", [0, 2, None])
def test_from_any_level_to_another(make_lab, levels, level):
    lab = make_lab(levels=levels)
    check(lab, *run(lab, 2, FORMS["p=4"], causal=True, output=3, level=level), output=3)


def test_several_feature_blocks(lab):
    check(lab, *run(lab, 6, FORMS["p=6, mean"], causal=True, features=48))


@pytest.mark.parametrize("exponent", range(2, 11))
def test_powers_side_by_side(lab, exponent):
    x = lab.states().clamp(-1.2, 1.2)
    both = power_softmax_gradient.powers(lab.session, lab.encrypt(x).ciphertext, exponent)
    for i in range(2):
        lab.check(lab.backend.take(both, i), x ** (exponent - i))
    assert both.level == 7 - int(np.ceil(np.log2(exponent)))


@pytest.mark.parametrize(("features", "tokens", "heads"), [(16, 8, 2), (16, 16, 4), (32, 32, 1), (8, 16, 2)])
@pytest.mark.parametrize("name", ["p=4", "constant divisor"])
def test_rotations_are_the_promised_ones(make_lab, features, tokens, heads, name):
    lab = make_lab(features=features, tokens=tokens)
    run(lab, heads, FORMS[name], causal=True)
    assert set(lab.backend.rotations_used) == power_softmax_gradient.rotations(lab.packing, heads, FORMS[name].divisor is not None)
