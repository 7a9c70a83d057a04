"""Secret, public and evaluation keys. Security rests on RLWE with a uniform ternary secret and discrete Gaussian errors, sigma 3.19."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import prange

from hf_he.backends.keys import SecretKeyBase, new_key_id
from hf_he.ckks.context import Context
from hf_he.ckks.jit import KERNEL_LOCK, kernel
from hf_he.ckks.random import SEED_BYTES, Stream, gaussian, ternary, uniform, uniform_into
from hf_he.ckks.vector import WIDTH, add, ld, mm, mul, red, sp, st, sub


class SecretKey(SecretKeyBase):
    """A uniform ternary secret. Only the client holds it; it shows its id and nothing else."""

    def __init__(self, context: Context, coefficients: np.ndarray, key_id: str) -> None:
        super().__init__(key_id, context.parameters.fingerprint)
        self._coefficients = coefficients.astype(np.int8)
        ordered = coefficients.astype(np.float64)[context.order]
        self._rows = context.forward(ordered[None], np.arange(len(context.chain)))[0]

    @classmethod
    def generate(cls, context: Context) -> SecretKey:
        """A fresh secret from operating-system randomness."""
        return cls(context, ternary((context.ring_degree,), Stream()), new_key_id())


@dataclass(frozen=True, eq=False)
class PublicKey:
    """b = -a*s + e with a expanded from `seed`: [limbs, N] each. Anyone may encrypt with it."""

    key_id: str
    fingerprint: str
    seed: bytes = field(repr=False)
    b: np.ndarray = field(repr=False)
    a: np.ndarray = field(repr=False)

    @classmethod
    def generate(cls, context: Context, secret_key: SecretKey) -> PublicKey:
        """A fresh encryption key."""
        seed = os.urandom(SEED_BYTES)
        a = uniform(seed, context.parameters.moduli, context.ring_degree)
        error = context.forward(gaussian((1, context.ring_degree), Stream()), np.arange(context.limbs))[0]
        b = np.empty_like(a)
        with context.lock:
            _mask(a[None, None], error[None, None], secret_key._rows, secret_key._rows, context.switch.special_factor, 0, b[None, None], context.tables.moduli)
        return cls(secret_key.key_id, context.parameters.fingerprint, seed, b, a)


@dataclass(frozen=True, eq=False)
class SwitchingKeys:
    """Key-switching keys in one array [key, modulus, N/8, digit, 2, 8], the a-half of each expanded from its seed.

    Key 0 relinearises; `index` maps a Galois element to its key, which is stored pulled back through the automorphism.
    """

    residues: np.ndarray = field(repr=False)
    seeds: np.ndarray = field(repr=False)
    index: dict[int, int] = field(repr=False)
    fingerprint: str

    @classmethod
    def generate(
        cls, context: Context, secret_key: SecretKey, galois_elements: Sequence[int], progress: Callable[[int, int], None] | None = None
    ) -> SwitchingKeys:
        """Relinearisation and the given automorphisms."""
        total = 1 + len(galois_elements)
        keys = cls.allocate(context, total, {g: i + 1 for i, g in enumerate(galois_elements)})
        rows = secret_key._rows
        square = np.empty_like(rows)
        with context.lock:
            _square(rows, square, context.tables.moduli)
        workspace = np.empty((2, context.dnum, len(context.chain), context.ring_degree))
        for i in range(total):
            keys.seeds[i] = np.frombuffer(os.urandom(SEED_BYTES), dtype=np.uint8)
            if i == 0:
                source, target = rows, square
            else:
                inverse = pow(galois_elements[i - 1], -1, 2 * context.ring_degree)
                source, target = np.ascontiguousarray(rows[:, context.permutation(inverse)]), rows
            a, b = workspace
            keys.expand(context, i, a)
            errors = context.forward(gaussian((context.dnum, context.ring_degree), Stream()), np.arange(len(context.chain)))
            with context.lock:
                _mask(a[None], errors[None], source, target, context.switch.special_factor, context.alpha, b[None], context.tables.moduli)
            keys.fill(i, b, a)
            if progress is not None:
                progress(i + 1, total)
        return keys

    @classmethod
    def allocate(cls, context: Context, count: int, index: dict[int, int]) -> SwitchingKeys:
        """Room for `count` keys."""
        return cls(np.empty(cls.shape(context, count)), np.zeros((count, SEED_BYTES), dtype=np.uint8), index, context.parameters.fingerprint)

    @staticmethod
    def shape(context: Context, count: int) -> tuple[int, ...]:
        """Of the residues of `count` keys."""
        return (count, len(context.chain), context.ring_degree // WIDTH, context.dnum, 2, WIDTH)

    def expand(self, context: Context, i: int, out: np.ndarray) -> None:
        """The uniform half of key i into out [digit, modulus, N]."""
        seed = self.seeds[i].tobytes()
        for j in range(context.dnum):
            for k, modulus in enumerate(context.chain):
                uniform_into(seed, j * len(context.chain) + k, modulus, out[j, k])

    def fill(self, i: int, b: np.ndarray, a: np.ndarray) -> None:
        """Store key i from its halves [digit, modulus, N]."""
        with KERNEL_LOCK:
            _interleave(b, a, self.residues[i])

    def half(self, i: int, k: int) -> np.ndarray:
        """The b-half of key i modulo modulus k: [digit, N]."""
        part = self.residues[i, k, :, :, 0]
        return np.ascontiguousarray(part.transpose(1, 0, 2)).reshape(part.shape[1], -1)


@kernel(parallel=True)
def _mask(a, error, source, target, special_factor, alpha, b, moduli):
    """b = error - a*source, plus P*target on the limbs of digit j when alpha > 0. a, error, b [B, digits, moduli, N]."""
    batch, digits, count, n = a.shape
    for task in prange(batch * digits * count):
        i = task // (digits * count)
        j = task // count % digits
        k = task % count
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        own = alpha > 0 and k < special_factor.shape[0] and k // alpha == j
        p = sp(special_factor[k, 0] if own else 0.0)
        pi = mul(p, qi)
        for c in range(0, n, 8):
            s = ld(source[k], c)
            z = sub(ld(error[i, j, k], c), mm(ld(a[i, j, k], c), s, mul(s, qi), q))
            st(b[i, j, k], c, red(add(z, mm(ld(target[k], c), p, pi, q)), q, qi))


@kernel(parallel=True)
def _square(x, out, moduli):
    for k in prange(x.shape[0]):
        q = sp(moduli[k, 0])
        qi = sp(moduli[k, 1])
        for c in range(0, x.shape[1], 8):
            v = ld(x[k], c)
            st(out[k], c, red(mm(v, v, mul(v, qi), q), q, qi))


@kernel(parallel=True)
def _interleave(b, a, out):
    """[digit, modulus, N] halves to [modulus, N/8, digit, 2, 8]."""
    for k in prange(out.shape[0]):
        digits = out.shape[2]
        for i in range(out.shape[1]):
            for j in range(digits):
                at = (i * digits + j) * 2 * WIDTH
                st(out[k], at, ld(b[j, k], i * WIDTH))
                st(out[k], at + WIDTH, ld(a[j, k], i * WIDTH))
