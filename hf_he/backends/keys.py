"""What the key types of backends over a library share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class LibraryPublicKey:
    """The encryption key of a library behind a backend; each backend has a subclass, by which it knows its own."""

    key_id: str
    fingerprint: str
    key: Any = field(repr=False)


@dataclass(frozen=True, eq=False)
class GaloisKeys:
    """A library's keys for relinearisation, rotations by the contract's steps, and conjugation."""

    relinearization: Any = field(repr=False)
    rotations: dict[int, Any] = field(repr=False)
    conjugation: Any = field(repr=False, default=None)


@dataclass(frozen=True, eq=False, kw_only=True)
class LibraryKeys(GaloisKeys):
    """Galois keys of one parameter set, the payload of evaluation keys; each backend has a subclass."""

    fingerprint: str
