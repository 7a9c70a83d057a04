"""Independent references in Python integers, and small insecure engines to run against them."""

import math
import warnings
from functools import lru_cache

import numpy as np

from hf_he.ckks.context import Context
from hf_he.ckks.evaluator import Evaluator
from hf_he.ckks.keys import PublicKey, SecretKey, SwitchingKeys
from hf_he.ckks.number_theory import primitive_root_of_unity
from hf_he.ckks.parameters import CKKSParameters

STEPS = (1, 2, 3, 5, 8, 100)


def toy_parameters(log2_degree=10, levels=6, special_count=2, first_bits=50, scale_bits=40, special_bits=50):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CKKSParameters.from_bits(log2_degree, first_bits, scale_bits, levels, special_bits, special_count, insecure=True)


class Toy:
    """An engine with keys for STEPS and conjugation."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.context = Context(parameters)
        self.evaluator = Evaluator(self.context)
        self.secret = SecretKey.generate(self.context)
        self.public = PublicKey.generate(self.context, self.secret)
        elements = [self.context.galois_element(s) for s in STEPS] + [self.context.conjugation_element]
        self.keys = SwitchingKeys.generate(self.context, self.secret, dict.fromkeys(elements, self.context.limbs))
        self.top = parameters.max_level

    def encrypt(self, values, level=None):
        level = self.top if level is None else level
        return self.evaluator.encrypt(np.asarray(values), self.secret, level, self.parameters.scale_at(level))[0]

    def decrypt(self, ct, scale=None):
        return self.evaluator.decrypt(ct, self.secret, self.parameters.scale_at(ct.shape[-2] - 1) if scale is None else scale)

    def coefficients(self, rows, limbs):
        """Exact centred integers of NTT-domain rows [limbs, N] modulo the first `limbs` moduli, in natural order."""
        plain = self.context.inverse(rows, np.arange(limbs))[:, self.context.inverse_order]
        return compose(plain, self.context.chain[:limbs])


@lru_cache
def toy(log2_degree=10, levels=6, special_count=2):
    return Toy(toy_parameters(log2_degree, levels, special_count))


def compose(residues, moduli):
    """Chinese remainders: [limbs, N] to a list of N centred integers."""
    total = math.prod(moduli)
    weights = [total // q * pow(total // q, -1, q) for q in moduli]
    values = [sum(int(r) * w for r, w in zip(column, weights, strict=True)) % total for column in np.asarray(residues).T]
    return [v - total if v > total // 2 else v for v in values]


def evaluate(coefficients, exponent, ring_degree, modulus):
    """The polynomial (natural order) at psi^exponent modulo `modulus`."""
    point = pow(primitive_root_of_unity(2 * ring_degree, modulus), int(exponent), modulus)
    total = 0
    for c in reversed(coefficients):
        total = (total * point + int(c)) % modulus
    return total


def random_residues(generator, moduli, ring_degree):
    return np.stack([generator.integers(-(q // 2), q // 2 + 1, ring_degree) for q in moduli]).astype(np.float64)


def apply_automorphism(coefficients, galois):
    """a(X^galois) modulo X^N + 1."""
    n = len(coefficients)
    out = [0] * n
    for i, c in enumerate(coefficients):
        e = i * galois % (2 * n)
        out[e % n] = c if e < n else -c
    return out
