"""Everything derived from a parameter set once: transform tables, key-switching constants, scratch memory, automorphisms."""

from __future__ import annotations

from functools import lru_cache

import numba
import numpy as np

from hf_he.ckks import ntt
from hf_he.ckks.conversion import make_scratch, make_switch_tables
from hf_he.ckks.encoder import CompactTransform
from hf_he.ckks.jit import KERNEL_LOCK
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import ParameterError

MAX_RING_DEGREE = 1 << 16
MAX_DIGIT = 8
MAX_DIGITS = 10
"""Of a key: so many products within 0.75 q add up to less than 2^53, which `conversion.inner_product` reduces only once."""
MIN_MODULUS = 1 << 28
MAX_PERMUTATIONS = 512


class Context:
    """Shared by every backend and key of one parameter set; `lock` serialises the kernels of the process, which share scratch memory and threads."""

    def __init__(self, parameters: CKKSParameters) -> None:
        if parameters.ring_degree > MAX_RING_DEGREE or len(parameters.special_moduli) > MAX_DIGIT:
            raise ParameterError(f"the native engine runs ring degrees up to {MAX_RING_DEGREE} with at most {MAX_DIGIT} special moduli")
        if min(*parameters.moduli, *parameters.special_moduli) < MIN_MODULUS:
            raise ParameterError("the native engine's base conversion is exact for moduli above 2^28 only: use larger primes")
        if len(parameters.moduli) > MAX_DIGITS * parameters.digit_size:
            raise ParameterError(
                f"{len(parameters.moduli)} moduli in digits of {parameters.digit_size} are more than the {MAX_DIGITS} digits that the native engine adds up "
                "exactly: use more special moduli and a larger digit_size"
            )
        self.parameters = parameters
        self.ring_degree = parameters.ring_degree
        self.chain = (*parameters.moduli, *parameters.special_moduli)
        self.limbs = len(parameters.moduli)
        self.alpha = parameters.digit_size
        self.dnum = -(-self.limbs // self.alpha)
        self.tables = ntt.make_tables(self.ring_degree, self.chain)
        self.switch = make_switch_tables(parameters.moduli, parameters.special_moduli, self.alpha)
        self.compact = CompactTransform(self.ring_degree, parameters.moduli)
        self.order = ntt.coefficient_order(self.ring_degree)
        self.inverse_order = np.argsort(self.order)
        self.threads = numba.get_num_threads()
        self.scratch = make_scratch(
            self.ring_degree, self.limbs, len(parameters.special_moduli), self.alpha, max(ntt.split_degree(self.ring_degree)) * ntt.COLUMNS, self.threads
        )
        self.lock = KERNEL_LOCK
        self._permutations: dict[int, np.ndarray] = {}

    def permutation(self, galois: int) -> np.ndarray:
        """[N] int32: the automorphism X -> X^galois in NTT domain."""
        found = self._permutations.get(galois)
        if found is None:
            if len(self._permutations) >= MAX_PERMUTATIONS:
                self._permutations.clear()
            found = self._permutations[galois] = ntt.automorphism(self.ring_degree, galois)
        return found

    def galois_element(self, steps: int) -> int:
        """5^steps mod 2N: rotation of the slots to the left by `steps`."""
        return pow(5, steps % self.parameters.slots, 2 * self.ring_degree)

    @property
    def conjugation_element(self) -> int:
        """X -> X^-1."""
        return 2 * self.ring_degree - 1

    def forward(self, coefficients: np.ndarray, chain: np.ndarray) -> np.ndarray:
        """NTT of integer polynomials [B, N] (layout order, below 2^53) modulo each of `chain` [C]: [B, C, N]."""
        batch, count = coefficients.shape[0], len(chain)
        out = np.empty((batch * count, self.ring_degree))
        with self.lock:
            ntt.forward_rows(np.ascontiguousarray(coefficients), out, np.tile(chain, batch), self.tables, self.scratch.block, self.threads)
        return out.reshape(batch, count, self.ring_degree)

    def inverse(self, rows: np.ndarray, chain: np.ndarray) -> np.ndarray:
        """Inverse NTT of rows [R, N], row r modulo chain[r]: centred coefficients in layout order."""
        out = np.empty(rows.shape)
        with self.lock:
            ntt.inverse_rows(np.ascontiguousarray(rows), out, chain, self.tables, self.scratch.block, self.threads)
        return out


@lru_cache(maxsize=4)
def context_for(parameters: CKKSParameters) -> Context:
    """The shared context of a parameter set."""
    return Context(parameters)
