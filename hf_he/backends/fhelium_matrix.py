"""Integer matrices times residues, exactly, as float64 matrix products of torch: the same code on a CPU and on the fp64 units of a card."""

from __future__ import annotations

import numpy as np
import torch

RESIDUE_BITS = 50
EXACT_BITS = 53
"""Sums of integers below 2^53 are exact in float64."""

MOST_PIECES = 4


def residue_products(weights: np.ndarray, residues: torch.Tensor, moduli: torch.Tensor) -> torch.Tensor:
    """weights [out, in], below 2^25 in magnitude, times residues [in, components, ..., limbs, N] modulo `moduli` [limbs], below 2^50:
    [out, components, ..., limbs, N], in memory with the component first. FHElium leaves residues up to twice the modulus; they are reduced here.

    Residues are split into the fewest pieces whose sums are exact, one product each: 2 for up to 8 terms with weights of 25 bits, 3 up to 2,048, 4 up to
    32,768 (more terms are summed in turns). One limb after another: what is needed meanwhile is some limbs' worth.
    """
    matrix = torch.from_numpy(weights.astype(np.float64)).to(residues.device)
    outputs, terms = weights.shape
    result = residues.new_empty((residues.shape[1], outputs, *residues.shape[2:])).transpose(0, 1)
    weight_bits = int(np.abs(weights).max(initial=1)).bit_length()
    pieces = next((p for p in range(2, MOST_PIECES) if terms << (weight_bits + _width(p)) <= 1 << EXACT_BITS), MOST_PIECES)
    width = _width(pieces)
    turn = 1 << (EXACT_BITS - width - weight_bits)
    for limb, modulus in enumerate(moduli.unbind()):
        rows = residues[..., limb, :].reshape(terms, -1).remainder(modulus)
        parts = [_product(matrix[:, first : first + turn], rows[first : first + turn], modulus, pieces) for first in range(0, terms, turn)]
        result[..., limb, :] = sum(parts[1:], parts[0]).remainder_(modulus).view(outputs, *residues.shape[1:-2], -1)
    return result


def _width(pieces: int) -> int:
    return -(-RESIDUE_BITS // pieces)


def _product(matrix: torch.Tensor, rows: torch.Tensor, modulus: torch.Tensor, pieces: int) -> torch.Tensor:
    """By Horner's rule in 2^width, shifted in two steps that stay below 2^63."""
    width = _width(pieces)
    value = None
    for piece in reversed(range(pieces)):
        digits = (rows >> (piece * width)) & ((1 << width) - 1)
        sums = (matrix @ digits.double()).long()
        if value is not None:
            value = value.remainder_(modulus) << (width - width // 2)
            sums += value.remainder_(modulus) << (width // 2)
        value = sums
    return value.remainder_(modulus)
