"""The pipeline: switch to the sparse secret, ModRaise, switch back, CoeffsToSlots, EvalMod, SlotsToCoeffs."""

from __future__ import annotations

import math

import numpy as np

from hf_he.ckks.bootstrapping.cosine import HALF_WIDTH, SHIFT, cosine_coefficients
from hf_he.ckks.bootstrapping.keys import BootstrappingKeys, ephemeral_parameters, transform_factors
from hf_he.ckks.bootstrapping.plan import DOUBLE_ANGLES, BootstrapPlan
from hf_he.ckks.bootstrapping.series import ChebyshevSeries, Scaled
from hf_he.ckks.bootstrapping.transform import LinearTransform
from hf_he.ckks.context import context_for
from hf_he.ckks.evaluator import Evaluator
from hf_he.ckks.parameters import TRANSFORM_STAGES


class Bootstrapper:
    """Bootstraps ciphertexts of one plan. Building it encodes the transforms (60 MB at N = 2^16).

    Where the slots repeat (a sparse plan), rotations and sums first leave only the coefficients that such vectors have; the transforms are then
    smaller, and one ciphertext goes through EvalMod instead of two.

    Payloads are residues [2, limbs, N] in NTT domain; slots hold complex values. Other backends give evaluators of their own for `plan.full` and
    `ephemeral_parameters(plan)`, and keys that these understand.
    """

    def __init__(self, plan: BootstrapPlan, evaluator: Evaluator | None = None, small: Evaluator | None = None) -> None:
        self.plan = plan
        parameters = plan.parameters
        self.evaluator = evaluator or Evaluator(context_for(plan.full))
        self._small = small or Evaluator(context_for(ephemeral_parameters(plan)))
        inward, self._outward_factors = transform_factors(plan)
        # After ModRaise the slots of coefficients q_0 * x have scale q_0; the argument of EvalMod is x / HALF_WIDTH at scale(0).
        shrink = 0.5 * plan.scale(0) / (HALF_WIDTH * parameters.moduli[0]) * plan.period / parameters.slots
        self._inward = self._encode(inward, plan.top, shrink)
        self._outward: dict[int, list[LinearTransform]] = {}
        self._imaginary = self.evaluator.encode(np.array([1j]), plan.top - 1, 1.0)

    def _encode(self, factors, limbs: int, gain: float) -> list[LinearTransform]:
        """Transforms that together multiply the scale by `gain` after rescaling."""
        out = []
        for i, factor in enumerate(factors):
            scale = self.plan.parameters.full_moduli[limbs - 1 - i] * gain ** (1 / len(factors))
            out.append(LinearTransform(self.evaluator, factor, limbs - i, scale))
        return out

    def _outward_for(self, divisor: int) -> list[LinearTransform]:
        """SlotsToCoeffs that also divides the message, for iterations."""
        if divisor not in self._outward:
            plan = self.plan
            # sin(2 pi x) holds 2 pi / ratio times the message; what comes out has the canonical scale of the top level.
            grow = 0.5 * plan.ratio / (2 * math.pi) * plan.parameters.scale_at(plan.parameters.max_level) / plan.sine_scale
            # A sparse result takes two rotations and is the average of the others.
            repeated = max(1, plan.parameters.slots // (2 * plan.period))
            self._outward[divisor] = self._encode(self._outward_factors, plan.bottom + TRANSFORM_STAGES, grow / (divisor * repeated))
        return self._outward[divisor]

    # ---- stages ----
    def pack(self, pair: np.ndarray) -> np.ndarray:
        """[1 or 2, 2, 1, N] real vectors to one ciphertext [2, 1, N] of complex slots."""
        return pair[0] if len(pair) == 1 else self.evaluator.add(pair[0], self._times_i(pair[1]))

    def raise_modulus(self, a: np.ndarray, keys: BootstrappingKeys) -> np.ndarray:
        """[2, 1, N] modulo q_0 to [2, top, N]: the message plus q_0 times small integers, under the main secret."""
        sparse = self._small.switch_key(a, keys.lower_key)
        return self.evaluator.switch_key(self.evaluator.raise_modulus(sparse, self.plan.top), keys.raise_key)

    def to_slots(self, a: np.ndarray, keys: BootstrappingKeys) -> Scaled:
        """The coefficients, divided by q_0 * HALF_WIDTH, in the slots of two ciphertexts (low, high half), or of a sparse one: [1 or 2, 2, limbs, N]."""
        evaluator = self.evaluator
        a = self._sum_repetitions(a, keys)
        for transform in self._inward:
            a = evaluator.rescale(transform(a, keys.galois))
        halves = [evaluator.add(a, evaluator.conjugate(a, keys.galois))] if self.plan.sparse else self._halves(a, keys)
        return Scaled(evaluator.stack(halves), 0, self.plan.scale(0))

    def _sum_repetitions(self, a: np.ndarray, keys: BootstrappingKeys) -> np.ndarray:
        """The sum of the rotations by all multiples of a sparse plan's period: the repetitions' noise averages out, and what else repeats is completed."""
        for step in self.plan.repetition_steps:
            a = self.evaluator.add(a, self.evaluator.rotate(a, keys.galois, [step])[0])
        return a

    def _halves(self, a: np.ndarray, keys: BootstrappingKeys) -> tuple[np.ndarray, np.ndarray]:
        """Twice the real and twice the imaginary parts of the slots."""
        evaluator = self.evaluator
        mirrored = evaluator.conjugate(a, keys.galois)
        return evaluator.add(a, mirrored), self._times_i(evaluator.add(mirrored, a, -1.0))

    def _times_i(self, a: np.ndarray) -> np.ndarray:
        return self.evaluator.multiply_plain(a, self._imaginary[: a.shape[-2]])

    def reduce(self, a: Scaled, keys: BootstrappingKeys) -> Scaled:
        """sin(2 pi x) for the arguments x / HALF_WIDTH."""
        plan, evaluator = self.plan, self.evaluator
        series = ChebyshevSeries(evaluator, plan, keys.galois)
        argument = Scaled(evaluator.add_integer(a.values, -round(SHIFT / HALF_WIDTH * a.scale)), 0, a.scale)
        squared = series.double_product(argument, argument, None)
        y = series(np.array(cosine_coefficients(plan.cosine_degree)), squared, plan.cosine_depth, plan.scale(plan.cosine_depth))
        for _ in range(DOUBLE_ANGLES):
            y = series.double_product(y, y, None)
        return y

    def to_coefficients(self, a: Scaled, keys: BootstrappingKeys, divisor: int = 1) -> np.ndarray:
        """[1 or 2, 2, limbs, N] back to one ciphertext [2, bottom, N] of half the message, over `divisor`, in complex slots."""
        evaluator = self.evaluator
        b = a.values[0] if self.plan.sparse else evaluator.add(a.values[0], self._times_i(a.values[1]))
        *first, last = self._outward_for(divisor)
        for transform in first:
            b = evaluator.rescale(transform(b, keys.galois))
        return evaluator.rescale(self._sum_repetitions(last(b, keys.galois), keys))

    def __call__(self, a: np.ndarray, keys: BootstrappingKeys, divisor: int = 1) -> np.ndarray:
        """[B, 2, 1, N] of real slots at level 0 and canonical scale to [B, 2, bottom, N] at the top level's canonical scale; two at a time.

        The values come out divided by `divisor`. A sparse plan averages over the repetitions.
        """
        parts = []
        for i in range(0, len(a), 2):
            pair = a[i : i + 2]
            raised = self.raise_modulus(self.pack(pair), keys)
            halves = self._halves(self.to_coefficients(self.reduce(self.to_slots(raised, keys), keys), keys, divisor), keys)
            parts.extend(halves[: len(pair)])
        return self.evaluator.stack(parts)
