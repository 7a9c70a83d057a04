"""Evaluation keys of bootstrapping, all modulo the full chain except one small pair.

`galois`: relinearisation, conjugation and the rotations of the transforms. `raise_key`: from the ephemeral sparse secret to the main one,
modulo the full QP (it hides the sparse secret under the dense one). `lower_key`: from the main secret to the sparse one, modulo q_0 times one
special modulus only, which is all that is ever encrypted under the sparse secret. The sparse secret is forgotten once these exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hf_he.ckks.bootstrapping.factors import (
    Factor,
    coefficients_to_slots,
    slots_to_coefficients,
    sparse_coefficients_to_slots,
    sparse_slots_to_coefficients,
)
from hf_he.ckks.bootstrapping.plan import EPHEMERAL_WEIGHT, BootstrapPlan
from hf_he.ckks.bootstrapping.transform import required_steps
from hf_he.ckks.context import Context, context_for
from hf_he.ckks.keys import SecretKey, SwitchingKeys, galois_secrets, pack_half, switching_halves
from hf_he.ckks.parameters import TRANSFORM_STAGES, CKKSParameters
from hf_he.ckks.random import Stream


def transform_factors(plan: BootstrapPlan) -> tuple[list[Factor], list[Factor]]:
    """CoeffsToSlots and SlotsToCoeffs, in order of application."""
    if plan.sparse:
        return sparse_coefficients_to_slots(plan.period, TRANSFORM_STAGES), sparse_slots_to_coefficients(plan.period, TRANSFORM_STAGES)
    return coefficients_to_slots(plan.period, TRANSFORM_STAGES), slots_to_coefficients(plan.period, TRANSFORM_STAGES)


def rotation_limbs(plan: BootstrapPlan) -> dict[int, int]:
    """Rotations of the two transforms, and of sparse vectors' repetitions -> limbs of the largest ciphertext each turns."""
    inward, outward = transform_factors(plan)
    uses = [(plan.top, set(plan.repetition_steps))]
    uses += [(plan.top - i, required_steps(factor)) for i, factor in enumerate(inward)]
    uses += [(plan.bottom + TRANSFORM_STAGES - i, required_steps(factor)) for i, factor in enumerate(outward)]
    out: dict[int, int] = {}
    for limbs, steps in uses:
        for step in steps:
            out[step] = max(out.get(step, 0), limbs)
    return dict(sorted(out.items()))


def galois_limbs(plan: BootstrapPlan) -> dict[int, int]:
    """Automorphisms of the main chain -> limbs, in the order of their keys: the rotations, then conjugation."""
    full = context_for(plan.full)
    return {full.galois_element(s): limbs for s, limbs in rotation_limbs(plan).items()} | {full.conjugation_element: plan.levels[0]}


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


class KeyPart(NamedTuple):
    """One key of a group: its place there, its seed and its packed halves [bytes]."""

    group: str
    index: int
    seed: bytes
    b: np.ndarray
    a: np.ndarray


GALOIS, RAISE, LOWER = "galois", "raise", "lower"


def key_groups(plan: BootstrapPlan) -> dict[str, tuple[Context, list[int], dict[int, int]]]:
    """Context, limbs of each key and Galois index of each group of keys; key 0 of a group belongs to no automorphism."""
    full, small = context_for(plan.full), context_for(ephemeral_parameters(plan))
    galois = galois_limbs(plan)
    return {
        GALOIS: (full, [plan.levels[0], *galois.values()], {g: i + 1 for i, g in enumerate(galois)}),
        RAISE: (full, [plan.top], {}),
        LOWER: (small, [1], {}),
    }


def generate_parts(plan: BootstrapPlan, secret_key: SecretKey, progress: Callable[[int, int], None] | None = None) -> Iterator[KeyPart]:
    """Fresh bootstrapping keys of the main secret key, one at a time; draws the ephemeral secret and drops it."""
    groups = key_groups(plan)
    total, done = sum(len(limbs) for _, limbs, _ in groups.values()), 0
    sparse = sparse_ternary(plan.parameters.ring_degree, EPHEMERAL_WEIGHT, Stream())
    for group, (context, limbs, index) in groups.items():
        main = SecretKey(context, secret_key._coefficients, secret_key.key_id)
        if group == GALOIS:
            pairs = galois_secrets(context, main, index)
        else:
            other = SecretKey(context, sparse, secret_key.key_id)
            pairs = iter([(main._rows, other._rows) if group == RAISE else (other._rows, main._rows)])
        for i, (source, target) in enumerate(pairs):
            seed, b, a = switching_halves(context, source, target, limbs[i])
            yield KeyPart(group, i, seed, pack_half(context, b), pack_half(context, a))
            done += 1
            if progress is not None:
                progress(done, total)


@dataclass(frozen=True, eq=False)
class BootstrappingKeys:
    """What a server needs to bootstrap ciphertexts of one secret key."""

    galois: SwitchingKeys = field(repr=False)
    raise_key: SwitchingKeys = field(repr=False)
    lower_key: SwitchingKeys = field(repr=False)
    fingerprint: str
    period: int

    @property
    def nbytes(self) -> int:
        """Bytes of both halves of all keys."""
        return sum(keys.nbytes for keys in (self.galois, self.raise_key, self.lower_key))

    @classmethod
    def collect(cls, plan: BootstrapPlan, parts: Iterable[KeyPart]) -> BootstrappingKeys:
        """All keys of `parts`."""
        groups = {name: SwitchingKeys(*group) for name, group in key_groups(plan).items()}
        for part in parts:
            groups[part.group].fill(part.index, part.seed, part.b, part.a)
        return cls(groups[GALOIS], groups[RAISE], groups[LOWER], plan.parameters.fingerprint, plan.period)

    @classmethod
    def generate(cls, plan: BootstrapPlan, secret_key: SecretKey, progress: Callable[[int, int], None] | None = None) -> BootstrappingKeys:
        """Fresh keys in memory."""
        return cls.collect(plan, generate_parts(plan, secret_key, progress))
