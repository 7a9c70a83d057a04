"""One feature per ciphertext on every installed backend: projections without rotations, attention with a mask, refreshes by the client."""

import pytest
import torch
from laboratory import Lab

from hf_he.approximation import kernel_exponential
from hf_he.backends import available_backends
from hf_he.ckks.parameters import parameter_set
from hf_he.ops import feature_major_attention
from hf_he.ops.linear import WaitingLinear
from hf_he.packing import Packing

TOKENS, HEADS, HEAD_DIM = 16, 2, 2


@pytest.fixture(params=[name for name, (ok, _) in available_backends().items() if ok])
def wide(request) -> Lab:
    """16 tokens, as many sequences as fill the slots; DESILO FHE chooses its own rings, of 8,192 slots at least."""
    parameters = parameter_set("n14-6") if request.param == "desilo" else None
    slots = 1024 if parameters is None else parameters.slots
    steps = feature_major_attention.rotations(Packing.fit(slots, 1, TOKENS))
    return Lab(rotations=steps, features=1, tokens=TOKENS, backend=request.param, parameters=parameters)


def test_projections_and_attention(wide):
    features, sequences = HEADS * HEAD_DIM, wide.packing.sequences
    states, weights, biases = wide.states(features) / 2, wide.random(3, features, features) / 2, wide.random(3, features) / 4
    keep = (torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (sequences, 1), generator=wide.generator)).double()
    approximation = kernel_exponential((-16.0, 0.0), 5)
    source = wide.encrypt(states).operand
    maps = [WaitingLinear(source, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    refreshed = wide.session.refresh.count
    out = feature_major_attention.encrypted(wide.session, *maps, wide.encrypt_mask(keep).ciphertext, HEADS, HEAD_DIM**-0.5, approximation)
    assert wide.session.refresh.count - refreshed == HEADS
    assert "rotate" not in {entry.primitive for entry in wide.backend.log.trace if entry.scope == "linear"}

    split = [torch.nn.functional.linear(states, w, b).view(sequences, TOKENS, HEADS, HEAD_DIM).transpose(1, 2) for w, b in zip(weights, biases, strict=True)]
    pairs = keep[:, None, None, :].expand(-1, 1, TOKENS, -1)
    expected = feature_major_attention.reference(*split, pairs, HEAD_DIM**-0.5, approximation)
    wide.check(out, expected.reshape(sequences, TOKENS, -1), tolerance=1e-4)
