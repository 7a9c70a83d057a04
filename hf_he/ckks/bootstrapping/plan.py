"""Where bootstrapping spends its moduli, and the scales on the way.

From the lowest limb up: the usable moduli, TRANSFORM_STAGES for SlotsToCoeffs, the levels of the approximate modular reduction (a prime of
fewer than PAIR_BITS bits shares its level with the next one), TRANSFORM_STAGES for CoeffsToSlots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from hf_he.ckks.parameters import COSINE_BITS, TRANSFORM_STAGES, CKKSParameters
from hf_he.errors import BackendUnavailableError, ParameterError

PAIR_BITS = 40
EPHEMERAL_WEIGHT = 32
"""Non-zero coefficients of the ephemeral secret, which exists modulo q_0 and one special modulus only (99 bits at N = 2^16); CKKSParameters checks both."""
OVERFLOW_BOUND = 13
"""Largest multiple of q_0 that ModRaise may add. Multiples are sums of 33 uniforms, of standard deviation 1.66: see `overflow_probability`."""
MIN_RATIO = 1 << 8
"""Least q_0 / scale. The sine takes the place of the identity: a message m comes back with an error of (2 pi m / ratio)^2 / 6 of itself, 1e-4 at m = 1."""
DOUBLE_ANGLES = 3
MIN_PERIOD = 1 << TRANSFORM_STAGES
"""Every factor of a transform holds a butterfly level."""


@dataclass(frozen=True)
class BootstrapPlan:
    """Levels and scales of one parameter set.

    Raises BackendUnavailableError when it has no moduli for bootstrapping, and ParameterError when they are not ours, q_0 is too close to the scale, or
    `period` does not fit.

    `period` distinct slots, a power of two, repeat in the vectors that are bootstrapped; by default all slots are distinct.
    """

    parameters: CKKSParameters
    period: int = 0

    def __post_init__(self) -> None:
        if not self.period:
            object.__setattr__(self, "period", self.parameters.slots)
        if not MIN_PERIOD <= self.period <= self.parameters.slots or self.period & (self.period - 1):
            raise ParameterError(f"sparse bootstrapping takes a power of two from {MIN_PERIOD} to {self.parameters.slots} slots, got {self.period}")
        if not self.parameters.bootstrap_moduli:
            raise BackendUnavailableError("these parameters have no moduli for bootstrapping: use the parameter set n16-bootstrap, or --refresh client")
        if len(self.levels) != len(COSINE_BITS) + 1 or self.levels[-1] != self.bottom + TRANSFORM_STAGES:
            raise ParameterError("these bootstrapping moduli have another structure than ours: build the parameters with from_bits(..., bootstrap=True)")
        if self.ratio < MIN_RATIO:
            raise ParameterError(
                f"bootstrapping needs first_bits >= scale_bits + {MIN_RATIO.bit_length()}: q_0 must be at least {MIN_RATIO} times the scale, "
                f"it is {self.ratio:.3g} times"
            )

    @cached_property
    def full(self) -> CKKSParameters:
        """The same chain with every ciphertext modulus usable; fresh keys for it stay within the same QP."""
        p = self.parameters
        return CKKSParameters(p.ring_degree, p.full_moduli, p.special_moduli, p.scale_bits, p.digit_size, p.insecure)

    @property
    def sparse(self) -> bool:
        """Whether real and imaginary parts fit into one ciphertext side by side."""
        return self.period < self.parameters.slots

    @property
    def repetition_steps(self) -> tuple[int, ...]:
        """Rotations whose sums average over the repetitions."""
        count = (self.parameters.slots // self.period).bit_length() - 1
        return tuple(self.period << i for i in range(count))

    @property
    def top(self) -> int:
        """Limbs after ModRaise."""
        return len(self.parameters.full_moduli)

    @property
    def bottom(self) -> int:
        """Limbs when SlotsToCoeffs is done: those of a ciphertext at `max_level`."""
        return len(self.parameters.moduli)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """levels[d]: limbs at depth d of the modular reduction, d = 0 before it."""
        moduli = self.parameters.full_moduli
        limbs = self.top - TRANSFORM_STAGES
        out = [limbs]
        while limbs > self.bottom + TRANSFORM_STAGES + 1 or (limbs > self.bottom + TRANSFORM_STAGES and moduli[limbs - 1] >= 1 << PAIR_BITS):
            limbs -= 2 if moduli[limbs - 1] < 1 << PAIR_BITS else 1
            out.append(limbs)
        return tuple(out)

    @property
    def cosine_depth(self) -> int:
        """Levels of the Chebyshev series, before the double angles."""
        return len(self.levels) - 1 - DOUBLE_ANGLES

    @property
    def cosine_degree(self) -> int:
        """Degree of the series; its argument is the square of the first level."""
        return 2 ** (self.cosine_depth - 1) - 1

    def divisor(self, depth: int) -> int:
        """Product of the moduli given up between depth - 1 and depth of the modular reduction."""
        return math.prod(self.parameters.full_moduli[self.levels[depth] : self.levels[depth - 1]])

    def scale(self, depth: int) -> float:
        """What the scale at a depth of the modular reduction should be: 2 y^2 - 1 keeps it, because the 2 is taken out of the scale."""
        return 2.0 * self.divisor(depth + 1)

    @cached_property
    def sine_scale(self) -> float:
        """Scale at the end of the double angles, which begin at `scale(cosine_depth)`."""
        scale = self.scale(self.cosine_depth)
        for depth in range(self.cosine_depth + 1, len(self.levels)):
            scale *= scale / 2 / self.divisor(depth)
        return scale

    @property
    def ratio(self) -> float:
        """q_0 over the scale of a ciphertext at level 0: how much smaller than the modulus the message is."""
        return self.parameters.moduli[0] / self.parameters.scale_at(0)


def overflow_probability(ring_degree: int) -> float:
    """Bound on the probability that some coefficient leaves OVERFLOW_BOUND: Chernoff, and the union over the coefficients."""
    terms = EPHEMERAL_WEIGHT + 1
    t = OVERFLOW_BOUND + 0.5
    cumulant = min(terms * (math.log(math.sinh(s / 2) / (s / 2))) - s * t for s in (0.05 * i for i in range(1, 400)))
    return 2 * ring_degree * math.exp(cumulant)
