"""Bootstrapping at N = 2^16 with 128-bit parameters: about a minute and 9 GB."""

import numpy as np
import pytest

from hf_he.backends.native import NativeBackend
from hf_he.ckks.parameters import parameter_set


@pytest.mark.slow
def test_full_slots():
    backend = NativeBackend(parameter_set("n16-bootstrap"))
    secret = backend.generate_secret_key()
    keys = backend.generate_evaluation_keys(secret, [], bootstrapping=True)
    assert keys.bootstrapping.nbytes < 5e9
    backend.load_evaluation_keys(keys)
    values = np.random.default_rng(0).uniform(-1, 1, (2, backend.parameters.slots))
    out = backend.bootstrap(backend.encrypt(values, secret, 0))
    assert out.level >= 10
    assert np.abs(backend.decrypt(out, secret) - values).max() < 2.0**-13
