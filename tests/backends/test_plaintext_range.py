"""What would silently become other values is refused: a plaintext that does not fit the modulus, and a factor that rounding would change."""

import warnings

import numpy as np
import pytest

from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import ParameterError, ScaleMismatchError


@pytest.fixture(scope="module", params=["native", "simulator"])
def he(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_backend(request.param, CKKSParameters.from_bits(11, 50, 40, 3, special_bits=50, special_count=2, insecure=True))


def test_values_beyond_half_the_modulus(he):
    secret, slots = he.generate_secret_key(), he.parameters.slots
    limit = 2.0 ** (he.parameters.log2_modulus(0) - 1) / he.parameters.scale_at(0)
    fits, too_large = np.full(slots, 0.99 * limit), np.full(slots, 1.01 * limit)
    ct = he.encrypt(fits, secret, level=0)
    assert np.allclose(he.decrypt(ct, secret), fits, rtol=1e-6)
    with pytest.raises(ScaleMismatchError, match="level 0: encode it at a higher level"):
        he.encrypt(too_large, secret, level=0)
    with pytest.raises(ScaleMismatchError, match="higher level"):
        he.encode(too_large, 0)
    with pytest.raises(ScaleMismatchError, match="higher level"):
        he.add_scalar(he.encrypt(np.zeros(slots), secret, level=0), -1.01 * limit)
    assert he.encode(too_large, 1).level == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scalars_must_be_finite(he, value):
    ct = he.encrypt(np.zeros(he.parameters.slots), he.generate_secret_key())
    with pytest.raises(ParameterError, match="finite"):
        he.add_scalar(ct, value)
    with pytest.raises(ParameterError, match="finite"):
        he.multiply_scalar(ct, value)


def test_a_product_is_rescaled_before_levels_are_matched(he):
    """The factor to match it would be about 1, so rounded to an integer it would be off by up to a half."""
    secret, slots = he.generate_secret_key(), he.parameters.slots
    he.load_evaluation_keys(he.generate_evaluation_keys(secret, []))
    ct = he.encrypt(np.full(slots, 0.5), secret)
    product = he.relinearize(he.multiply(ct, ct))
    with pytest.raises(ScaleMismatchError, match="rescale the product first"):
        he.match_level(product, ct.level - 2)
    assert np.allclose(he.decrypt(he.match_level(he.rescale(product), ct.level - 2), secret), 0.25, atol=1e-6)
