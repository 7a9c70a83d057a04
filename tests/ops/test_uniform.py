"""Maps of states that are the same in every lane, against numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_he.errors import ShapeError
from hf_he.ops import uniform
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.linear import encrypted as linear
from hf_he.ops.operand import Operand
from hf_he.ops.uniform import Spread, unpack_uniform

WIDTHS = [(16, 16), (16, 5), (5, 16), (16, 64), (64, 16), (16, 40), (40, 16), (16, 2000), (2000, 7)]


def operand(lab, values, level=4):
    spread = Spread.of(len(values), lab.packing)
    slots = np.tile(spread.place(values.numpy()), lab.packing.slots // (spread.split * spread.c))
    return Operand(lab.session, len(values), lab.backend.encrypt(slots, lab.secret, level))


def decrypt(lab, ciphertext, features):
    slots = lab.backend.decrypt(ciphertext, lab.secret)
    spread = Spread.of(features, lab.packing)
    width = spread.split * spread.c
    np.testing.assert_allclose(slots, np.tile(slots[:, :width], lab.packing.slots // width), atol=2e-7)
    return torch.from_numpy(unpack_uniform(slots, lab.packing, features))


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS, ids=str)
def test_maps(lab, inputs, outputs):
    x, weight, bias = lab.random(inputs), 0.1 * lab.random(outputs, inputs), lab.random(outputs)
    with lab.session.single_token(uniform=True):
        out = linear(lab.session, operand(lab, x), [WaitingLinear(operand(lab, x), weight, bias)], 2, 0.5, 0.25)
    assert out.level == 2
    torch.testing.assert_close(decrypt(lab, out, outputs), 0.5 * F.linear(x, weight, bias) + 0.25, atol=1e-7, rtol=0)
    assert set(lab.backend.rotations_used) <= uniform.rotations(lab.packing, inputs, outputs)


def test_several_maps_of_one_state(lab):
    x, weights = lab.random(16), [lab.random(16, 16) for _ in range(3)]
    with lab.session.single_token(uniform=True):
        out = linear(lab.session, operand(lab, x), [WaitingLinear(operand(lab, x), w, None) for w in weights], 1)
    for index, weight in enumerate(weights):
        part = lab.backend.reshape(lab.backend.take(out, index), (1,))
        torch.testing.assert_close(decrypt(lab, part, 16), weight @ x, atol=3e-8, rtol=0)
    assert set(lab.backend.rotations_used) == uniform.rotations(lab.packing, 16, 16, 3)


def test_widening_costs_a_square_map(lab):
    counts = []
    for outputs in (16, 64):
        lab.backend.log.reset()
        with lab.session.single_token(uniform=True):
            linear(lab.session, operand(lab, lab.random(16)), [WaitingLinear(operand(lab, lab.random(16)), lab.random(outputs, 16), None)], 1)
        counts.append({name: count for name, count in lab.backend.log.operations().items() if name not in ("encode", "encrypt")})
    assert counts[0] == counts[1]


def test_from_wide_to_wide(lab):
    with lab.session.single_token(uniform=True), pytest.raises(ShapeError, match="one by one"):
        linear(lab.session, operand(lab, lab.random(64)), [WaitingLinear(operand(lab, lab.random(64)), lab.random(64, 64), None)], 1)
