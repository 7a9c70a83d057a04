"""The FHElium backend: CKKS residues as int64 torch tensors on a CPU or a CUDA device.

FHElium (MIT) is by the author of tiberate, the maintained fork of Liberate.FHE. Its values are batched, its scales explicit and its moduli ours, so
levels, scales and results agree with every other backend. It counts depth from the top: depth d is level max_level - d. Payloads
stay in NTT domain and Montgomery form; automorphisms pass through coefficients, which is where FHElium switches keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_he.backends import fhelium_files as files
from hf_he.backends.base import Ciphertext, EvaluationKeys, HEBackend, Plaintext
from hf_he.backends.fhelium_bootstrap import FheliumBootstrapping, FheliumBootstrappingKeys, KeyPart, secret_coefficients
from hf_he.backends.fhelium_card import typed_card_errors
from hf_he.backends.fhelium_engine import choose_device, make_engine, prepared
from hf_he.backends.fhelium_keys import HOST, FheliumKeys, FheliumPublicKey, FheliumSecretKey, KeyResidency
from hf_he.backends.fhelium_matrix import residue_products
from hf_he.ckks.bootstrapping.bootstrapper import Bootstrapper
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import ParameterError, SecretKeyOnServerError
from hf_he.secret_key import new_key_id

SUPPORTED_VERSION = "0.30"


@typed_card_errors
class FheliumBackend(HEBackend):
    """HEBackend on FHElium 0.30; `device` is "cpu" or a CUDA device (default: CUDA where torch finds one).

    Payloads are int64 tensors [components, *batch, limbs, N]. Raises BackendUnavailableError for a device that torch does not have, and every method
    DeviceMemoryError where the card is too small.
    """

    name = "fhelium"
    devices = ("cpu", "cuda")
    bootstraps = True
    default_refresh = "client"
    demo_sentences = 2
    evaluation_key_type = FheliumKeys

    def __init__(self, parameters: CKKSParameters, device: str | None = None) -> None:
        super().__init__(parameters)
        self.device = choose_device(device)
        chain = tuple(reversed(parameters.moduli))
        self._moduli = torch.tensor(chain, dtype=torch.int64, device=self.device)
        self._engine = make_engine(parameters)
        self._resident = KeyResidency(self.device)

    @classmethod
    def availability(cls) -> tuple[bool, str]:
        if find_spec("fhelium") is None:
            wanted = "Python 3.12 or newer and " if sys.version_info < (3, 12) else ""
            return False, f"FHElium is not installed: it needs {wanted}a C++ compiler, `make install-fhelium` builds an environment with it"
        try:
            found = version("fhelium")
        except PackageNotFoundError:
            return False, "the module fhelium belongs to no installed package: install fhelium 0.30"
        if not found.startswith(f"{SUPPORTED_VERSION}."):
            return False, f"FHElium {found} is installed, this adapter is written for {SUPPORTED_VERSION}: pip install 'fhelium=={SUPPORTED_VERSION}.*'"
        return True, f"FHElium {found}"

    @classmethod
    def placed_on(cls, device: str | None) -> str:
        return choose_device(device).type if cls.availability()[0] else super().placed_on(device)

    # ---- keys ----
    def generate_secret_key(self) -> FheliumSecretKey:
        secret = self._engine.create_secret_key(device=self.device)
        return FheliumSecretKey(new_key_id(), self.parameters.fingerprint, secret, self._engine.create_public_key(secret, device=self.device))

    def generate_public_key(self, secret_key: FheliumSecretKey) -> FheliumPublicKey:
        self._check_fingerprint(secret_key)
        public = self._engine.create_public_key(secret_key.secret, device=self.device)
        return FheliumPublicKey(secret_key.key_id, secret_key.fingerprint, public)

    def generate_evaluation_keys(
        self,
        secret_key: FheliumSecretKey,
        rotations: Iterable[int],
        *,
        conjugation: bool = False,
        bootstrapping: bool = False,
        bootstrapping_slots: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationKeys:
        self._check_fingerprint(secret_key)
        extra = None
        if bootstrapping:
            self._check_bootstraps_all_slots(bootstrapping_slots)
            extra = FheliumBootstrappingKeys.collect(self._bootstrapping_parts(secret_key, progress))
        steps = sorted({self._rotation_step(s) for s in rotations} - {0})
        secret, engine, keys = secret_key.secret, self._engine, {}
        for done, step in enumerate(steps, start=1):
            keys[step] = engine.create_rotation_key(self._shift(step), secret, device=self.device).to(HOST)
            if progress is not None:
                progress(done, len(steps))
        relinearization = engine.create_relinearization_key(secret, device=self.device).to(HOST)
        conjugating = engine.create_conjugation_key(secret, device=self.device).to(HOST) if conjugation else None
        payload = FheliumKeys(relinearization, keys, conjugating, fingerprint=self.parameters.fingerprint)
        return EvaluationKeys(payload, secret_key.key_id, frozenset(steps), conjugation, extra)

    def _bootstrapping_parts(self, secret_key: FheliumSecretKey, progress: Callable[[int, int], None] | None) -> Iterator[KeyPart]:
        return self._bootstrapping.key_parts(secret_coefficients(self.parameters, self._engine, secret_key.secret), progress)

    def _shift(self, step: int) -> int:
        """FHElium's step: it rotates to the right."""
        return -step % self.parameters.slots

    # ---- bytes ----
    def serialize(self, item: Any, *, allow_secret: bool = False) -> bytes:
        if isinstance(item, Ciphertext):
            return files.write_ciphertext(self.parameters, item)
        if isinstance(item, EvaluationKeys):
            return files.write_evaluation_keys(self.parameters, item)
        if isinstance(item, FheliumPublicKey):
            return files.write_public_key(self.parameters, item)
        if isinstance(item, FheliumSecretKey):
            if not allow_secret:
                raise SecretKeyOnServerError("serialising a secret key needs allow_secret=True: do it on the client only, into a file only its owner reads")
            return files.write_secret_key(self.parameters, item)
        raise ParameterError(f"the fhelium backend cannot serialise a {type(item).__name__}")

    def deserialize(self, data: bytes, kind: str) -> Any:
        if kind not in files.READERS:
            raise ParameterError(f"unknown kind {kind!r}: one of {', '.join(files.READERS)}")
        return files.READERS[kind](self.parameters, self.device, data)

    def save_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> int:
        return files.write_bootstrapping_keys(self._bootstrapping, keys.bootstrapping.parts(), keys.key_id, Path(folder))

    def write_bootstrapping_keys(self, secret_key: FheliumSecretKey, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> int:
        self._check_fingerprint(secret_key)
        return files.write_bootstrapping_keys(self._bootstrapping, self._bootstrapping_parts(secret_key, progress), secret_key.key_id, Path(folder))

    def load_bootstrapping_keys(self, keys: EvaluationKeys, folder: str | Path) -> EvaluationKeys:
        parts = files.read_bootstrapping_keys(self._bootstrapping, keys.key_id, Path(folder))
        return replace(keys, bootstrapping=FheliumBootstrappingKeys.collect(parts))

    # ---- values of FHElium and back ----
    def _depth(self, level: int) -> int:
        return self.parameters.max_level - level

    def _wrap(self, data: torch.Tensor, level: int, scale: float, coefficients: bool = False) -> Any:
        """[components, *batch, limbs, N] as a ciphertext with one batch axis."""
        from fhelium import Ciphertext as Value

        data = data.reshape(data.shape[0], -1, *data.shape[-2:]).contiguous()
        depth = self._depth(level)
        primes = tuple(range(depth, self.parameters.max_level + 1))
        domain, residues = ("coefficient", "standard") if coefficients else ("ntt", "montgomery")
        return Value(data, depth, scale, primes, domain, "Q", residues)

    def _value(self, ct: Ciphertext) -> Any:
        return self._wrap(ct.payload, ct.level, ct.scale)

    def _coefficients(self, ct: Ciphertext) -> Any:
        return self._engine.ntt_domain_to_coefficient_domain(self._value(ct))

    @staticmethod
    def _like(data: torch.Tensor, batch_shape: tuple[int, ...]) -> torch.Tensor:
        return data.reshape(data.shape[0], *batch_shape, *data.shape[-2:])

    # ---- encoding and encryption ----
    def _encode(self, values: np.ndarray, level: int, scale: float) -> list[Any]:
        """One operand per vector: compressed for a period below the slots."""
        flat = torch.from_numpy(values.reshape(-1, values.shape[-1])).to(self.device)
        depth, engine = self._depth(level), self._engine
        if flat.shape[-1] == self.parameters.slots:
            return [engine.encode(row, depth=depth, scale=scale, device=self.device) for row in flat]
        if flat.shape[-1] == 1:
            flat = flat.repeat(1, 2)
        compressed = engine.prepare_compressed_plaintext(flat, depth=depth, scale=scale, device=self.device)
        return list(compressed.unbind_batch())

    def _operand(self, operand: Any) -> Any:
        """An encoded vector, ready for sums and products; a compressed one already is."""
        return operand if _compressed(operand) else prepared(self._engine, operand, self._moduli)

    def _encrypt(self, values: np.ndarray, key: Any, level: int, scale: float) -> torch.Tensor:
        if not values.size:
            return torch.zeros(2, *values.shape[:-1], level + 1, self.parameters.ring_degree, dtype=torch.int64, device=self.device)
        flat = torch.from_numpy(values.reshape(-1, values.shape[-1])).to(self.device)
        plain = self._engine.encode(flat, depth=self._depth(level), scale=scale, device=self.device)
        public = key.public if isinstance(key, FheliumSecretKey) else key.key
        value = self._engine.encrypt(plain, public, device=self.device, output_domain="ntt")
        return self._like(value.data, values.shape[:-1])

    def _decrypt(self, ct: Ciphertext, secret_key: FheliumSecretKey) -> np.ndarray:
        value = self._coefficients(ct)
        values = self._engine.decode(self._engine.decrypt(value, secret_key.secret), is_real=True)
        return values.cpu().numpy().astype(np.float64).reshape(*ct.batch_shape, self.parameters.slots)

    # ---- linear: residues are below 2^50, sums of two stay in int64 ----
    def _reduced(self, data: torch.Tensor) -> torch.Tensor:
        return data.remainder_(self._moduli[-data.shape[-2] :, None])

    def _pair(self, a: Ciphertext, b: Ciphertext) -> tuple[torch.Tensor, torch.Tensor]:
        """Both payloads over the common batch shape, with as many components as the longer one."""
        rank = max(len(a.batch_shape), len(b.batch_shape))
        padded = []
        for ct in (a, b):
            data = ct.payload.reshape(ct.components, *(1,) * (rank - len(ct.batch_shape)), *ct.payload.shape[1:])
            missing = max(a.components, b.components) - ct.components
            padded.append(torch.cat([data, data.new_zeros(missing, *data.shape[1:])]) if missing else data)
        return torch.broadcast_tensors(*padded)

    def _add(self, a: Ciphertext, b: Ciphertext) -> torch.Tensor:
        x, y = self._pair(a, b)
        return self._reduced(x + y)

    def _subtract(self, a: Ciphertext, b: Ciphertext) -> torch.Tensor:
        x, y = self._pair(a, b)
        return self._reduced(x - y)

    def _negate(self, a: Ciphertext) -> torch.Tensor:
        return self._reduced(-a.payload)

    def _sum(self, a: Ciphertext) -> torch.Tensor:
        return self._reduced(a.payload.sum(1))

    def _add_plain(self, a: Ciphertext, b: Plaintext) -> torch.Tensor:
        return self._with_plain(a, b, lambda value, operand: self._engine.add_plaintext(value, self._operand(operand)))

    def _add_scalar(self, a: Ciphertext, value: float) -> torch.Tensor:
        """The integer round(value * scale) modulo each prime, in Montgomery form: products have scales beyond int64."""
        integer = round(value * a.scale)
        chain = zip(reversed(self._one[: a.level + 1]), reversed(self.parameters.moduli[: a.level + 1]), strict=True)
        constant = torch.tensor([integer * one % q for one, q in chain], dtype=torch.int64, device=self.device)
        result = a.payload.clone()
        result[0] = (result[0] + constant[:, None]).remainder_(self._moduli[-(a.level + 1) :, None])
        return result

    @cached_property
    def _one(self) -> list[int]:
        """The constant 1 in Montgomery form, by level."""
        ones = torch.ones(self.parameters.slots, dtype=torch.float64, device=self.device)
        plain = self._engine.encode(ones, depth=0, scale=1.0, device=self.device)
        return self._operand(plain).data[:, 0].flip(0).tolist()

    # ---- products ----
    def _multiply(self, a: Ciphertext, b: Ciphertext) -> torch.Tensor:
        x, y = self._pair(a, b)
        product = self._engine.multiply(self._wrap(x, a.level, a.scale), self._wrap(y, b.level, b.scale))
        return self._like(product.data, tuple(x.shape[1:-2]))

    def _multiply_plain(self, a: Ciphertext, b: Plaintext) -> torch.Tensor:
        return self._with_plain(a, b, lambda value, operand: self._engine.multiply_plaintext(value, self._operand(operand)))

    def _with_plain(self, a: Ciphertext, b: Plaintext, operation: Callable[[Any, Any], Any]) -> torch.Tensor:
        """One plaintext for the whole batch in one call, otherwise entry by entry of the broadcast shape."""
        shape = np.broadcast_shapes(a.batch_shape, b.batch_shape)
        if len(b.payload) == 1:
            padded = (*(1,) * (len(shape) - len(a.batch_shape)), *a.batch_shape)
            return self._like(operation(self._value(a), b.payload[0]).data, padded).expand(a.components, *shape, -1, -1)
        rows = a.payload.reshape(a.components, -1, *a.payload.shape[-2:])
        left = np.broadcast_to(np.arange(a.count).reshape(a.batch_shape), shape).ravel()
        right = np.broadcast_to(np.arange(len(b.payload)).reshape(b.batch_shape), shape).ravel()
        results = [operation(self._wrap(rows[:, i], a.level, a.scale), b.payload[j]).data for i, j in zip(left, right, strict=True)]
        return self._like(torch.cat(results, dim=1), shape)

    def _multiply_plain_sum(self, plain: Plaintext, a: Ciphertext) -> torch.Tensor:
        groups, terms = plain.batch_shape
        values = [self._wrap(a.payload[:, k], a.level, a.scale) for k in range(terms)]
        operands = [self._operand(operand) for operand in plain.payload]
        rows = []
        for g in range(groups):
            products = (self._engine.multiply_plaintext(value, operands[g * terms + k]).data for k, value in enumerate(values))
            rows.append(self._like(self._reduced(sum(products)), a.batch_shape[1:]))
        return torch.stack(rows, dim=1)

    def _multiply_integer(self, a: Ciphertext, value: int) -> torch.Tensor:
        return self._like(self._engine.multiply_integer_scalar(self._value(a), value).data, a.batch_shape)

    def _linear_combination(self, weights: np.ndarray, a: Ciphertext) -> torch.Tensor:
        moduli = self._moduli[-a.payload.shape[-2] :]
        return residue_products(weights, a.payload.transpose(0, 1), moduli).transpose(0, 1).contiguous()

    def _relinearize(self, a: Ciphertext) -> torch.Tensor:
        value = self._engine.relinearize(self._value(a), self._resident(self._keys.relinearization), output_domain="ntt")
        return self._like(value.data, a.batch_shape)

    def _rescale(self, a: Ciphertext) -> torch.Tensor:
        return self._like(self._engine.rescale_to_next_depth(self._value(a)).data, a.batch_shape)

    def _drop_level(self, a: Ciphertext, level: int) -> torch.Tensor:
        return a.payload[..., -(level + 1) :, :]

    # ---- automorphisms ----
    @property
    def _keys(self) -> FheliumKeys:
        return self.evaluation_keys.payload

    def _rotate(self, a: Ciphertext, steps: tuple[int, ...]) -> torch.Tensor:
        moving = [s for s in steps if s]
        rotated: list[Any] = []
        if moving:
            keys = [self._resident(self._keys.rotations[s]) for s in moving]
            rotated = self._engine.rotate_many_with_keys(self._coefficients(a), keys, output_domain="ntt")
        found = iter(rotated)
        return torch.stack([self._like(next(found).data, a.batch_shape) if s else a.payload for s in steps], dim=1)

    def _sum_rotated(self, a: Ciphertext, steps: tuple[int, ...]) -> torch.Tensor:
        total = None
        for g, step in enumerate(steps):
            part = self._take(a, g)
            if step:
                value = self._engine.ntt_domain_to_coefficient_domain(self._wrap(part, a.level, a.scale))
                value = self._engine.rotate_with_key(value, self._resident(self._keys.rotations[step]), output_domain="ntt")
                part = self._like(value.data, a.batch_shape[1:])
            total = part if total is None else self._reduced(total + part)
        return total

    def _conjugate(self, a: Ciphertext) -> torch.Tensor:
        value = self._engine.conjugate(self._coefficients(a), self._resident(self._keys.conjugation), output_domain="ntt")
        return self._like(value.data, a.batch_shape)

    @cached_property
    def _bootstrapping(self) -> FheliumBootstrapping:
        return FheliumBootstrapping(self.parameters, self._resident)

    @cached_property
    def _bootstrapper(self) -> Bootstrapper:
        return Bootstrapper(self._bootstrapping.plan, self._bootstrapping.full, self._bootstrapping.small)

    def _bootstrap(self, a: Ciphertext, divisor: int = 1) -> torch.Tensor:
        """By the native pipeline on this backend's primitives, which counts limbs from the lowest up and keeps components after the batch."""
        rows = a.payload.reshape(2, -1, *a.payload.shape[-2:]).transpose(0, 1).flip(-2)
        fresh = self._bootstrapper(rows, self.evaluation_keys.bootstrapping, divisor)
        return self._like(fresh.flip(-2).transpose(0, 1).contiguous(), a.batch_shape)

    # ---- batch structure: component axis first ----
    def _take(self, a: Ciphertext, index: int | slice) -> torch.Tensor:
        if isinstance(index, slice) and (index.step or 1) < 0:
            return a.payload[:, list(range(*index.indices(a.batch_shape[0])))]
        return a.payload[:, index]

    def _stack(self, items: Sequence[Ciphertext]) -> torch.Tensor:
        return torch.stack([item.payload for item in items], dim=1)

    def _reshape(self, a: Ciphertext, batch_shape: tuple[int, ...]) -> torch.Tensor:
        return a.payload.reshape(a.components, *batch_shape, *a.payload.shape[-2:])


def _compressed(operand: Any) -> bool:
    return hasattr(operand, "compression_layout")
