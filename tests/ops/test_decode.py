"""Attention of one token over a cache, against the plaintext formula, and the cache's arithmetic."""

import numpy as np
import pytest
import torch

from hf_he.approximation import fit_reciprocal, kernel_exponential, power_polynomial
from hf_he.errors import ShapeError
from hf_he.nn import apply_rotary
from hf_he.ops import decode
from hf_he.ops.operand import Operand
from hf_he.ops.power_softmax import PowerSoftmax
from hf_he.ops.rotary import Rotation, WaitingRotary

KERNEL = kernel_exponential((-8.0, 0.0), 5)
SCALING = 0.3


def replicated(lab, state, level=2):
    """[B, F] in every token lane: [1]."""
    return lab.encrypt(state[:, None].expand(-1, lab.packing.tokens, -1), level).ciphertext


class Cache:
    """`lengths` tokens per sequence in chunks, encrypted at the levels of the cache, and the same in the clear."""

    def __init__(self, lab, lengths, scale=0.5):
        packing = lab.packing
        self.lengths = torch.as_tensor(lengths)
        self.chunks = -(-int(self.lengths.max()) // packing.tokens)
        self.valid = torch.arange(self.chunks * packing.tokens) < self.lengths[:, None]
        shape = (packing.sequences, self.chunks * packing.tokens, packing.features)
        self.keys, self.values = (scale * lab.random(*shape) * self.valid[..., None] for _ in range(2))
        self.encrypted_keys = self._encrypt(lab, self.keys, decode.CACHE_LEVELS.query)
        self.encrypted_values = self._encrypt(lab, self.values, decode.CACHE_LEVELS.value)

    def _encrypt(self, lab, states, level):
        return [lab.backend.take(lab.encrypt(part, level).ciphertext, 0) for part in states.split(lab.packing.tokens, 1)]

    @property
    def lanes(self):
        """[chunks, T, B]"""
        return self.valid.reshape(len(self.valid), self.chunks, -1).permute(1, 2, 0).numpy()


def attend(lab, cache, query, heads, approximation, softmax=None):
    split = [x.view(*x.shape[:-1], heads, -1) for x in (query, cache.keys, cache.values)]
    q, k, v = split[0], split[1].transpose(1, 2), split[2].transpose(1, 2)
    expected = decode.reference(q, k, v, cache.valid, SCALING, approximation, softmax).flatten(1)
    arguments = (cache.encrypted_keys, cache.encrypted_values, cache.lanes, heads, SCALING, approximation, softmax)
    out = decode.encrypted(lab.session, replicated(lab, query), *arguments)
    assert out.level == decode.CACHE_LEVELS.value - 1
    lab.check(out, expected[:, None].expand(-1, lab.packing.tokens, -1), 2e-5)


@pytest.mark.parametrize(("features", "tokens", "heads"), [(16, 8, 2), (16, 16, 1), (32, 4, 4), (8, 2, 2)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_gaussian_kernel(make_lab, features, tokens, heads, chunks):
    lab = make_lab(features=features, tokens=tokens)
    lengths = [chunks * tokens - i % tokens for i in range(lab.packing.sequences)]
    attend(lab, Cache(lab, lengths), 0.5 * lab.random(lab.packing.sequences, features), heads, KERNEL)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(
    "softmax",
    [
        PowerSoftmax(4, 0.1),
        PowerSoftmax(6, 0.1, length_agnostic=True),
        PowerSoftmax(2, 0.2, shift=0.5),
        PowerSoftmax(32, 0.1, shift=1.0, distances=True),
        PowerSoftmax(4, 0.1, shift=1.0, divisor=20.0),
        PowerSoftmax(4, 0.1, divisor=3.0, length_agnostic=True),
    ],
    ids=str,
)
def test_power_softmax(lab, softmax, chunks):
    lengths = [8 * chunks - i % 5 for i in range(lab.packing.sequences)]
    low = 0.1 if softmax.length_agnostic else 0.1 / max(lengths)
    approximation = power_polynomial((-8.0, 8.0), softmax.power) if softmax.divisor else fit_reciprocal((low, 10.0), 31, 4)
    attend(lab, Cache(lab, lengths, scale=0.8), 0.7 * lab.random(lab.packing.sequences, 16), 2, approximation, softmax)


@pytest.mark.parametrize("rotary", [False, True])
def test_placing_a_state_on_lanes(lab, rotary):
    packing = lab.packing
    new = lab.random(packing.sequences, packing.features)
    lanes = np.zeros((packing.tokens, packing.sequences))
    for sequence in range(packing.sequences):
        lanes[sequence % packing.tokens, sequence] = 1.0
    operand, expected = Operand(lab.session, packing.features, replicated(lab, new, 4)), new
    if rotary:
        angles = torch.outer(torch.arange(float(packing.sequences)), torch.tensor([1.0, 0.3]).repeat(2))[:, None]
        heads = new.view(packing.sequences, 1, 2, 8).transpose(1, 2)
        expected = apply_rotary(heads, angles.cos(), angles.sin()).transpose(1, 2).reshape(new.shape)
    with lab.session.single_token():
        if rotary:
            operand = WaitingRotary(operand, Rotation.of(angles.cos(), angles.sin(), 8))
        out = decode.placed(operand, lanes, 2)
    assert out.level == 2
    lab.check(lab.backend.reshape(out, (1,)), expected[:, None] * torch.from_numpy(lanes.T)[..., None])


def test_operations_grow_by_one_rotation_per_doubling(make_lab):
    rotations = []
    for tokens in (4, 8, 16):
        lab = make_lab(features=16, tokens=tokens)
        cache = Cache(lab, [tokens] * lab.packing.sequences)
        query = replicated(lab, 0.5 * lab.random(lab.packing.sequences, 16))
        lab.backend.log.reset()
        decode.encrypted(lab.session, query, cache.encrypted_keys, cache.encrypted_values, cache.lanes, 2, SCALING, KERNEL)
        rotations.append(lab.backend.log.operations()["rotate"])
    assert rotations[1] - rotations[0] == rotations[2] - rotations[1] == 1


@pytest.mark.parametrize("chunks", [1, 2])
def test_rotations_are_the_promised_ones(lab, chunks):
    cache = Cache(lab, [8 * chunks] * lab.packing.sequences)
    query = replicated(lab, lab.random(lab.packing.sequences, 16))
    decode.encrypted(lab.session, query, cache.encrypted_keys, cache.encrypted_values, cache.lanes, 2, SCALING, kernel_exponential((-64.0, 0.0), 6))
    assert set(lab.backend.rotations_used) == decode.rotations(lab.packing, 2, chunks)


def test_shapes_that_do_not_fit(lab):
    cache = Cache(lab, [8] * lab.packing.sequences)
    query = replicated(lab, lab.random(lab.packing.sequences, 16))
    with pytest.raises(ShapeError, match="do not fit a validity"):
        decode.encrypted(lab.session, query, cache.encrypted_keys, cache.encrypted_values, cache.lanes[:, :4], 2, SCALING, KERNEL)
    many = [cache.encrypted_keys[0]] * 9
    with pytest.raises(ShapeError, match="at most 64 tokens"):
        decode.encrypted(lab.session, query, many, many, np.ones((9, *cache.lanes.shape[1:])), 2, SCALING, KERNEL)
