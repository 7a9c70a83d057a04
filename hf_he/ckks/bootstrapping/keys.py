"""Evaluation keys of bootstrapping, all modulo the full chain except one small pair.

`galois`: relinearisation, conjugation and the rotations of the transforms. `raise_key`: from the ephemeral sparse secret to the main one,
modulo the full QP (it hides the sparse secret under the dense one). `lower_key`: from the main secret to the sparse one, modulo q_0 times one
special modulus only, which is all that is ever encrypted under the sparse secret. The sparse secret is forgotten once these exist.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hf_he.ckks.bootstrapping.factors import coefficients_to_slots, slots_to_coefficients
from hf_he.ckks.bootstrapping.plan import EPHEMERAL_WEIGHT, BootstrapPlan
from hf_he.ckks.bootstrapping.transform import required_steps
from hf_he.ckks.context import Context, context_for
from hf_he.ckks.keys import SecretKey, SwitchingKeys, _mask
from hf_he.ckks.parameters import TRANSFORM_STAGES, CKKSParameters
from hf_he.ckks.random import SEED_BYTES, Stream, gaussian


def rotation_steps(plan: BootstrapPlan) -> set[int]:
    """Rotations of the two transforms."""
    slots = plan.parameters.slots
    factors = [*slots_to_coefficients(slots, TRANSFORM_STAGES), *coefficients_to_slots(slots, TRANSFORM_STAGES)]
    return set().union(*(required_steps(factor) for factor in factors))


def galois_elements(plan: BootstrapPlan) -> list[int]:
    """Automorphisms of the main chain, in the order of their keys: the rotations, then conjugation."""
    full = context_for(plan.full)
    return [*(full.galois_element(s) for s in sorted(rotation_steps(plan))), full.conjugation_element]


def ephemeral_parameters(plan: BootstrapPlan) -> CKKSParameters:
    """q_0 and one special modulus: where the sparse secret lives."""
    p = plan.parameters
    return CKKSParameters(p.ring_degree, p.moduli[:1], p.special_moduli[:1], p.scale_bits, 1, p.insecure)


def sparse_ternary(ring_degree: int, weight: int, stream: Stream) -> np.ndarray:
    """[N] with exactly `weight` entries of +-1 at uniform positions."""
    out = np.zeros(ring_degree)
    placed = 0
    while placed < weight:
        word = int(stream.words(1)[0])
        position = (word >> 1) % ring_degree
        if out[position] == 0:
            out[position] = 1.0 if word & 1 else -1.0
            placed += 1
    return out


def switching_key(context: Context, source: np.ndarray, target: np.ndarray) -> SwitchingKeys:
    """One key that turns ciphertexts under `source` into ciphertexts under `target`; rows [limbs + special, N] of both secrets."""
    keys = SwitchingKeys.allocate(context, 1, {})
    keys.seeds[0] = np.frombuffer(os.urandom(SEED_BYTES), dtype=np.uint8)
    a, b = np.empty((2, context.dnum, len(context.chain), context.ring_degree))
    keys.expand(context, 0, a)
    errors = context.forward(gaussian((context.dnum, context.ring_degree), Stream()), np.arange(len(context.chain)))
    _mask(a[None], errors[None], target, source, context.switch.special_factor, context.alpha, b[None], context.tables.moduli)
    keys.fill(0, b, a)
    return keys


@dataclass(frozen=True, eq=False)
class BootstrappingKeys:
    """What a server needs to bootstrap ciphertexts of one secret key."""

    galois: SwitchingKeys = field(repr=False)
    raise_key: SwitchingKeys = field(repr=False)
    lower_key: SwitchingKeys = field(repr=False)
    fingerprint: str

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(keys.residues.nbytes for keys in (self.galois, self.raise_key, self.lower_key))

    @classmethod
    def generate(cls, plan: BootstrapPlan, secret_key: SecretKey, progress: Callable[[int, int], None] | None = None) -> BootstrappingKeys:
        """From the main secret key; draws the ephemeral secret and drops it."""
        full, small = context_for(plan.full), context_for(ephemeral_parameters(plan))
        sparse = sparse_ternary(plan.parameters.ring_degree, EPHEMERAL_WEIGHT, Stream())
        main = SecretKey(full, secret_key._coefficients, secret_key.key_id)
        galois = SwitchingKeys.generate(full, main, galois_elements(plan), progress)
        raise_key = switching_key(full, SecretKey(full, sparse, secret_key.key_id)._rows, main._rows)
        small_main, small_sparse = (SecretKey(small, key, secret_key.key_id)._rows for key in (secret_key._coefficients, sparse))
        return cls(galois, raise_key, switching_key(small, small_main, small_sparse), plan.parameters.fingerprint)
