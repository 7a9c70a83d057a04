"""CKKS operations on residue tensors [*batch, component, limb, N]: payloads in, payloads out, no levels or scales checked.

Everything stays in NTT domain with |x| <= 0.6 q. Each method holds the context's lock: the kernels use both cores and shared scratch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import wraps

import numpy as np

from hf_he.ckks import arithmetic, encryption, keyswitch, products
from hf_he.ckks.context import Context
from hf_he.ckks.encoder import EXACT_INTEGERS, to_coefficients, to_values
from hf_he.ckks.keys import PublicKey, SecretKey, SwitchingKeys
from hf_he.ckks.memory import empty
from hf_he.ckks.number_theory import centred
from hf_he.ckks.random import SEED_BYTES, Stream, gaussian, ternary, uniform_into
from hf_he.errors import MissingKeyError

DECODE_MARGIN_BITS = 40


def _exclusive(method):
    @wraps(method)
    def locked(self, *args, **kwargs):
        with self.context.lock:
            return method(self, *args, **kwargs)

    return locked


def _flat(x: np.ndarray) -> np.ndarray:
    """[*batch, C, L, N] to contiguous [B, C, L, N]."""
    return np.ascontiguousarray(x).reshape(-1, *x.shape[-3:])


def _batch_index(batch: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray:
    """[prod(target)]: which entry of `batch` each entry of the broadcast shape reads (writable: a read-only array would compile every kernel anew)."""
    return np.array(np.broadcast_to(np.arange(math.prod(batch)).reshape(batch), target)).reshape(-1)


class Evaluator:
    """Operations of one parameter set."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.moduli = context.tables.moduli

    # ---- encoding, encryption ----
    @_exclusive
    def encode(self, values: np.ndarray, level: int, scale: float) -> np.ndarray:
        """[*batch, p] reals to compact residues [*batch, level + 1, S]."""
        batch = values.shape[:-1]
        coefficients = to_coefficients(values.reshape(-1, values.shape[-1]), scale)
        rows = self._to_rows(coefficients, level)
        return rows.reshape(*batch, level + 1, rows.shape[-1])

    @_exclusive
    def encode_coefficients(self, coefficients: np.ndarray, level: int) -> np.ndarray:
        """[B, d] integer coefficients of polynomials in X^(N/d) (see encoder.to_coefficients) to compact residues [B, level + 1, S]."""
        return self._to_rows(coefficients, level)

    def _to_rows(self, coefficients: np.ndarray, level: int, noise: np.ndarray | float = 0.0) -> np.ndarray:
        """Residues of coefficients + noise. Large coefficients are reduced first: a sum of floats beyond 2^53 would round the noise away."""
        context, limbs = self.context, level + 1
        compact = coefficients.shape[-1] < context.ring_degree
        if np.abs(coefficients).max(initial=0.0) >= EXACT_INTEGERS:
            return np.concatenate([self._to_rows_of(np.fmod(coefficients, context.chain[k]) + noise, k, compact) for k in range(limbs)], axis=1)
        coefficients = coefficients + noise
        if compact:
            return context.compact(coefficients, limbs)
        return context.forward(coefficients[:, context.order], np.arange(limbs))

    def _to_rows_of(self, coefficients: np.ndarray, k: int, compact: bool) -> np.ndarray:
        if compact:
            return self.context.compact(coefficients, k + 1)[:, k:]
        return self.context.forward(coefficients[:, self.context.order], np.array([k]))

    @_exclusive
    def encrypt(self, values: np.ndarray, key: SecretKey | PublicKey, level: int, scale: float) -> tuple[np.ndarray, np.ndarray | None]:
        """Fresh ciphertexts [*batch, 2, level + 1, N]; under a secret key also the seeds [*batch, 32] of their uniform halves."""
        context, limbs = self.context, level + 1
        batch = values.shape[:-1]
        count, n = math.prod(batch), context.ring_degree
        message = to_coefficients(values.reshape(count, values.shape[-1]), scale)
        chain = np.arange(limbs)
        out = empty(count, 2, limbs, n)
        if isinstance(key, SecretKey):
            seeds = np.frombuffer(os.urandom(SEED_BYTES * count), dtype=np.uint8).reshape(count, SEED_BYTES)
            payload = self._to_rows(message, level, gaussian((count, n), Stream()))
            for i in range(count):
                self.expand(seeds[i].tobytes(), out[i, 1])
            encryption.encrypt_rows(out, payload, key._rows, self.moduli)
            return out.reshape(*batch, 2, limbs, n), seeds.reshape(*batch, SEED_BYTES)
        noise = context.forward(gaussian((count, n), Stream()), chain)
        payload = self._to_rows(message, level, gaussian((count, n), Stream()))
        mask = context.forward(ternary((count, n), Stream()), chain)
        encryption.encrypt_public_rows(out, mask, key.b, key.a, payload, noise, self.moduli)
        return out.reshape(*batch, 2, limbs, n), None

    def expand(self, seed: bytes, out: np.ndarray) -> None:
        """The uniform half that `seed` stands for into out [limbs, N]."""
        for k in range(out.shape[0]):
            uniform_into(seed, k, self.context.chain[k], out[k])

    @_exclusive
    def decrypt(self, ct: np.ndarray, key: SecretKey, scale: float) -> np.ndarray:
        """[*batch, slots] real values. As many limbs are read as the scale plus 40 bits of value need and one more; all, where that one says they do not do."""
        context = self.context
        batch, n = ct.shape[:-3], ct.shape[-1]
        flat = _flat(ct)
        limbs = 1
        while limbs < flat.shape[2] and context.parameters.log2_modulus(limbs - 1) < math.log2(scale) + DECODE_MARGIN_BITS:
            limbs += 1
        digits = self._digits(flat, key, min(limbs + 1, flat.shape[2]))
        if digits.shape[1] < flat.shape[2] and digits[:, -1].any():
            digits = self._digits(flat, key, flat.shape[2])
        coefficients = self._compose(digits)[:, context.inverse_order]
        return to_values(coefficients, scale).reshape(*batch, n // 2)

    def _digits(self, flat: np.ndarray, key: SecretKey, limbs: int) -> np.ndarray:
        """Centred mixed-radix digits [B, limbs, N] of what [B, C, L, N] decrypts to modulo the first `limbs` moduli."""
        n = flat.shape[-1]
        rows = np.empty((flat.shape[0], limbs, n))
        encryption.decrypt_rows(flat, key._rows, rows, self.moduli)
        residues = self.context.inverse(rows.reshape(-1, n), np.tile(np.arange(limbs), flat.shape[0])).reshape(flat.shape[0], limbs, n)
        digits = np.empty_like(residues)
        inverse = np.zeros((limbs, limbs))
        for i in range(limbs):
            for j in range(i):
                inverse[j, i] = centred(pow(self.context.chain[j], -1, self.context.chain[i]), self.context.chain[i])
        encryption.mixed_radix(residues, digits, inverse, self.moduli)
        return digits

    def _compose(self, digits: np.ndarray) -> np.ndarray:
        """Value of [B, limbs, N] mixed-radix digits as float64: one rounding per addition."""
        limbs = digits.shape[1]
        value = digits[:, limbs - 1]
        for i in reversed(range(limbs - 1)):
            value = value * self.context.chain[i] + digits[:, i]
        return value

    # ---- linear ----
    @_exclusive
    def add(self, a: np.ndarray, b: np.ndarray, sign: float = 1.0) -> np.ndarray:
        """a + sign * b, sign = +-1; batches broadcast, a missing third component counts as zero."""
        batch = np.broadcast_shapes(a.shape[:-3], b.shape[:-3])
        components = max(a.shape[-3], b.shape[-3])
        out = empty(math.prod(batch), components, *a.shape[-2:])
        arithmetic.add_rows(_flat(a), _batch_index(a.shape[:-3], batch), _flat(b), _batch_index(b.shape[:-3], batch), out, sign, self.moduli)
        return out.reshape(*batch, components, *a.shape[-2:])

    def negate(self, a: np.ndarray) -> np.ndarray:
        """-a."""
        return np.negative(a, out=empty(*a.shape))

    @_exclusive
    def add_plain(self, a: np.ndarray, plain: np.ndarray) -> np.ndarray:
        """a plus compact plaintexts [*batch, L, S]."""
        return self._with_plain(arithmetic.add_plain_rows, a, plain)

    @_exclusive
    def multiply_plain(self, a: np.ndarray, plain: np.ndarray) -> np.ndarray:
        """a times compact plaintexts [*batch, L, S]."""
        return self._with_plain(arithmetic.multiply_plain_rows, a, plain)

    def _with_plain(self, kernel, a: np.ndarray, plain: np.ndarray) -> np.ndarray:
        batch = np.broadcast_shapes(a.shape[:-3], plain.shape[:-2])
        out = empty(math.prod(batch), *a.shape[-3:])
        flat = np.ascontiguousarray(plain).reshape(-1, *plain.shape[-2:])
        kernel(_flat(a), _batch_index(a.shape[:-3], batch), flat, _batch_index(plain.shape[:-2], batch), out, self.moduli)
        return out.reshape(*batch, *a.shape[-3:])

    @_exclusive
    def add_integer(self, a: np.ndarray, value: int) -> np.ndarray:
        """Add an integer to every slot (before division by the scale)."""
        constants = np.array([float(centred(value, q)) for q in self.context.chain[: a.shape[-2]]])
        plain = np.repeat(constants[:, None], self.context.tables.roots1.shape[2], axis=1)
        return self._with_plain(arithmetic.add_plain_rows, a, plain)

    @_exclusive
    def multiply_integer(self, a: np.ndarray, value: int) -> np.ndarray:
        """Multiply by an integer of any size."""
        factors = np.array([float(centred(value, q)) for q in self.context.chain[: a.shape[-2]]])
        out = empty(math.prod(a.shape[:-3]), *a.shape[-3:])
        arithmetic.scale_rows(_flat(a), factors, out, self.moduli)
        return out.reshape(a.shape)

    @_exclusive
    def sum(self, a: np.ndarray) -> np.ndarray:
        """Sum over the leading batch axis."""
        out = empty(math.prod(a.shape[1:-3]), *a.shape[-3:])
        arithmetic.sum_rows(np.ascontiguousarray(a).reshape(a.shape[0], *out.shape), out, self.moduli)
        return out.reshape(a.shape[1:])

    def stack(self, items: Sequence[np.ndarray]) -> np.ndarray:
        """Payloads of one shape along a new leading axis."""
        return np.stack(items)

    @_exclusive
    def weighted_sum(self, items: Sequence[np.ndarray], weights: Sequence[int], constant: int) -> np.ndarray:
        """sum_k weights[k] * items[k] plus `constant` in every slot, for integers of any size and items [B, C, L, N]."""
        chain = self.context.chain[: items[0].shape[-2]]
        stacked = np.stack(items, out=empty(len(items), *items[0].shape))
        factors = np.array([[float(centred(w, q)) for q in chain] for w in weights])
        constants = np.array([float(centred(constant, q)) for q in chain])
        out = empty(*stacked.shape[1:])
        arithmetic.weighted_sum(stacked, factors, constants, out, self.moduli)
        return out

    # ---- products ----
    @_exclusive
    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Tensor product: 3 components."""
        batch = np.broadcast_shapes(a.shape[:-3], b.shape[:-3])
        out = empty(math.prod(batch), 3, *a.shape[-2:])
        arithmetic.multiply_rows(_flat(a), _batch_index(a.shape[:-3], batch), _flat(b), _batch_index(b.shape[:-3], batch), out, self.moduli)
        return out.reshape(*batch, 3, *a.shape[-2:])

    @_exclusive
    def multiply_plain_sum(self, plain: np.ndarray, a: np.ndarray) -> np.ndarray:
        """sum_k plain[g, k] * a[k]: plain [G, K, L, S], a [K, *batch, C, L, N] -> [G, *batch, C, L, N]."""
        limbs, n = a.shape[-2:]
        groups, terms, _, size = plain.shape
        rest = math.prod(a.shape[1:-2])
        out = empty(groups, rest, limbs, n)
        run = n // (size // products.COLUMNS)
        width = min(terms, products.TERMS)
        threads = self.context.threads
        workspace = [np.empty((threads, size)) for size in (2 * width * run, width * products.TILE * 16, products.TILE * 48)]
        products.multiply_plain_sum(
            np.ascontiguousarray(plain),
            np.ascontiguousarray(a).reshape(terms, rest, limbs, n),
            out,
            self.moduli,
            self.context.switch.shifts,
            *workspace,
            threads,
        )
        return out.reshape(groups, *a.shape[1:])

    @_exclusive
    def linear_combination(self, weights: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Integer matrix [I, J] with entries below 2^25 times a [J, *batch, C, L, N], exact."""
        limbs, n = a.shape[-2:]
        rest = math.prod(a.shape[1:-2])
        out = empty(weights.shape[0], rest, limbs, n)
        largest = max(1, int(np.abs(weights).max(initial=0)))
        chunk = 2**53 // (largest << 24)
        threads = self.context.threads
        scratch = np.empty((threads, weights.shape[1] * 2 * products.PANEL + 192))
        products.integer_matrix(
            products.panel_weights(weights), np.ascontiguousarray(a).reshape(-1, rest, limbs, n), out, chunk, self.moduli,
            self.context.switch.shifts, scratch, threads,
        )  # fmt: skip
        return out.reshape(weights.shape[0], *a.shape[1:])

    @_exclusive
    def rescale(self, a: np.ndarray) -> np.ndarray:
        """Divide by the last modulus, rounded: one limb less."""
        limbs, n = a.shape[-2:]
        rows = math.prod(a.shape[:-2])
        out = empty(rows, limbs - 1, n)
        keyswitch.rescale_rows(
            np.ascontiguousarray(a).reshape(rows, limbs, n),
            out,
            empty(rows, n),
            self.context.tables,
            self.context.switch,
            self.context.scratch,
            self.context.threads,
        )
        return out.reshape(*a.shape[:-2], limbs - 1, n)

    def raise_modulus(self, a: np.ndarray, limbs: int) -> np.ndarray:
        """[2, 1, N] modulo q_0 to [2, limbs, N]: the same centred coefficients."""
        coefficients = self.context.inverse(a[:, 0], np.zeros(2, dtype=np.int64))
        return self.context.forward(coefficients, np.arange(limbs))

    def keeps(self, period: int) -> bool:
        """Whether plaintexts of this period are short enough to be kept encoded."""
        return 2 * period < self.context.ring_degree

    # ---- key switching ----
    def _key_index(self, keys: SwitchingKeys, elements: Sequence[int], identity: int, limbs: int) -> np.ndarray:
        """[len(elements)] which keys to use, `identity` for element 1. Raises MissingKeyError for a key of a lower level: it has no such rows."""
        index = np.array([keys.index[g] if g != 1 else identity for g in elements])
        if (keys.limbs[index[index >= 0]] < limbs).any():
            raise MissingKeyError(f"a key does not reach ciphertexts of {limbs} limbs: generate the evaluation keys for the levels they are used at")
        return index

    def _switch(
        self, a: np.ndarray, source: int, addends: int, keys: SwitchingKeys, elements: Sequence[int], out: np.ndarray | None = None, dropped: int = 0
    ) -> np.ndarray:
        """[len(elements), B, 2, L - dropped, N], into `out` if given; element 1 stands for relinearisation."""
        context = self.context
        flat = _flat(a)
        if out is None:
            out = empty(len(elements), flat.shape[0], 2, flat.shape[2] - dropped, flat.shape[3])
        index = self._key_index(keys, elements, 0, flat.shape[2])
        if elements[0] == 1:
            permutations = np.empty((1, 0), dtype=np.int32)
        else:
            permutations = np.stack([context.permutation(g) for g in elements])
        keyswitch.switch_hoisted(
            flat, source, addends, dropped, keys.table, index, permutations, out, context.alpha, context.limbs - flat.shape[2],
            context.tables, context.switch, context.scratch, context.threads,
        )  # fmt: skip
        return out

    @_exclusive
    def relinearize(self, a: np.ndarray, keys: SwitchingKeys) -> np.ndarray:
        """3 components to 2."""
        return self._switch(a, 2, 2, keys, [1])[0].reshape(*a.shape[:-3], 2, *a.shape[-2:])

    @_exclusive
    def relinearize_rescale(self, a: np.ndarray, keys: SwitchingKeys) -> np.ndarray:
        """3 components to 2, divided by the last modulus, rounded: one limb less and one division instead of two."""
        return self._switch(a, 2, 2, keys, [1], dropped=1)[0].reshape(*a.shape[:-3], 2, a.shape[-2] - 1, a.shape[-1])

    @_exclusive
    def switch_key(self, a: np.ndarray, key: SwitchingKeys) -> np.ndarray:
        """2 components under another secret: `key` holds a single key, from the old secret to the new one."""
        return self._switch(a, 1, 1, key, [1])[0].reshape(a.shape)

    @_exclusive
    def rotate(self, a: np.ndarray, keys: SwitchingKeys, steps: Sequence[int]) -> np.ndarray:
        """Left rotations [len(steps), *batch, 2, L, N] from one ModUp; step 0 copies."""
        moving = [i for i, s in enumerate(steps) if s % self.context.parameters.slots]
        if len(moving) == len(steps) > 0:
            return self._switch(a, 1, 1, keys, [self.context.galois_element(s) for s in steps]).reshape(len(steps), *a.shape)
        out = empty(len(steps), *a.shape)
        for i in set(range(len(steps))) - set(moving):
            out[i] = a
        if moving and moving == list(range(1, len(steps))):
            elements = [self.context.galois_element(s) for s in steps[1:]]
            self._switch(a, 1, 1, keys, elements, out[1:].reshape(len(moving), -1, *a.shape[-3:]))
        elif moving:
            out[moving] = self.rotate(a, keys, [steps[i] for i in moving])
        return out

    @_exclusive
    def conjugate(self, a: np.ndarray, keys: SwitchingKeys) -> np.ndarray:
        """The automorphism X -> X^-1."""
        return self._switch(a, 1, 1, keys, [self.context.conjugation_element])[0].reshape(a.shape)

    @_exclusive
    def sum_rotated(self, a: np.ndarray, keys: SwitchingKeys, steps: Sequence[int]) -> np.ndarray:
        """sum_g rotate(a[g], steps[g]) with one division by the special moduli."""
        context = self.context
        flat = np.ascontiguousarray(a).reshape(a.shape[0], -1, *a.shape[-3:])
        out = empty(*flat.shape[1:])
        elements = [context.galois_element(s) for s in steps]
        index = self._key_index(keys, elements, -1, flat.shape[3])
        permutations = np.stack([context.permutation(g) for g in elements])
        keyswitch.switch_sum(
            flat, keys.table, index, permutations, out, context.alpha, context.limbs - flat.shape[3],
            context.tables, context.switch, context.scratch, context.threads,
        )  # fmt: skip
        return out.reshape(a.shape[1:])
