"""Secret, public and evaluation keys. Security rests on RLWE with a uniform ternary secret and discrete Gaussian errors, sigma 3.19."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import prange

from hf_he.ckks.context import Context
from hf_he.ckks.conversion import KeyTable
from hf_he.ckks.jit import KERNEL_LOCK, kernel
from hf_he.ckks.random import SEED_BYTES, Stream, gaussian, ternary, uniform, uniform_into
from hf_he.ckks.vector import WIDTH, add, larger, ld, ld_packed, mm, mul, red, sp, st, st_packed, sub
from hf_he.secret_key import SecretKeyBase, new_key_id


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


def key_chain(context: Context, limbs: int) -> np.ndarray:
    """[limbs + K] positions in the chain of the moduli that a key for `limbs` ciphertext limbs covers."""
    return np.concatenate([np.arange(limbs), np.arange(context.limbs, len(context.chain))])


def key_digits(context: Context, limbs: int) -> int:
    """Digits of a key for `limbs` ciphertext limbs."""
    return -(-limbs // context.alpha)


def half_bytes(context: Context, limbs: int) -> int:
    """Bytes of a packed half of a key for `limbs` ciphertext limbs."""
    return key_digits(context, limbs) * context.ring_degree * int(context.switch.widths[key_chain(context, limbs)].sum())


def pack_half(context: Context, half: np.ndarray) -> np.ndarray:
    """[digit, limbs + K, N] centred residues to [half_bytes] uint8, in the order of conversion.inner_product."""
    limbs = half.shape[1] - len(context.parameters.special_moduli)
    packed = np.empty(half_bytes(context, limbs), dtype=np.uint8)
    with KERNEL_LOCK:
        _pack(half, packed.ctypes.data, context.switch.widths[key_chain(context, limbs)])
    return packed


def residues_fit(context: Context, packed: np.ndarray, limbs: int) -> bool:
    """Whether every residue of a packed half [half_bytes] is centred, within (q + 1)/2."""
    chain = key_chain(context, limbs)
    largest = np.zeros((len(chain), WIDTH))
    with KERNEL_LOCK:
        _largest(packed.ctypes.data, context.switch.widths[chain], key_digits(context, limbs) * context.ring_degree, largest)
    return bool((2 * largest.max(axis=1) <= context.tables.moduli[chain, 0] + 1).all())


def expand_half(context: Context, seed: bytes, limbs: int) -> np.ndarray:
    """[digit, limbs + K, N]: the uniform half of a key."""
    chain = key_chain(context, limbs)
    out = np.empty((key_digits(context, limbs), len(chain), context.ring_degree))
    for j, k in np.ndindex(out.shape[:2]):
        uniform_into(seed, j * len(context.chain) + int(chain[k]), context.chain[chain[k]], out[j, k])
    return out


def switching_halves(context: Context, source: np.ndarray, target: np.ndarray, limbs: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A fresh key from secret `target` to secret `source` (rows [M, N]) for ciphertexts of at most `limbs` limbs: seed, b, a [digit, limbs + K, N]."""
    seed, chain = os.urandom(SEED_BYTES), key_chain(context, limbs)
    a = expand_half(context, seed, limbs)
    errors = context.forward(gaussian((len(a), context.ring_degree), Stream()), chain)
    b = np.empty_like(a)
    with context.lock:
        _mask(a[None], errors[None], source[chain], target[chain], context.switch.special_factor[:limbs], context.alpha, b[None], context.tables.moduli[chain])
    return seed, b, a


class SwitchingKeys:
    """Packed key-switching keys: their b-halves in memory or in mapped files, their a-halves expanded from seeds.

    Key 0 relinearises; `index` maps a Galois element to its key, which is stored pulled back through the automorphism. Key i serves ciphertexts of
    at most `limbs[i]` limbs.
    """

    def __init__(self, context: Context, limbs: Sequence[int], index: dict[int, int]) -> None:
        """No keys yet; `fill` adds them."""
        self.limbs = np.array(limbs, dtype=np.int64)
        self.index = index
        self.seeds = np.zeros((len(limbs), SEED_BYTES), dtype=np.uint8)
        self.halves: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, dtype=np.uint8),) * 2] * len(limbs)
        self.fingerprint = context.parameters.fingerprint
        rows = np.full((len(limbs), len(context.chain)), -1, dtype=np.int64)
        digits = np.array([key_digits(context, count) for count in limbs], dtype=np.int64)
        for i, count in enumerate(limbs):
            chain = key_chain(context, count)
            sizes = digits[i] * context.ring_degree * context.switch.widths[chain]
            rows[i, chain] = np.cumsum(sizes) - sizes
        self.table = KeyTable(np.zeros((len(limbs), 2), dtype=np.int64), rows, digits)

    def __repr__(self) -> str:
        return f"SwitchingKeys({len(self)} keys)"

    def __len__(self) -> int:
        return len(self.limbs)

    @property
    def nbytes(self) -> int:
        """Bytes of both halves of all keys."""
        return sum(half.nbytes for halves in self.halves for half in halves)

    @classmethod
    def generate(
        cls, context: Context, secret_key: SecretKey, galois_elements: Mapping[int, int], progress: Callable[[int, int], None] | None = None
    ) -> SwitchingKeys:
        """Relinearisation for the whole chain, and automorphisms: Galois element -> limbs of the largest ciphertext it is for."""
        limbs = [context.limbs, *galois_elements.values()]
        keys = cls(context, limbs, {g: i + 1 for i, g in enumerate(galois_elements)})
        pairs = galois_secrets(context, secret_key, galois_elements)
        for i, (source, target) in enumerate(pairs):
            seed, b, a = switching_halves(context, source, target, limbs[i])
            keys.fill(i, seed, pack_half(context, b), pack_half(context, a))
            if progress is not None:
                progress(i + 1, len(keys))
        return keys

    def fill(self, i: int, seed: bytes, b: np.ndarray, a: np.ndarray) -> None:
        """Use these packed halves [half_bytes] as key i, without a copy; nothing may write to them again."""
        self.seeds[i] = np.frombuffer(seed, dtype=np.uint8)
        self.halves[i] = b, a
        self.table.halves[i] = b.ctypes.data, a.ctypes.data

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's halves lie elsewhere."""
        self.__dict__.update(state)
        self.table.halves[:] = [(b.ctypes.data, a.ctypes.data) for b, a in self.halves]


def galois_secrets(context: Context, secret_key: SecretKey, galois_elements: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(source, target) of `switching_halves` for relinearisation, then for each automorphism: rows [M, N]."""
    rows = secret_key._rows
    square = np.empty_like(rows)
    with context.lock:
        _square(rows, square, context.tables.moduli)
    yield rows, square
    for element in galois_elements:
        inverse = pow(element, -1, 2 * context.ring_degree)
        yield np.ascontiguousarray(rows[:, context.permutation(inverse)]), rows


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
def _pack(half, address, widths):
    """[digit, modulus, N] residues to one stream per modulus."""
    digits, rows, n = half.shape
    for r in prange(rows):
        width = widths[r]
        o = address + digits * n * widths[:r].sum()
        for c in range(0, n, WIDTH):
            for j in range(digits):
                st_packed(o, width, ld(half[j, r], c))
                o += WIDTH * width


@kernel(parallel=True)
def _largest(address, widths, count, largest):
    """Largest magnitudes of the `count` residues of each stream, lane by lane: [modulus, 8]."""
    for r in prange(widths.size):
        width = widths[r]
        start = address + count * widths[:r].sum()
        found = sp(0.0)
        for o in range(start, start + count * width, WIDTH * width):
            found = larger(found, ld_packed(o, width))
        st(largest[r], 0, found)
