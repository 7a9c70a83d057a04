"""What is measured: names, parameter sets and the shapes of the linear layers."""

from __future__ import annotations

from dataclasses import dataclass

ROTATE = "rotate"
HOISTED = "rotate_8_hoisted"
MULTIPLY = "multiply_relinearize_rescale"
NTT = "ntt"
BOOTSTRAP = "bootstrap"
COMBINATION = "linear_combination"
PER_WEIGHT = "linear_per_weight"
WEIGHTED_SUM = "linear_weighted_sum"

BOOTSTRAP_SLOTS = {BOOTSTRAP: 0, "bootstrap_4096_slots": 4096, "bootstrap_64_slots": 64}
"""Bootstrapping of vectors that repeat after so many slots; 0: all slots are distinct."""

PRIMITIVES = (ROTATE, HOISTED, MULTIPLY, NTT)
LINEAR = (COMBINATION, PER_WEIGHT, WEIGHTED_SUM)

HOISTED_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)

TITLES = {
    ROTATE: "rotate",
    HOISTED: "8 hoisted rotations",
    MULTIPLY: "multiply, relinearise, rescale",
    NTT: "NTT, one limb, one core",
    **{name: f"bootstrap, 2^{slots.bit_length() - 1} slots" if slots else "bootstrap" for name, slots in BOOTSTRAP_SLOTS.items()},
    COMBINATION: "linear, one call",
    PER_WEIGHT: "linear, per weight",
    WEIGHTED_SUM: "linear, weighted sums",
}


@dataclass(frozen=True)
class Instance:
    """One measured configuration: ring degree 2^log2_degree, `limbs` ciphertext moduli, and `shape` (in, out) of linear layers."""

    log2_degree: int
    limbs: int
    shape: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """N x limbs."""
        return f"2^{self.log2_degree} x {self.limbs}"


PARAMETER_SETS = (Instance(14, 8), Instance(15, 16), Instance(16, 24))
BOOTSTRAP_SET = Instance(16, 32)
"""The set n16-bootstrap: 14 limbs for use, 18 for bootstrapping. Peers choose their own."""
LINEAR_SET = Instance(14, 8, (128, 512))
LINEAR_SQUARE = Instance(14, 2, (768, 768))
QUICK_LINEAR = Instance(14, 8, (8, 16))
QUICK_SQUARE = Instance(14, 2, (64, 64))
