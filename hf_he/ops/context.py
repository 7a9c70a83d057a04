"""What every encrypted operation works with: backend, packing, refresh policy, encoded weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_he.backends.base import Ciphertext, HEBackend, Plaintext
from hf_he.errors import LevelError
from hf_he.ops.placement import Levels
from hf_he.packing import Packing
from hf_he.refresh import RefreshPolicy

if TYPE_CHECKING:
    from hf_he.sharding import Shards


class OperationContext:
    """One backend, one packing, one refresh policy. Weights are encoded once per (weight, level, scale) and kept in periodic form."""

    def __init__(self, backend: HEBackend, packing: Packing, refresh: RefreshPolicy | None = None) -> None:
        self.backend = backend
        self.packing = packing
        self.refresh = refresh
        self.shards: Shards | None = None
        self.replicated = self.uniform = False
        self._levels: dict[int, Levels] = {}
        self._plaintexts: dict[Hashable, tuple[tuple[torch.Tensor, ...], list[bytes], Plaintext]] = {}
        self._derived: dict[Hashable, tuple[torch.Tensor, bytes, torch.Tensor]] = {}

    @property
    def top(self) -> int:
        return self.backend.parameters.max_level

    @property
    def tokens(self) -> int:
        """Tokens that a state shows: those of the packing, or one."""
        return 1 if self.replicated else self.packing.tokens

    @contextmanager
    def single_token(self, uniform: bool = False) -> Iterator[None]:
        """Inside, states hold one token per sequence, the same in every token lane; compute them before the block ends. `uniform`: all sequences
        are the same too, which hf_he.ops.uniform makes use of."""
        self.replicated, self.uniform = True, uniform
        try:
            yield
        finally:
            self.replicated = self.uniform = False

    def place(self, model: torch.nn.Module, levels: Mapping[str, Levels]) -> None:
        """Run the named submodules of `model` at these levels; what is not named runs at its defaults."""
        self._levels = {id(model.get_submodule(name)): at for name, at in levels.items()}

    def levels(self, module: torch.nn.Module) -> Levels | None:
        """The planned levels of a submodule, if any."""
        return self._levels.get(id(module))

    def ensure_level(self, ct: Ciphertext, depth: int, iterations: int = 1) -> Ciphertext:
        """`ct`, refreshed when fewer than `depth` levels are left, by bootstraps of so many iterations. Raises LevelError when no refresh can give
        that many."""
        if ct.level >= depth:
            return ct
        if depth > self.top:
            raise LevelError(
                f"the next operations need {depth} levels in one go, these parameters have {self.top}: use a parameter set with "
                "as many (hf-he env lists them), or fewer squarings and smaller degrees in the model's approximations"
            )
        if self.refresh is None:
            raise LevelError(f"{depth} levels are needed and {ct.level} are left: give the session a refresh policy")
        with self.backend.log.measure("refresh"):
            return self.refresh.refresh(self.backend, ct, depth, iterations)

    def ensure_levels(self, wanted: Sequence[tuple[Ciphertext, int]], iterations: int = 1) -> list[Ciphertext]:
        """Each (ciphertext, depth) with at least that many levels; those that fall short are refreshed in one batch, as by `ensure_level`, whose errors it
        raises."""
        found = [ct for ct, _ in wanted]
        low = [i for i, (ct, depth) in enumerate(wanted) if ct.level < depth]
        if len(low) < 2:
            return [self.ensure_level(ct, depth, iterations) for ct, depth in wanted]
        backend, level = self.backend, min(found[i].level for i in low)
        flat = [backend.reshape(backend.match_level(found[i], level), (found[i].count,)) for i in low]
        together = backend.stack([backend.take(ct, position) for ct in flat for position in range(ct.count)])
        fresh, end = self.ensure_level(together, max(wanted[i][1] for i in low), iterations), 0
        for i in low:
            end += found[i].count
            found[i] = backend.reshape(backend.take(fresh, slice(end - found[i].count, end)), found[i].batch_shape)
        return found

    def sharded(self, parts: int, compute: Callable[[range], Ciphertext]) -> Ciphertext:
        """compute(range(parts)) [parts, ...]; with `shards`, each rank computes its share of the parts only. It must not refresh
        batches in turns."""
        return compute(range(parts)) if self.shards is None else self.shards.concatenate(parts, compute)

    def canonical_factor(self, level: int, scale: float) -> float:
        """The scale a factor needs so that its product with an operand of `scale` at `level` is canonical after one rescale."""
        parameters = self.backend.parameters
        return parameters.scale_at(level - 1) * parameters.moduli[level] / scale

    def encoded(self, owners: tuple[torch.Tensor, ...], tag: Hashable, level: int, scale: float, build: Callable[[], np.ndarray]) -> Plaintext:
        """The plaintext `build()` at (level, scale), encoded once. `owners` are the tensors it is made of; where their contents have changed, by `.data`
        too, as PEFT merges adapters, the new plaintext takes the place of the old one."""
        key, contents = (tuple(map(id, owners)), tag, level, scale), [_digest(owner) for owner in owners]
        kept = self._plaintexts.get(key)
        if kept is None or kept[1] != contents:
            kept = self._plaintexts[key] = (owners, contents, self.backend.encode(build(), level, scale))
        return kept[2]

    def constant(self, tag: Hashable, level: int, scale: float, build: Callable[[], np.ndarray]) -> Plaintext:
        """A plaintext that depends on the packing only."""
        return self.encoded((), tag, level, scale, build)

    def derived(self, owner: torch.Tensor, tag: Hashable, build: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """build(owner), made once: what is encoded from it is then encoded once too. An `owner` whose contents have changed gives a new tensor."""
        key, contents = (id(owner), tag), _digest(owner)
        kept = self._derived.get(key)
        if kept is None or kept[1] != contents:
            if kept is not None:
                self._plaintexts = {k: entry for k, entry in self._plaintexts.items() if id(kept[2]) not in k[0]}
            kept = self._derived[key] = (owner, contents, build(owner))
        return kept[2]

    def multiply_constant(self, ct: Ciphertext, tag: Hashable, build: Callable[[], np.ndarray], level: int | None = None) -> Ciphertext:
        """`ct` times a constant vector, rescaled to the canonical scale: one level. With `level`, at that lower level."""
        backend = self.backend
        ct = ct if level is None else backend.drop_level(ct, level)
        plain = self.constant(tag, ct.level, self.canonical_factor(ct.level, ct.scale), build)
        return backend.rescale(backend.multiply_plain(ct, plain))

    def square(self, ct: Ciphertext) -> Ciphertext:
        return self.product(ct, ct)

    def product(self, a: Ciphertext, b: Ciphertext) -> Ciphertext:
        """a * b, relinearised and rescaled: one level."""
        backend = self.backend
        return backend.relinearize_rescale(backend.multiply(a, b))


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.blake2b(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), digest_size=16).digest()
