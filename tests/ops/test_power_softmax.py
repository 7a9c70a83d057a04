"""Power-softmax attention between ciphertexts against the plaintext formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laboratory import Lab

from hf_he.approximation import fit_reciprocal, power_polynomial
from hf_he.errors import ShapeError
from hf_he.ops import power_softmax
from hf_he.ops.power_softmax import PowerSoftmax
from hf_he.ops.score_masks import placed
from hf_he.packing import Packing, ScoreLayout, pack_attention_mask

SHAPES = [(16, 8, 2), (16, 16, 2), (16, 8, 1), (16, 4, 4), (32, 32, 4), (8, 16, 2), (64, 8, 1), (16, 1, 2)]
FORMS = {
    "p=4": PowerSoftmax(4, 0.05),
    "p=6, mean": PowerSoftmax(6, 0.05, length_agnostic=True),
    "p=2, bias 1": PowerSoftmax(2, 1.0),
    "p=8": PowerSoftmax(8, 0.1),
    "normalized Gaussian kernel": PowerSoftmax(32, 0.05, shift=1.0, length_agnostic=True, distances=True),
    "constant divisor": PowerSoftmax(4, 0.05, shift=1.0, divisor=20.0),
    "constant divisor per key, p=10": PowerSoftmax(10, 0.05, shift=0.5, divisor=500.0, length_agnostic=True),
}


def heads_of(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def approximation_of(form, query, key, keep, scaling, degree=7, steps=2):
    """Of the range that eps + mean x^p, or x + c, has on these inputs."""
    products = torch.cdist(query, key).square() if form.distances else query @ key.transpose(-1, -2)
    scores = (products * form.factor(scaling) + form.shift) * keep
    if form.divisor is not None:
        bound = float(scores.abs().max())
        return power_polynomial((-bound, bound), form.power)
    count = keep.sum(-1, keepdim=True).clamp(min=1.0)
    mean = (scores**form.power).sum(-1, keepdim=True) / count + (form.eps if form.length_agnostic else form.eps / count)
    return fit_reciprocal((0.9 * float(mean.min()), 1.1 * float(mean.max())), degree, steps)


def compare(lab, heads, form, padding, causal, tolerance=2e-4, levels=None):
    """`padding` [B, T] of 0/1 or None. In a causal model the rows of padding are not compared: they count more keys than are valid."""
    packing = lab.packing
    tensors = [0.7 * lab.states() for _ in range(3)]
    query, key, value = (heads_of(x, heads) for x in tensors)
    keep = torch.ones(packing.sequences, 1, packing.tokens, packing.tokens, dtype=torch.float64)
    keep = keep.tril() if causal else keep
    keep = keep if padding is None else keep * padding[:, None, None, :]
    scaling = query.shape[-1] ** -0.5
    approximation = approximation_of(form, query, key, keep, scaling)
    expected = power_softmax.reference(query, key, value, keep, scaling, form, approximation).reshape(tensors[0].shape)
    mask = None
    if padding is not None:
        packed = pack_attention_mask(padding.numpy(), packing, form.power if form.counts and not causal else None)
        mask = lab.backend.encrypt(packed, lab.secret)
    operands = [lab.encrypt(x).operand for x in tensors]
    out = power_softmax.encrypted(lab.session, *operands, mask, heads, scaling, form, approximation, causal, levels)
    found = lab.decrypt(out, packing.features)
    rows = torch.ones_like(found) if padding is None or not causal else padding[..., None].expand_as(found)
    torch.testing.assert_close(found * rows, expected * rows, atol=tolerance, rtol=0)
    return out


def padding_of(lab):
    lengths = torch.randint(1, lab.packing.tokens + 1, (lab.packing.sequences, 1), generator=lab.generator)
    return (torch.arange(lab.packing.tokens) < lengths).double()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("features", "tokens", "heads"), SHAPES, ids=str)
def test_shapes(make_lab, features, tokens, heads, causal):
    out = compare(make_lab(features=features, tokens=tokens), heads, FORMS["p=4"], None, causal)
    assert out.level == 0


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_and_masks(lab, name, causal, padded):
    form = FORMS[name]
    if padded and not causal and form.divisor is None and not form.length_agnostic:
        with pytest.raises(ShapeError, match="power_softmax_length_agnostic=True"):
            compare(lab, 2, form, padding_of(lab), causal)
    else:
        compare(lab, 2, form, padding_of(lab) if padded else None, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_with_enough_levels_nothing_is_refreshed(make_lab, causal):
    lab = make_lab(levels=14)
    levels = power_softmax.AttentionLevels(query=14, value=3)
    out = compare(lab, 2, FORMS["p=4"], None, causal, levels=levels)
    assert lab.session.refresh.count == 0 and out.level == 1


def test_rows_sum_to_one(lab):
    """With constant values and eps far below the scores, the output is that constant: weights are a distribution."""
    packing, form = lab.packing, PowerSoftmax(4, 1e-6)
    q, k = (0.7 * lab.states() for _ in range(2))
    keep = torch.ones(packing.sequences, 1, packing.tokens, packing.tokens, dtype=torch.float64)
    approximation = approximation_of(form, heads_of(q, 2), heads_of(k, 2), keep, 1.0, degree=7, steps=3)
    value = torch.full_like(q, 0.5)
    operands = [lab.encrypt(x).operand for x in (q, k, value)]
    out = lab.decrypt(power_softmax.encrypted(lab.session, *operands, None, 2, 1.0, form, approximation), packing.features)
    torch.testing.assert_close(out, value, atol=0.5 * approximation.max_error + 1e-3, rtol=0)


def test_only_narrow_ciphertexts_are_refreshed(lab):
    sizes = []
    answer = lab.session.refresh.callback
    lab.session.refresh.callback = lambda data: (sizes.append(lab.backend.deserialize(data, "ciphertext").count), answer(data))[1]
    compare(lab, 2, FORMS["p=4"], None, True)
    assert sizes == [1, 1], "scores, row sums"


@pytest.mark.parametrize(("features", "tokens", "heads"), [(16, 8, 2), (16, 16, 4), (32, 32, 1), (8, 16, 2)])
@pytest.mark.parametrize("name", ["p=4", "constant divisor"])
def test_rotations_are_the_promised_ones(make_lab, features, tokens, heads, name):
    lab = make_lab(features=features, tokens=tokens)
    compare(lab, heads, FORMS[name], padding_of(lab), True)
    assert set(lab.backend.rotations_used) == power_softmax.rotations(lab.packing, heads, FORMS[name].divisor is not None)


@settings(max_examples=15, deadline=None)
@given(masks=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=8, max_size=8), causal=st.booleans())
def test_any_padding_is_exact_with_a_constant_divisor(masks, causal):
    lab = Lab()
    compare(lab, 2, FORMS["constant divisor"], torch.tensor(masks).double(), causal)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_score_masks_follow_the_layout(data, shape):
    """Entry (lane, feature) of a score ciphertext is what ScoreLayout says: diagonal j of queries t - g b and keys t + a."""
    features, tokens, heads = shape
    packing = Packing.fit(4096, features, tokens)
    layout = ScoreLayout(packing, heads)
    pairs = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((tokens, tokens))
    lanes = placed(layout, pairs).reshape(layout.ciphertexts, tokens, packing.sequences, heads, layout.head_dim)
    query, key = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, tokens - 1))
    diagonal = (key - query) % tokens
    giant, baby = divmod(diagonal, layout.babies)
    found = lanes[diagonal // layout.head_dim, (query + giant * layout.babies) % tokens, :, :, diagonal % layout.head_dim]
    assert (found == pairs[query, key]).all() and (key - baby) % tokens == (query + giant * layout.babies) % tokens
    assert np.count_nonzero(placed(layout, np.ones((tokens, tokens)))) == tokens * tokens * packing.sequences * heads
