"""Plaintexts over attention scores: a matrix over (query, key) pairs in the un-aligned layout of the score ciphertexts."""

from __future__ import annotations

import numpy as np

from hf_he.packing import ScoreLayout


def causal_pairs(tokens: int) -> np.ndarray:
    """[queries, keys] 0/1: keys up to the query."""
    return np.tril(np.ones((tokens, tokens)))


def placed(layout: ScoreLayout, pairs: np.ndarray) -> np.ndarray:
    """pairs [T queries, T keys] -> [score ciphertexts, slots], the same for every sequence and head; unused features hold 0."""
    return placed_by_baby(layout, pairs).sum(0)


def placed_by_baby(layout: ScoreLayout, pairs: np.ndarray) -> np.ndarray:
    """`placed`, apart by baby step: [babies, score ciphertexts, slots]. Entry a goes with keys a tokens after their lane."""
    return _entries(layout, pairs).sum(0)


def placed_by_giant(layout: ScoreLayout, pairs: np.ndarray) -> np.ndarray:
    """`placed`, apart by giant step: [giants, score ciphertexts, slots]. Entry g goes with queries g * babies tokens before their lane."""
    return _entries(layout, pairs).sum(1)


def _entries(layout: ScoreLayout, pairs: np.ndarray) -> np.ndarray:
    """[giants, babies, score ciphertexts, slots]"""
    packing, b = layout.packing, layout.babies
    lanes = np.arange(packing.tokens)
    values = np.zeros((layout.giants, b, layout.ciphertexts, packing.tokens, 1, 1, layout.head_dim))
    for g in range(layout.giants):
        for a in range(b):
            feature = layout.window(g) * b + a
            values[g, a, layout.ciphertext(g), :, 0, 0, feature] = pairs[(lanes - g * b) % packing.tokens, (lanes + a) % packing.tokens]
    shape = (layout.giants, b, layout.ciphertexts, packing.tokens, packing.sequences, layout.heads, layout.head_dim)
    return np.broadcast_to(values, shape).reshape(*shape[:3], packing.slots)
