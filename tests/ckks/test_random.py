"""Streams are deterministic in their seed and fresh without one; the samplers have the distributions they claim."""

import numpy as np
import pytest
from scipy import stats

from hf_he.ckks import random as he_random
from hf_he.ckks.parameters import ERROR_STANDARD_DEVIATION

SEED = bytes(range(32))


def test_streams():
    assert np.array_equal(he_random.Stream(SEED, 3).words(8), he_random.Stream(SEED, 3).words(8))
    assert not np.array_equal(he_random.Stream(SEED, 3).words(8), he_random.Stream(SEED, 4).words(8))
    assert not np.array_equal(he_random.Stream().words(8), he_random.Stream().words(8))


def test_chacha20_known_answer():
    """RFC 8439, appendix A.1, test vector 1."""
    assert he_random.Stream(bytes(32)).bytes(16).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


@pytest.mark.parametrize("modulus", [(1 << 50) - 27, 1000003, 3])
def test_uniform_residues(modulus):
    drawn = he_random.uniform(SEED, [modulus], 50000)[0]
    assert np.array_equal(drawn, he_random.uniform(SEED, [modulus], 50000)[0])
    assert np.abs(drawn).max() <= modulus // 2 and np.array_equal(drawn, np.rint(drawn))
    counts = np.histogram(drawn, bins=3 if modulus == 3 else 50, range=(-(modulus // 2) - 0.5, modulus // 2 + 0.5))[0]
    assert stats.chisquare(counts).pvalue > 1e-6


def test_rejection_continues_the_stream():
    """A modulus just above 2^63 rejects half of all words: more words are drawn, and the accepted ones stay the same."""
    out = np.empty(1000)
    he_random.uniform_into(SEED, 0, (1 << 63) + 1, out)
    words = [int(w) for w in he_random.Stream(SEED, 0).words(4000) if int(w) < (1 << 63) + 1][:1000]
    centred = [w - ((1 << 63) + 1) if w > 1 << 62 else w for w in words]
    assert np.allclose(out, np.array(centred, dtype=np.float64))


def test_ternary():
    drawn = he_random.ternary((30000,), he_random.Stream(SEED))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [-1, 0, 1] and stats.chisquare(counts).pvalue > 1e-6


def test_gaussian():
    drawn = he_random.gaussian((200000,), he_random.Stream(SEED))
    assert np.array_equal(drawn, np.rint(drawn)) and np.abs(drawn).max() < 13 * ERROR_STANDARD_DEVIATION
    support = np.arange(-12, 13)
    weights = np.exp(-(support**2) / (2 * ERROR_STANDARD_DEVIATION**2))
    total = np.exp(-(np.arange(-60, 61) ** 2) / (2 * ERROR_STANDARD_DEVIATION**2)).sum()
    counts = np.array([(drawn == s).sum() for s in support], dtype=np.float64)
    inside = counts.sum()
    assert abs(inside / drawn.size - weights.sum() / total) < 1e-3
    assert stats.chisquare(counts, weights / weights.sum() * inside).pvalue > 1e-6
    assert abs(drawn.std() - ERROR_STANDARD_DEVIATION) < 0.03
