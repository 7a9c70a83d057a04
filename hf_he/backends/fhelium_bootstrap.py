"""Bootstrapping of hf_he.ckks.bootstrapping on FHElium's primitives: an evaluator for its pipeline, and the keys.

FHElium's own composition wants its last modulus near the scale and leaves 8 levels; ours runs on the parameters of every other backend and leaves
theirs. Payloads here are the native engine's, [*batch, component, limbs, N] from the lowest limb up, as int64 residues in NTT domain and Montgomery form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_he.backends.fhelium_engine import make_engine, prepared
from hf_he.backends.fhelium_keys import HOST, KeyResidency
from hf_he.backends.keys import GaloisKeys
from hf_he.ckks.bootstrapping.keys import ephemeral_parameters, rotation_limbs, sparse_ternary
from hf_he.ckks.bootstrapping.plan import EPHEMERAL_WEIGHT, BootstrapPlan
from hf_he.ckks.encoder import to_coefficients
from hf_he.ckks.parameters import CKKSParameters
from hf_he.ckks.random import Stream


@dataclass(frozen=True, eq=False)
class FheliumBootstrappingKeys:
    """Galois keys modulo the full chain, and those to and from the ephemeral secret."""

    galois: GaloisKeys = field(repr=False)
    raise_key: Any = field(repr=False)
    lower_key: Any = field(repr=False)

    @classmethod
    def collect(cls, parts: Iterator[KeyPart]) -> FheliumBootstrappingKeys:
        found = {part.name: part.key for part in parts}
        others = {name: found.pop(name) for name in (RELINEARIZATION, CONJUGATION, RAISE, LOWER)}
        rotations = {int(name): key for name, key in found.items()}
        return cls(GaloisKeys(others[RELINEARIZATION], rotations, others[CONJUGATION]), others[RAISE], others[LOWER])

    def parts(self) -> Iterator[KeyPart]:
        yield KeyPart(RELINEARIZATION, self.galois.relinearization)
        yield KeyPart(CONJUGATION, self.galois.conjugation)
        yield KeyPart(RAISE, self.raise_key)
        yield KeyPart(LOWER, self.lower_key)
        yield from (KeyPart(str(step), key) for step, key in self.galois.rotations.items())


class KeyPart(NamedTuple):
    """A key and its name: one of the four below, or a rotation step."""

    name: str
    key: Any


RELINEARIZATION, CONJUGATION, RAISE, LOWER = "relinearization", "conjugation", "raise", "lower"


class FheliumEvaluator:
    """What the pipeline asks of hf_he.ckks.evaluator.Evaluator, on an FHElium engine of its own."""

    def __init__(self, parameters: CKKSParameters, resident: KeyResidency) -> None:
        self.parameters = parameters
        self.resident = resident
        self.device = resident.device
        self.engine = make_engine(parameters)
        self._moduli = torch.tensor(parameters.moduli, dtype=torch.int64, device=self.device)
        self._chain = torch.tensor((*reversed(parameters.moduli), *parameters.special_moduli), dtype=torch.int64, device=self.device)
        self._one = self._prepared(np.ones(1), parameters.max_level).flip(0)[:, 0].tolist()

    # ---- FHElium's values: component first, highest limb first ----
    def _value(self, a: torch.Tensor, coefficients: bool = False) -> Any:
        from fhelium import Ciphertext

        data = a.movedim(-3, 0).flip(-2).contiguous()
        top = self.parameters.max_level
        depth = top + 1 - a.shape[-2]
        domain, residues = ("coefficient", "standard") if coefficients else ("ntt", "montgomery")
        return Ciphertext(data, depth, 1.0, tuple(range(depth, top + 1)), domain, "Q", residues)

    def _coefficients(self, a: torch.Tensor) -> Any:
        return self.engine.ntt_domain_to_coefficient_domain(self._value(a))

    @staticmethod
    def _payload(value: Any) -> torch.Tensor:
        return value.data.movedim(0, -3).flip(-2)

    def _reduced(self, a: torch.Tensor) -> torch.Tensor:
        return a.remainder_(self._moduli[: a.shape[-2], None])

    # ---- plaintexts ----
    def _prepared(self, coefficients: np.ndarray, level: int, basis: str = "Q") -> torch.Tensor:
        """[*batch, d] integers, the coefficients of polynomials in X^(N/d), to [*batch, limbs, N] in NTT domain and Montgomery form, in FHElium's order
        of limbs."""
        from fhelium.values import Plaintext

        compact = torch.from_numpy(np.rint(coefficients).astype(np.int64)).to(self.device)
        full = compact.new_zeros(*compact.shape[:-1], self.parameters.ring_degree)
        full[..., :: full.shape[-1] // compact.shape[-1]] = compact
        plain = Plaintext._from_fields(
            message=None,
            depth=self.parameters.max_level - level,
            scale=1.0,
            data=full,
            representation="integer_coefficients",
            polynomial_domain="coefficient",
            modulus_basis=None,
            residue_representation=None,
            prime_ids=(),
        )
        return prepared(self.engine, plain, self._chain if basis == "QP" else self._chain[: len(self._moduli)], basis).data

    def encode_coefficients(self, coefficients: np.ndarray, level: int) -> torch.Tensor:
        """[B, d] integer coefficients of polynomials in X^(N/d) to [B, level + 1, N]."""
        return self._prepared(coefficients, level).flip(-2)

    def encode(self, values: np.ndarray, level: int, scale: float) -> torch.Tensor:
        """[period] values to [level + 1, N]."""
        return self.encode_coefficients(to_coefficients(values[None], scale), level)[0]

    @staticmethod
    def keeps(period: int) -> bool:
        return False

    # ---- arithmetic ----
    def stack(self, items: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(items))

    def add(self, a: torch.Tensor, b: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
        components = max(a.shape[-3], b.shape[-3])
        a, b = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, components - x.shape[-3])) for x in (a, b))
        return self._reduced(a + b if sign > 0 else a - b)

    def add_integer(self, a: torch.Tensor, value: int) -> torch.Tensor:
        moduli = self.parameters.moduli[: a.shape[-2]]
        constants = [value * one % q for one, q in zip(self._one, moduli, strict=False)]
        out = a.clone()
        out[..., 0, :, :] += torch.tensor(constants, dtype=torch.int64, device=self.device)[:, None]
        return self._reduced(out)

    def multiply_integer(self, a: torch.Tensor, value: int) -> torch.Tensor:
        """By one factor modulo each prime, as a constant polynomial."""
        moduli = self.parameters.moduli[: a.shape[-2]]
        constants = torch.tensor([value * one % q for one, q in zip(self._one, moduli, strict=False)], dtype=torch.int64, device=self.device)
        return self.multiply_plain(a, constants[:, None].expand(-1, a.shape[-1]))

    def weighted_sum(self, items: Sequence[torch.Tensor], weights: Sequence[int], constant: int) -> torch.Tensor:
        total = None
        for item, weight in zip(items, weights, strict=True):
            term = self.multiply_integer(item, weight)
            total = term if total is None else self._reduced(total + term)
        return self.add_integer(total, constant)

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self._payload(self.engine.multiply(self._value(a), self._value(b)))

    def multiply_plain(self, a: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """a times one plaintext [limbs, N]."""
        return self._payload(self.engine.multiply_plaintext(self._value(a), self._plaintext(plain)))

    def multiply_plain_sum(self, plain: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """sum_k plain[0, k] * a[k]: plain [1, K, limbs, N], a [K, 2, limbs, N] -> [1, 2, limbs, N]."""
        values = [self._value(term) for term in a]
        return self._payload(self.engine.sum_plaintext_products(values, [self._plaintext(row) for row in plain[0]]))[None]

    def _plaintext(self, rows: torch.Tensor) -> Any:
        from fhelium.values import Plaintext

        top = self.parameters.max_level
        depth = top + 1 - len(rows)
        return Plaintext._from_fields(
            message=None,
            depth=depth,
            scale=1.0,
            data=rows.flip(0).contiguous(),
            representation="rns",
            polynomial_domain="ntt",
            modulus_basis="Q",
            residue_representation="montgomery",
            prime_ids=tuple(range(depth, top + 1)),
        )

    def rescale(self, a: torch.Tensor) -> torch.Tensor:
        return self._payload(self.engine.rescale_to_next_depth(self._value(a)))

    def raise_modulus(self, a: torch.Tensor, limbs: int) -> torch.Tensor:
        """[2, 1, N] modulo q_0 to [2, limbs, N]: the same centred coefficients."""
        first = self.parameters.moduli[0]
        centred = self._coefficients(a).data[:, 0].remainder(first)
        centred = torch.where(centred > first // 2, centred - first, centred)
        raised = centred[:, None].expand(-1, limbs, -1).remainder(self._moduli[:limbs, None])
        return self._payload(self.engine.coefficient_domain_to_ntt_domain(self._value(raised, coefficients=True)))

    # ---- key switching ----
    def relinearize(self, a: torch.Tensor, keys: GaloisKeys) -> torch.Tensor:
        return self._payload(self.engine.relinearize(self._value(a), self.resident(keys.relinearization), output_domain="ntt"))

    def relinearize_rescale(self, a: torch.Tensor, keys: GaloisKeys) -> torch.Tensor:
        return self.rescale(self.relinearize(a, keys))

    def switch_key(self, a: torch.Tensor, key: Any) -> torch.Tensor:
        return self._payload(self.engine.switch_key(self._coefficients(a), self.resident(key), output_domain="ntt"))

    def conjugate(self, a: torch.Tensor, keys: GaloisKeys) -> torch.Tensor:
        return self._payload(self.engine.conjugate(self._coefficients(a), self.resident(keys.conjugation), output_domain="ntt"))

    def rotate(self, a: torch.Tensor, keys: GaloisKeys, steps: Sequence[int]) -> torch.Tensor:
        """[len(steps), *batch, 2, limbs, N], hoisted."""
        slots = self.parameters.slots
        steps = [step % slots for step in steps]
        moving = [self.resident(keys.rotations[step]) for step in steps if step]
        turned = iter(self.engine.rotate_many_with_keys(self._coefficients(a), moving, output_domain="ntt") if moving else ())
        return torch.stack([self._payload(next(turned)) if step else a for step in steps])

    # ---- keys ----
    def secret_key(self, coefficients: np.ndarray) -> Any:
        """[N] ternary coefficients as a secret key of this engine."""
        from fhelium import SecretKey

        data = self._prepared(coefficients, self.parameters.max_level, "QP")
        return SecretKey(data, tuple(range(len(data))))


def secret_coefficients(parameters: CKKSParameters, engine: Any, secret: Any) -> np.ndarray:
    """[N] the ternary coefficients of a secret key of `make_engine(parameters)`."""
    from fhelium import Ciphertext

    limbs, first = len(parameters.moduli), parameters.moduli[0]
    value = Ciphertext(secret.data[:limbs].expand(2, 1, -1, -1).contiguous(), 0, 1.0, tuple(range(limbs)), "ntt", "Q", "montgomery")
    lowest = engine.ntt_domain_to_coefficient_domain(value).data[0, 0, -1].remainder(first)
    return torch.where(lowest > first // 2, lowest - first, lowest).cpu().numpy()


class FheliumBootstrapping:
    """The engines of one parameter set's bootstrapping: the full chain, and that of the ephemeral secret."""

    def __init__(self, parameters: CKKSParameters, resident: KeyResidency) -> None:
        self.plan = BootstrapPlan(parameters)
        self.full = FheliumEvaluator(self.plan.full, resident)
        self.small = FheliumEvaluator(ephemeral_parameters(self.plan), resident)

    def key_parts(self, coefficients: np.ndarray, progress: Callable[[int, int], None] | None = None) -> Iterator[KeyPart]:
        """Fresh keys for the secret with these coefficients, one at a time, in host memory; draws the ephemeral secret and drops it."""
        slots, full, small = self.plan.parameters.slots, self.full, self.small
        sparse = sparse_ternary(self.plan.parameters.ring_degree, EPHEMERAL_WEIGHT, Stream())
        main = full.secret_key(coefficients)
        steps = list(rotation_limbs(self.plan))
        makers: list[tuple[str, Callable[[], Any]]] = [
            (RELINEARIZATION, lambda: full.engine.create_relinearization_key(main)),
            (CONJUGATION, lambda: full.engine.create_conjugation_key(main)),
            (RAISE, lambda: full.engine.create_key_switch_key(full.secret_key(sparse), main)),
            (LOWER, lambda: small.engine.create_key_switch_key(small.secret_key(coefficients), small.secret_key(sparse))),
            *((str(step), lambda step=step: full.engine.create_rotation_key(-step % slots, main)) for step in steps),
        ]
        for done, (name, make) in enumerate(makers, start=1):
            yield KeyPart(name, make().to(HOST))
            if progress is not None:
                progress(done, len(makers))
