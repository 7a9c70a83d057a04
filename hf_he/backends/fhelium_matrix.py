"""Integer matrices times residues, exactly, as float64 matrix products of torch: the same code on a CPU and on the fp64 units of a card."""

from __future__ import annotations

import numpy as np
import torch

SPLIT_BITS = 25
"""Residues below 2^50 are split here."""

EXACT = 2**53
"""Sums of integers below this are exact in float64."""


def residue_products(weights: np.ndarray, residues: torch.Tensor, moduli: torch.Tensor) -> torch.Tensor:
    """weights [out, in], below 2^25 in magnitude, times residues [in, ..., limbs, N], below 2^50: [out, ..., limbs, N] modulo `moduli` [limbs].

    As many terms are summed between reductions as stay below 2^53.
    """
    tail = residues.shape[1:]
    moduli = moduli[:, None]
    rows = residues.reshape(len(residues), -1)
    largest = max(int(np.abs(weights).max(initial=0)), 1)
    chunk = max(EXACT // (largest << SPLIT_BITS), 1)
    matrix = torch.from_numpy(weights.astype(np.float64)).to(residues.device)
    total = None
    for first in range(0, len(rows), chunk):
        part, columns = rows[first : first + chunk], matrix[:, first : first + chunk]
        low = columns @ (part & ((1 << SPLIT_BITS) - 1)).double()
        high = columns @ (part >> SPLIT_BITS).double()
        value = _joined(high.long().view(-1, *tail), low.long().view(-1, *tail), moduli)
        total = value if total is None else (total + value).remainder_(moduli)
    return total


def _joined(high: torch.Tensor, low: torch.Tensor, moduli: torch.Tensor) -> torch.Tensor:
    """high * 2^25 + low modulo each row's modulus, in shifts that stay below 2^63."""
    for bits in (SPLIT_BITS // 2, SPLIT_BITS - SPLIT_BITS // 2):
        high = (high.remainder(moduli) << bits).remainder_(moduli)
    return (high + low.remainder(moduli)).remainder_(moduli)
