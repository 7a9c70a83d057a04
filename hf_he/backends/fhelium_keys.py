"""Keys of the FHElium backend, and which of them are on the card."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from hf_he.backends.keys import LibraryKeys, LibraryPublicKey
from hf_he.secret_key import SecretKeyBase

HOST = torch.device("cpu")
CARD_SHARE = 0.5
"""Of a card's memory, for evaluation keys; the rest is for ciphertexts, encoded weights and what operations need meanwhile."""


class FheliumSecretKey(SecretKeyBase):
    """A secret polynomial, and the public key that encrypts for it."""

    def __init__(self, key_id: str, fingerprint: str, secret: Any, public: Any) -> None:
        super().__init__(key_id, fingerprint)
        self.secret = secret
        self.public = public


class FheliumPublicKey(LibraryPublicKey):
    """FHElium's, on the backend's device."""


class FheliumKeys(LibraryKeys):
    """FHElium's, in host memory."""


class KeyResidency:
    """Copies on `device` of keys in host memory, up to `budget` bytes: the ones used least recently make room for others.

    On the host every key is its own copy. Bootstrapping keys of N = 2^16 take 4.9 GB and the rotation keys of a model 46 MB each, so a small card
    need not hold all of them; a key larger than the budget is copied each time.
    """

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        self.device = device
        self.budget = card_budget(device) if budget is None else budget
        self.held_bytes = 0
        self._copies: OrderedDict[int, tuple[Any, Any]] = OrderedDict()

    def __call__(self, key: Any) -> Any:
        """The key on the device. Keys are told apart by identity; those with copies are kept alive."""
        if key.device == self.device:
            return key
        if id(key) in self._copies:
            self._copies.move_to_end(id(key))
            return self._copies[id(key)][1]
        copy = key.to(self.device)
        self._copies[id(key)] = key, copy
        self.held_bytes += copy.nbytes
        while self.held_bytes > self.budget:
            _, (_, evicted) = self._copies.popitem(last=False)
            self.held_bytes -= evicted.nbytes
        return copy


def card_budget(device: torch.device) -> int:
    """Bytes of keys that `device` is to hold; unbounded on the host, where nothing is copied."""
    if device.type != "cuda":
        return 2**63
    return int(CARD_SHARE * torch.cuda.mem_get_info(device)[1])
