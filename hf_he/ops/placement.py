"""At which levels an operation runs: what a plan (hf_he.planner) decides, and what happens without one.

Defaults suit few levels: everything runs as low as it can, and whatever falls short is refreshed as one ciphertext.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionLevels:
    """`query`: level of queries and keys, two above the scores. `value`: level of the masked values where they meet the weights."""

    query: int = 2
    value: int = 1


@dataclass(frozen=True)
class NormLevels:
    """`statistic`: level of the variance, refreshed there if 1 / sqrt needs more. `output`: level of the normalised state."""

    statistic: int
    output: int


@dataclass(frozen=True)
class ActivationLevels:
    """`output`: level after the polynomial."""

    output: int = 1


Levels = AttentionLevels | NormLevels | ActivationLevels
