"""A backend that holds every key, for the contract tests."""

import warnings

import numpy as np

from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters

STEPS = (1, 2, 5, -1)
TOLERANCE = 1e-5


def toy_parameters() -> CKKSParameters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CKKSParameters.from_bits(11, first_bits=50, scale_bits=40, levels=3, special_bits=50, special_count=2, insecure=True)


class Party:
    """A backend with its keys, and fresh random values to compare with."""

    def __init__(self, name: str, parameters: CKKSParameters):
        self.backend = get_backend(name, parameters)
        self.parameters = parameters
        self.secret = self.backend.generate_secret_key()
        self.public = self.backend.generate_public_key(self.secret)
        self.keys = self.backend.generate_evaluation_keys(self.secret, STEPS, conjugation=True)
        self.backend.load_evaluation_keys(self.keys)
        self.generator = np.random.default_rng(0)

    def values(self, *batch: int) -> np.ndarray:
        return self.generator.uniform(-1, 1, (*batch, self.parameters.slots))

    def encrypt(self, values: np.ndarray, level: int | None = None):
        return self.backend.encrypt(values, self.secret, level)

    def check(self, ct, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
        assert ct.batch_shape == expected.shape[:-1]
        np.testing.assert_allclose(self.backend.decrypt(ct, self.secret), expected, atol=tolerance)
