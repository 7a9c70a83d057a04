"""One factor of a linear transform on ciphertexts, by baby and giant steps.

sum_s d_s * rot_s(x) = sum_g rot_gb( sum_i rot_-gb(d_(gb + i)) * rot_i(x) ). The baby steps i are hoisted: they share one ModUp. The products
are one fused kernel. The giant steps g go by Horner's rule, which needs two keys for all of them: a key takes 164 MB at N = 2^16, and the
divisions by the special moduli that a double-hoisted sum would save are 8 % of the time.
"""

from __future__ import annotations

import numpy as np

from hf_he.ckks.bootstrapping.factors import Factor
from hf_he.ckks.encoder import to_coefficients
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
    giant = babies * factor.stride
    steps = {i * factor.stride for i in range(babies)} | ({giant} if len(giants) > 1 else set()) | {giants[0] * giant}
    return {s % factor.slots for s in steps} - {0}


class LinearTransform:
    """A factor encoded for ciphertexts of `limbs` limbs; applying it multiplies the scale by `scale`.

    Diagonals without a period that keeps them short (0.5 GB for 32 limbs at N = 2^16) are kept as their integer coefficients, and transformed at
    each use, the baby steps of one giant step at a time: a tenth of the transforms of the rotations beside it.
    """

    def __init__(self, evaluator: Evaluator, factor: Factor, limbs: int, scale: float) -> None:
        self._evaluator = evaluator
        babies, giants = _split(factor)
        self._limbs = limbs
        self._babies = [i * factor.stride for i in range(babies)]
        self._giant = babies * factor.stride
        self._first = giants[0] * self._giant % factor.slots
        rows = []
        for g in giants:
            values = np.zeros((babies, factor.period), dtype=complex)
            for i in range(babies):
                if g * babies + i in factor.diagonals:
                    values[i] = np.roll(factor.diagonals[g * babies + i], g * self._giant)
            rows.append(to_coefficients(values, scale))
        self._compact = evaluator.keeps(factor.period)
        self._rows = np.stack([evaluator.encode_coefficients(row, limbs - 1) for row in rows]) if self._compact else np.stack(rows)

    def __call__(self, a: np.ndarray, keys: SwitchingKeys) -> np.ndarray:
        """[2, limbs, N] to [2, limbs, N], not rescaled."""
        evaluator = self._evaluator
        rotated = evaluator.rotate(a, keys, self._babies)
        if self._compact:
            parts = iter(evaluator.multiply_plain_sum(self._rows, rotated)[::-1])
        else:
            parts = (evaluator.multiply_plain_sum(evaluator.encode_coefficients(row, self._limbs - 1)[None], rotated)[0] for row in self._rows[::-1])
        total = None
        for part in parts:
            total = part if total is None else evaluator.add(evaluator.rotate(total, keys, [self._giant])[0], part)
        return evaluator.rotate(total, keys, [self._first])[0] if self._first else total
