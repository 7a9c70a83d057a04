"""One factor of a linear transform on ciphertexts, by baby and giant steps.

sum_s d_s * rot_s(x) = sum_g rot_gb( sum_i rot_-gb(d_(gb + i)) * rot_i(x) ): the baby steps i share one ModUp, the products are one fused
kernel, the giant steps one ModDown (Bossuat et al., Eurocrypt 2021).
"""

from __future__ import annotations

import numpy as np

from hf_he.ckks.bootstrapping.factors import Factor
from hf_he.ckks.evaluator import Evaluator
from hf_he.ckks.keys import SwitchingKeys

BABY_STEPS = 8


def _split(factor: Factor) -> tuple[int, range]:
    """Number of baby steps and range of giant steps."""
    babies = min(BABY_STEPS, len(factor.diagonals))
    return babies, range(min(factor.diagonals) // babies, max(factor.diagonals) // babies + 1)


def required_steps(factor: Factor) -> set[int]:
    """Rotation steps a factor needs keys for."""
    babies, giants = _split(factor)
    steps = {i * factor.stride for i in range(babies)} | {g * babies * factor.stride for g in giants}
    return {s % factor.slots for s in steps} - {0}


class LinearTransform:
    """A factor encoded for ciphertexts of `limbs` limbs; applying it multiplies the scale by `scale`."""

    def __init__(self, evaluator: Evaluator, factor: Factor, limbs: int, scale: float) -> None:
        self.limbs = limbs
        self._evaluator = evaluator
        babies, giants = _split(factor)
        self._babies = [i * factor.stride for i in range(babies)]
        self._giants = [g * babies * factor.stride for g in giants]
        rows = []
        for g in giants:
            shift = g * babies * factor.stride
            values = np.zeros((babies, factor.period), dtype=complex)
            for i in range(babies):
                if g * babies + i in factor.diagonals:
                    values[i] = np.roll(factor.diagonals[g * babies + i], shift)
            rows.append(evaluator.encode(values, limbs - 1, scale))
        self._plain = np.stack(rows)

    def __call__(self, a: np.ndarray, keys: SwitchingKeys) -> np.ndarray:
        """[2, limbs, N] to [2, limbs, N], not rescaled."""
        evaluator = self._evaluator
        rotated = evaluator.rotate(a, keys, self._babies)
        return evaluator.sum_rotated(evaluator.multiply_plain_sum(self._plain, rotated), keys, self._giants)
