"""How an exhausted ciphertext gets its levels back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

from hf_he.backends.base import Ciphertext, HEBackend
from hf_he.errors import BackendUnavailableError, HEError, RefreshError
from hf_he.turns import Turns


class RefreshPolicy(Protocol):
    """Turns a ciphertext into one of the same values with at least `level` levels. `count` is how often it did.

    `lanes` batches run in `turns`, because refreshing them together costs less.
    Values that are refreshed over and over ask for more than one iteration where a refresh adds an error.
    """

    count: int
    lanes: int
    turns: Turns

    def refresh(self, backend: HEBackend, ct: Ciphertext, level: int, iterations: int = 1) -> Ciphertext: ...


LARGEST_REFRESH = 64
"""Ciphertexts of one message to the client."""


class ClientRefresh:
    """A round trip to the client, who decrypts and encrypts again.

    `callback` takes and returns serialised ciphertexts; the client sees intermediate values of its own data, the server sees nothing.
    Every refresh is one message each way; of more than LARGEST_REFRESH ciphertexts one per so many, which bounds the memory of both sides.
    """

    lanes = 1

    def __init__(self, callback: Callable[[bytes], bytes]) -> None:
        self.callback = callback
        self.turns = Turns()
        self.count = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    def refresh(self, backend: HEBackend, ct: Ciphertext, level: int, iterations: int = 1) -> Ciphertext:
        if ct.count <= LARGEST_REFRESH:
            return self._refresh(backend, ct, level)
        flat, rows = backend.reshape(ct, (ct.count,)), []
        for start in range(0, ct.count, LARGEST_REFRESH):
            part = self._refresh(backend, backend.take(flat, slice(start, start + LARGEST_REFRESH)), level)
            rows += [backend.take(part, i) for i in range(part.count)]
        return backend.reshape(backend.stack(rows), ct.batch_shape)

    def _refresh(self, backend: HEBackend, ct: Ciphertext, level: int) -> Ciphertext:
        data = backend.serialize(ct)
        answer = self.callback(data)
        self.count += 1
        self.bytes_sent += len(data)
        self.bytes_received += len(answer)
        try:
            fresh = backend.deserialize(answer, "ciphertext")
        except HEError as error:
            raise RefreshError(f"the client's answer to a refresh is not a ciphertext of these parameters: {error}") from error
        if fresh.key_id != ct.key_id:
            raise RefreshError(f"the client refreshed under key {fresh.key_id}, the ciphertext belongs to {ct.key_id}: use one key pair per run")
        if fresh.batch_shape != ct.batch_shape or fresh.components != 2:
            raise RefreshError(f"the client returned a batch of {fresh.batch_shape} for one of {ct.batch_shape}: client and server versions differ")
        canonical = backend.parameters.scale_at(fresh.level)
        if fresh.level < level or abs(fresh.scale / canonical - 1) > 1e-9:
            raise RefreshError(f"the client refreshed to level {fresh.level} at scale {fresh.scale:.6g}, level {level} at {canonical:.6g} was needed")
        return replace(fresh, scale=canonical)


class BootstrapRefresh:
    """Bootstrapping on the server, without the client: no round trips, a larger ring, an error of about 1e-4 per refresh.

    Ciphertexts of `lanes` batches that run in `turns` are bootstrapped together, since one bootstrap carries two real ciphertexts.
    Values may be larger than 1 as long as the polynomial's coefficients stay well below q_0 / scale (hidden states do: their features
    differ in sign). Raises BackendUnavailableError for a backend or parameters that cannot bootstrap.
    """

    lanes = 2

    def __init__(self, backend: HEBackend) -> None:
        if not backend.capabilities()["bootstrap"]:
            raise BackendUnavailableError(
                f"the {backend.name} backend does not bootstrap with these parameters: use the parameter set n16-bootstrap, or --refresh client"
            )
        self.turns = Turns(backend.log.suspended)
        self.count = 0

    def refresh(self, backend: HEBackend, ct: Ciphertext, level: int, iterations: int = 1) -> Ciphertext:
        self.count += 1
        if iterations > 1 and backend.iterates:
            return backend.bootstrap(ct, iterations)
        return self.turns.meet(backend.match_level(ct, 0), lambda cts: _bootstrap(backend, cts))


def _bootstrap(backend: HEBackend, cts: list[Ciphertext]) -> list[Ciphertext]:
    """All of them in one call, whatever their batch shapes."""
    flat = [backend.take(backend.reshape(ct, (ct.count,)), i) for ct in cts for i in range(ct.count)]
    fresh = backend.bootstrap(backend.stack(flat))
    ends = list(accumulate(ct.count for ct in cts))
    return [backend.reshape(backend.take(fresh, slice(end - ct.count, end)), ct.batch_shape) for ct, end in zip(cts, ends, strict=True)]
