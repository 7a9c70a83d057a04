"""Rotary embeddings and RMSNorm between ciphertexts against the plaintext functions."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_he.approximation import fit_inverse_square_root
from hf_he.errors import ShapeError, UnsupportedEncryptedOperation
from hf_he.nn import apply_rotary
from hf_he.ops import norm, rotary
from hf_he.ops.placement import NormLevels
from hf_he.ops.rotary import Rotation, WaitingRotary


def angles(lab, rotary_dim, sequences=1):
    frequencies = 0.3 ** torch.arange(rotary_dim // 2, dtype=torch.float64)
    positions = torch.arange(lab.packing.tokens, dtype=torch.float64) + 3 * torch.arange(sequences)[:, None]
    halves = positions[..., None] * frequencies
    return torch.cat((halves, halves), -1)


def rotated(x, heads, angle):
    split = x.view(*x.shape[:2], heads, -1).transpose(1, 2)
    return apply_rotary(split, angle.cos(), angle.sin()).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(("features", "heads", "rotary_dim", "sequences"), [(16, 2, 8, 1), (16, 2, 4, 1), (32, 4, 2, 8), (16, 1, 16, 8), (64, 2, 12, 1)])
def test_rotation(make_lab, features, heads, rotary_dim, sequences):
    lab = make_lab(features=features)
    sequences = min(sequences, lab.packing.sequences)
    x, angle = lab.states(), angles(lab, rotary_dim, sequences)
    rotation = Rotation.of(angle.cos(), angle.sin(), features // heads)
    out = WaitingRotary(lab.encrypt(x).operand, rotation)
    assert out.level == 6
    lab.check(out.ciphertext, rotated(x, heads, angle.expand(lab.packing.sequences, -1, -1)))
    assert set(lab.backend.rotations_used) == rotary.rotations(lab.packing, rotary_dim)


def test_it_is_computed_no_higher_than_asked(lab):
    angle = angles(lab, 8)
    source = F.linear(lab.encrypt(lab.states()), lab.random(16, 16)).operand
    out = WaitingRotary(source, Rotation.of(angle.cos(), angle.sin(), 8))
    lab.backend.log.reset()
    assert out.at_least(2).level == 2 and max(entry.level for entry in lab.backend.log.trace) == 4


def test_heads_are_selected_before_they_are_computed(lab):
    x, weight, angle = lab.states(), lab.random(8, 16), angles(lab, 8)
    out = WaitingRotary(F.linear(lab.encrypt(x), weight).operand, Rotation.of(angle.cos(), angle.sin(), 8))
    repeated = out.select(np.tile(np.arange(8), 2))
    expected = rotated(F.linear(x, weight), 1, angle)
    lab.check(repeated.ciphertext, torch.cat((expected, expected), -1), tolerance=1e-5)
    with pytest.raises(ShapeError, match="whole heads"):
        out.select(np.arange(4, 12))
    computed = F.linear(lab.encrypt(x), weight).operand
    _ = computed.ciphertext
    with pytest.raises(UnsupportedEncryptedOperation, match="waiting"):
        computed.select(np.arange(8))


def test_positions_must_fit(lab):
    angle = angles(lab, 8, 3)
    with pytest.raises(ShapeError, match="position_ids"):
        WaitingRotary(lab.encrypt(lab.states()).operand, Rotation.of(angle.cos(), angle.sin(), 8))


@pytest.mark.parametrize(("statistic", "output"), [(0, 1), (0, 3), (5, 0)])
def test_rms_norm(lab, statistic, output):
    x, weight = lab.states(), lab.random(16)
    approximation = fit_inverse_square_root((0.1, 6.0), 15, 0)
    levels = NormLevels(statistic, output)
    out = norm.encrypted(lab.session, lab.encrypt(x).operand, weight, None, 1e-6, approximation, levels, centre=False)
    assert out.level == output
    lab.check(out, norm.rms_reference(x, weight, 1e-6, approximation), tolerance=1e-5)
    assert set(lab.backend.rotations_used) <= {step % lab.packing.slots for step in (1, 2, 4, 8, -1, -2, -4, -8)}
