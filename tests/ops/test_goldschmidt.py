"""1 / v of a ciphertext against its approximation, from every level, of intervals whose largest result does not fit level 0."""

import numpy as np
import pytest
from laboratory import Lab

from hf_he.approximation import fit_reciprocal
from hf_he.ops.goldschmidt import depth, evaluate_reciprocal


@pytest.fixture(scope="module")
def lab():
    return Lab(rotations=(1,), levels=8)


@pytest.mark.parametrize("steps", (2, 3))
@pytest.mark.parametrize("interval", [(3e-4, 1.0003), (0.3, 700.0)], ids=str)
def test_every_level_gives_the_approximation(lab, interval, steps):
    backend, context = lab.backend, lab.session
    low, high = interval
    approximation = fit_reciprocal(interval, 15, steps)
    values = np.geomspace(low, high, backend.parameters.slots)
    expected = approximation(values) * (high - low) / 2
    mapped = (2 * values - high - low) / (high - low)
    for start in range(backend.parameters.max_level + 1):
        ciphertext = backend.encrypt(mapped, lab.secret, start)
        for level in (1, 2):
            result = evaluate_reciprocal(context, ciphertext, approximation, level)
            assert result.level >= level, (start, level)
            error = np.abs(backend.decrypt(result, lab.secret) - expected) / expected.max()
            assert error.max() < 1e-5, (start, level)
    assert depth(approximation) == 4 + 1 + steps
