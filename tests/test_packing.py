"""The layout of features, tokens, sequences and attention scores in the slots."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.errors import ParameterError, ShapeError
from hf_he.packing import Packing, ScoreLayout, pack_attention_mask, pack_embeddings, unpack_logits, unpack_state


def powers(low: int, high: int):
    return st.integers(low, high).map(lambda e: 1 << e)


@given(powers(0, 4), powers(0, 3), powers(0, 3), st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_unpacking_inverts_packing(features, tokens, sequences, width, data):
    packing = Packing(features * tokens * sequences, features, tokens, sequences)
    count = data.draw(st.integers(1, sequences))
    x = np.random.default_rng(width).normal(size=(count, tokens, width))
    packed = pack_embeddings(x, packing)
    assert packed.shape == (packing.blocks(width), packing.slots)
    np.testing.assert_array_equal(unpack_state(packed, packing, width, count), x)


def test_slot_of_a_feature():
    packing = Packing.fit(64, features=4, tokens=4)
    assert packing.sequences == 4
    x = np.random.default_rng(0).normal(size=(4, 4, 6))
    packed = pack_embeddings(x, packing)
    for sequence, token, feature in [(0, 0, 0), (3, 1, 2), (2, 3, 5)]:
        assert packed[feature // 4, (token * 4 + sequence) * 4 + feature % 4] == x[sequence, token, feature]


def test_unused_lanes_hold_copies_of_real_sequences():
    packing = Packing.fit(64, features=4, tokens=4)
    x = np.random.default_rng(0).normal(size=(3, 4, 4))
    np.testing.assert_array_equal(unpack_state(pack_embeddings(x, packing), packing, 4)[3], x[0])


def test_rotating_by_the_token_stride_moves_tokens():
    packing = Packing.fit(128, features=4, tokens=8)
    x = np.random.default_rng(0).normal(size=(packing.sequences, 8, 4))
    rotated = np.roll(pack_embeddings(x, packing), -3 * packing.token_stride, axis=-1)
    np.testing.assert_array_equal(unpack_state(rotated, packing, 4), np.roll(x, -3, axis=1))


@pytest.mark.parametrize(("tokens", "features", "heads"), [(8, 16, 2), (16, 16, 2), (4, 16, 4), (32, 16, 4), (8, 8, 1)])
def test_every_score_has_its_own_place(tokens, features, heads):
    layout = ScoreLayout(Packing.fit(2 * tokens * features, features, tokens), heads)
    places = {(layout.ciphertext(g), layout.window(g) * layout.babies + a) for g in range(layout.giants) for a in range(layout.babies)}
    assert len(places) == tokens
    assert all(s < layout.ciphertexts and feature < layout.head_dim for s, feature in places)


def test_the_mask_covers_every_feature_of_its_token():
    packing = Packing.fit(64, features=4, tokens=4)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    packed = unpack_state(pack_attention_mask(mask, packing), packing, 4)
    np.testing.assert_array_equal(packed, np.tile(mask, (2, 1))[..., None] * np.ones(4))


def test_logits_come_from_the_first_token():
    packing = Packing.fit(64, features=4, tokens=4)
    x = np.random.default_rng(0).normal(size=(4, 4, 4))
    np.testing.assert_array_equal(unpack_logits(pack_embeddings(x, packing), packing, 2, 3), x[:3, 0, :2])
    np.testing.assert_array_equal(packing.first_token, pack_embeddings((np.arange(4) == 0)[None, :, None] * np.ones((4, 4, 4)), packing)[0])


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: Packing.fit(64, 4, 32), "at most 16 tokens"),
        (lambda: Packing.fit(64, 6, 4), "pad it to 8"),
        (lambda: Packing(64, 4, 4, 2), "Packing.fit"),
        (lambda: ScoreLayout(Packing.fit(64, 4, 4), 3), "heads"),
        (lambda: pack_embeddings(np.zeros((5, 4, 4)), Packing.fit(64, 4, 4)), "split the batch"),
        (lambda: pack_embeddings(np.zeros((4, 4)), Packing.fit(64, 4, 4)), "sequences, tokens, features"),
        (lambda: pack_attention_mask(np.zeros((1, 3)), Packing.fit(64, 4, 4)), "4 tokens"),
    ],
)
def test_shapes_that_do_not_fit_say_what_to_choose(call, hint):
    with pytest.raises(ShapeError, match=hint):
        call()


def test_masks_hold_zeros_and_ones():
    with pytest.raises(ParameterError, match="1 for a token"):
        pack_attention_mask(np.full((1, 4), 2), Packing.fit(64, 4, 4))
