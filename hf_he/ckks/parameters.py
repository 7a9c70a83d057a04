"""CKKS parameters, and the check that they are 128-bit secure.

The table is the ternary-secret, classical 128-bit row of Bossuat et al., "Security Guidelines for Implementing Homomorphic
Encryption" (IACR Communications in Cryptology 1(4), 2025): the largest log2(QP) per ring degree. Evaluation keys live modulo QP, so
the special moduli count.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

from hf_he.ckks.number_theory import is_prime, nearest_prime, primes_below
from hf_he.errors import InsecureParametersError, ParameterError

MAX_LOG2_QP = {1 << 13: 214, 1 << 14: 430, 1 << 15: 868, 1 << 16: 1747, 1 << 17: 3523}
MAX_PRIME_BITS = 50
ERROR_STANDARD_DEVIATION = 3.19
_MAX_LIMBS = 64
TRANSFORM_STAGES = 3
"""Factors of each of the two linear transforms of bootstrapping; one level each."""
COSINE_BITS = ((50,), (50,), (50,), (50,), (33, 33), (29, 29), (29, 29), (29, 29))
"""Moduli of the eight levels of the approximate modular reduction, the last one first. The first levels, whose rounding errors are
amplified most, run at a scale of 2^58 and are rescaled by two primes."""
TRANSFORM_BITS = 50
SPARSE_SECRET_DEGREE = 1 << 16
SPARSE_SECRET_LOG2_MODULUS = 99
"""Bootstrapping's ephemeral sparse secret: the smallest ring it has published estimates for, and the most that q_0 times one special modulus may be."""


@dataclass(frozen=True)
class CKKSParameters:
    """One CKKS instance: Z[X]/(X^ring_degree + 1), ciphertext moduli q_0..q_L, special moduli for key switching.

    `digit_size` is the number of ciphertext limbs per key-switching digit. `bootstrap_moduli`, above the usable ones, carry the levels
    that bootstrapping consumes (see hf_he.ckks.bootstrapping); ciphertexts outside it never use them. All moduli are distinct primes
    = 1 mod 2*ring_degree below 2^50. Raises ParameterError when malformed and InsecureParametersError outside the 128-bit table, or with
    `bootstrap_moduli` where the sparse secret of bootstrapping has no estimates, unless `insecure=True`, which warns and exists for unit tests.
    """

    ring_degree: int
    moduli: tuple[int, ...]
    special_moduli: tuple[int, ...]
    scale_bits: int
    digit_size: int
    insecure: bool = False
    bootstrap_moduli: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "moduli", tuple(self.moduli))
        object.__setattr__(self, "bootstrap_moduli", tuple(self.bootstrap_moduli))
        object.__setattr__(self, "special_moduli", tuple(self.special_moduli))
        self._check_shape()
        self._check_primes()
        if self.insecure:
            warnings.warn(f"CKKS parameters with N = {self.ring_degree} were built with insecure=True: they protect nothing", stacklevel=3)
        elif self.log2_qp > MAX_LOG2_QP.get(self.ring_degree, 0):
            allowed = MAX_LOG2_QP.get(self.ring_degree)
            limit = f"at most {allowed}" if allowed else f"a ring degree from {min(MAX_LOG2_QP)} to {max(MAX_LOG2_QP)}"
            raise InsecureParametersError(
                f"log2(QP) = {self.log2_qp:.1f} at ring degree {self.ring_degree} is below 128-bit security: the table asks for {limit}; "
                "use fewer or smaller moduli, or a larger ring"
            )
        elif self.bootstrap_moduli:
            self._check_sparse_secret()

    def _check_shape(self) -> None:
        n = self.ring_degree
        if not isinstance(n, int) or n & (n - 1) or not 1 << 10 <= n <= 1 << 17:
            raise ParameterError(f"the ring degree must be a power of two from 2^10 to 2^17, got {n}")
        if not 1 <= len(self.moduli) <= len(self.full_moduli) <= _MAX_LIMBS or not 1 <= len(self.special_moduli) <= _MAX_LIMBS:
            raise ParameterError(f"between 1 and {_MAX_LIMBS} ciphertext moduli and special moduli are needed")
        if not isinstance(self.digit_size, int) or not 1 <= self.digit_size <= len(self.special_moduli):
            raise ParameterError(f"digit_size must be from 1 to the number of special moduli, got {self.digit_size}")
        if not isinstance(self.scale_bits, int) or not 20 <= self.scale_bits <= MAX_PRIME_BITS:
            raise ParameterError(f"scale_bits must be from 20 to {MAX_PRIME_BITS}, got {self.scale_bits}")

    def _check_sparse_secret(self) -> None:
        if self.ring_degree < SPARSE_SECRET_DEGREE:
            raise InsecureParametersError(
                f"the sparse secret of bootstrapping is estimated for N = 2^16 and larger only, not for N = {self.ring_degree}: use n16-bootstrap"
            )
        pair = self.moduli[0] * self.special_moduli[0]
        if pair > 1 << SPARSE_SECRET_LOG2_MODULUS:
            raise InsecureParametersError(
                f"the sparse secret of bootstrapping is used modulo q_0 times one special modulus of at most {SPARSE_SECRET_LOG2_MODULUS} bits, "
                f"not {math.log2(pair):.1f}: use n16-bootstrap, or a smaller q_0 (first_bits)"
            )

    def _check_primes(self) -> None:
        chain = (*self.full_moduli, *self.special_moduli)
        if len(set(chain)) != len(chain):
            raise ParameterError("the moduli must be distinct")
        for q in chain:
            if not isinstance(q, int) or not 1 << 20 < q < 1 << MAX_PRIME_BITS or q % (2 * self.ring_degree) != 1 or not is_prime(q):
                raise ParameterError(f"modulus {q} is not a prime = 1 mod {2 * self.ring_degree} between 2^20 and 2^{MAX_PRIME_BITS}")
        largest = max(math.prod(self.full_moduli[i : i + self.digit_size]) for i in range(0, len(self.full_moduli), self.digit_size))
        if math.prod(self.special_moduli) < largest:
            raise ParameterError("the product of the special moduli must be at least that of every digit: key switching would drown the message")

    @classmethod
    def from_bits(
        cls,
        log2_degree: int,
        first_bits: int,
        scale_bits: int,
        levels: int,
        special_bits: int,
        special_count: int,
        insecure: bool = False,
        bootstrap: bool = False,
    ) -> CKKSParameters:
        """Deterministic prime chain: q_0 and the special moduli are the largest primes below their power of two, the others are chosen from
        the top so that every canonical scale stays next to 2^scale_bits. One special modulus per limb of a digit.
        With `bootstrap`, moduli for bootstrapping on top."""
        if not 10 <= log2_degree <= 17 or not 0 <= levels < _MAX_LIMBS or not 1 <= special_count <= _MAX_LIMBS:
            raise ParameterError("log2_degree must be 10..17, levels and special_count below 64")
        if not all(20 < bits <= MAX_PRIME_BITS for bits in (first_bits, scale_bits, special_bits)):
            raise ParameterError(f"moduli take 21 to {MAX_PRIME_BITS} bits: the float64 arithmetic is exact only below 2^{MAX_PRIME_BITS}")
        step = 2 << log2_degree
        taken: set[int] = set()

        def below(bits: int) -> int:
            prime = next((p for p in primes_below(1 << bits, step) if p not in taken), None)
            if prime is None:
                raise ParameterError(f"too few primes = 1 mod {step} below 2^{bits}")
            taken.add(prime)
            return prime

        special = tuple(below(special_bits) for _ in range(special_count))
        first = below(first_bits)
        target = 2.0**scale_bits
        scale, chain = target, []
        for _ in range(levels):
            # A modulus of MAX_PRIME_BITS bits must stay below the bound, others may lie on either side of the target.
            wanted = scale * scale / target
            prime = below(scale_bits) if scale_bits == MAX_PRIME_BITS else nearest_prime(wanted, step, taken)
            taken.add(prime)
            chain.append(prime)
            scale = scale * scale / prime
        extra = []
        if bootstrap:
            bits = [(scale_bits,)] * TRANSFORM_STAGES + list(COSINE_BITS) + [(TRANSFORM_BITS,)] * TRANSFORM_STAGES
            for group in bits:
                for size in group:
                    extra.append(below(size) if size == MAX_PRIME_BITS else nearest_prime(2.0**size, step, taken))
                    taken.add(extra[-1])
        return cls(1 << log2_degree, (first, *reversed(chain)), special, scale_bits, special_count, insecure, tuple(extra))

    @property
    def full_moduli(self) -> tuple[int, ...]:
        """All ciphertext moduli: the usable ones, then those of bootstrapping."""
        return (*self.moduli, *self.bootstrap_moduli)

    @property
    def slots(self) -> int:
        """Real values per ciphertext: half the ring degree."""
        return self.ring_degree // 2

    @property
    def max_level(self) -> int:
        """How many times a fresh ciphertext can be rescaled."""
        return len(self.moduli) - 1

    @cached_property
    def log2_qp(self) -> float:
        """log2 of the product of all moduli, special ones included."""
        return sum(math.log2(q) for q in (*self.full_moduli, *self.special_moduli))

    @property
    def security_bits(self) -> int:
        """128 by the table, and by the estimates of the sparse secret where there are `bootstrap_moduli`; 0 for parameters built with insecure=True."""
        return 0 if self.insecure else 128

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify these parameters in keys and files."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def _scales(self) -> tuple[float, ...]:
        scales = [2.0**self.scale_bits]
        for q in reversed(self.moduli[1:]):
            scales.append(scales[-1] * scales[-1] / q)
        return tuple(reversed(scales))

    @cached_property
    def _log2_moduli(self) -> tuple[float, ...]:
        return tuple(math.log2(math.prod(self.moduli[: level + 1])) for level in range(len(self.moduli)))

    def scale_at(self, level: int) -> float:
        """The canonical scale of a ciphertext at `level`."""
        if not 0 <= level <= self.max_level:
            raise ParameterError(f"level {level} is outside 0..{self.max_level}")
        return self._scales[level]

    def log2_modulus(self, level: int) -> float:
        """log2 of the ciphertext modulus q_0 ... q_level."""
        if not 0 <= level <= self.max_level:
            raise ParameterError(f"level {level} is outside 0..{self.max_level}")
        return self._log2_moduli[level]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the inverse of `from_dict`."""
        data = {
            "ring_degree": self.ring_degree,
            "moduli": list(self.moduli),
            "special_moduli": list(self.special_moduli),
            "scale_bits": self.scale_bits,
            "digit_size": self.digit_size,
            "insecure": self.insecure,
        }
        return data | ({"bootstrap_moduli": list(self.bootstrap_moduli)} if self.bootstrap_moduli else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, insecure: bool = False) -> CKKSParameters:
        """Parameters read from a file. Ones marked insecure are refused unless the caller passes insecure=True."""
        try:
            chains = [data["moduli"], data["special_moduli"], data.get("bootstrap_moduli", ())]
            numbers, marked = [data["ring_degree"], data["scale_bits"], data["digit_size"]], data["insecure"]
        except (KeyError, TypeError, AttributeError):
            raise ParameterError("these are not CKKS parameters: a field is missing, generate the keys again with `hf-he keygen`") from None
        if not all(isinstance(chain, list | tuple) and len(chain) <= _MAX_LIMBS for chain in chains):
            raise ParameterError(f"these are not CKKS parameters: moduli come in lists of at most {_MAX_LIMBS}")
        moduli, special, extra = (tuple(chain) for chain in chains)
        if not all(type(value) is int and abs(value) < 1 << 63 for value in (*numbers, *moduli, *special, *extra)) or type(marked) is not bool:
            raise ParameterError("these are not CKKS parameters: every number must be an integer below 2^63")
        if marked and not insecure:
            raise InsecureParametersError("these parameters are marked insecure: they are for unit tests; generate keys for a named parameter set")
        return cls(data["ring_degree"], moduli, special, data["scale_bits"], data["digit_size"], marked, extra)


PARAMETER_SETS: dict[str, Callable[[], CKKSParameters]] = {
    "n13": partial(CKKSParameters.from_bits, 13, first_bits=46, scale_bits=40, levels=3, special_bits=46, special_count=1),
    "n14": partial(CKKSParameters.from_bits, 14, first_bits=50, scale_bits=40, levels=7, special_bits=49, special_count=2),
    "n14-6": partial(CKKSParameters.from_bits, 14, first_bits=50, scale_bits=40, levels=6, special_bits=49, special_count=2),
    "n15": partial(CKKSParameters.from_bits, 15, first_bits=50, scale_bits=40, levels=15, special_bits=50, special_count=4),
    "n16": partial(CKKSParameters.from_bits, 16, first_bits=50, scale_bits=40, levels=31, special_bits=50, special_count=8),
    "n16-bootstrap": partial(CKKSParameters.from_bits, 16, first_bits=49, scale_bits=40, levels=13, special_bits=50, special_count=8, bootstrap=True),
}


@cache
def parameter_set(name: str) -> CKKSParameters:
    """A named parameter set (see PARAMETER_SETS); all of them are within the 128-bit table."""
    if name not in PARAMETER_SETS:
        raise ParameterError(f"unknown parameter set {name!r}: choose one of {', '.join(PARAMETER_SETS)}")
    return PARAMETER_SETS[name]()
