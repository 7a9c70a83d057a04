"""Every encryption carries fresh noise of the specified deviation, whatever it encrypts: an encryption without noise is a linear equation in the secret."""

import numpy as np
import pytest
from ckks_reference import toy

from hf_he.ckks.encoder import to_coefficients
from hf_he.ckks.parameters import ERROR_STANDARD_DEVIATION


@pytest.mark.parametrize("bits", [0, 13, 20, 30, 60], ids=lambda bits: f"values of 2^{bits}")
@pytest.mark.parametrize("key", ["secret", "public"])
def test_noise_does_not_depend_on_the_message(key, bits):
    """Coefficients of 2^53 and more, where a float64 has no room for the noise beside the message, included: no rounding, and no zeros beyond their share."""
    engine = toy()
    n, limbs, scale = engine.context.ring_degree, engine.context.limbs, 2.0**40
    values = np.random.default_rng(bits).uniform(-1, 1, (4, n // 2)) * 2.0**bits
    ciphertexts, _ = engine.evaluator.encrypt(values, getattr(engine, key), engine.top, scale)
    exact = [[int(c) for c in row] for row in to_coefficients(values, scale)]
    noise = np.array([phase(engine, ct, limbs) for ct in ciphertexts], dtype=object) - np.array(exact, dtype=object)
    noise = noise.astype(np.float64)
    deviation = ERROR_STANDARD_DEVIATION * (1.0 if key == "secret" else np.sqrt(4 * n / 3 + 1))
    assert abs(noise.std() / deviation - 1) < 0.1
    assert abs(np.mean(noise % 2 == 0) - 0.5) < 0.06


@pytest.mark.parametrize("bits", [39, 41, 52, 60, 90])
def test_large_values_decrypt_to_themselves(bits):
    """Only as many limbs are read as values of 40 bits need, unless one more says that they are larger."""
    engine = toy()
    scale = 2.0**40
    values = np.random.default_rng(bits).uniform(0.5, 1, (3, engine.context.ring_degree // 2)) * 2.0**bits
    values[0] = 2.0**bits
    ciphertexts, _ = engine.evaluator.encrypt(values, engine.secret, engine.top, scale)
    np.testing.assert_allclose(engine.evaluator.decrypt(ciphertexts, engine.secret, scale), values, rtol=1e-9)


def phase(engine, ct, limbs):
    """Centred integer coefficients of c0 + c1*s, from exact pointwise integers."""
    rows = np.empty((limbs, engine.context.ring_degree))
    for k in range(limbs):
        q = engine.context.chain[k]
        exact = [(int(a) + int(b) * int(s)) % q for a, b, s in zip(ct[0, k], ct[1, k], engine.secret._rows[k], strict=True)]
        rows[k] = [v - q if v > q // 2 else v for v in exact]
    return engine.coefficients(rows, limbs)
