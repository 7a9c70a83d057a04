"""What every secret key shares, and who refuses one. Below the engines and the backends, which both have key types of their own."""

from __future__ import annotations

import secrets

from hf_he.errors import SecretKeyOnServerError

KEY_ID_BYTES = 8


def new_key_id() -> str:
    """16 random hex characters from the operating system, shared by everything made from one secret key."""
    return secrets.token_hex(KEY_ID_BYTES)


class SecretKeyBase:
    """Marker of every secret key: shows only its id, and refuses pickling and copying.

    Writing one to a file takes `backend.serialize(key, allow_secret=True)`.
    """

    key_id: str
    fingerprint: str

    def __init__(self, key_id: str, fingerprint: str) -> None:
        self.key_id = key_id
        self.fingerprint = fingerprint

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key_id={self.key_id!r})"

    def __reduce_ex__(self, protocol):
        raise TypeError("a secret key cannot be pickled or copied: write it with backend.serialize(key, allow_secret=True) to a file only its owner reads")

    def __reduce__(self):
        return self.__reduce_ex__(2)


def refuse_secret_key(item: object, where: str) -> None:
    """Raise SecretKeyOnServerError when `item` is a secret key or has one as an attribute; `where` names what it was handed to."""
    if any(isinstance(held, SecretKeyBase) for held in (item, *getattr(item, "__dict__", {}).values())):
        raise SecretKeyOnServerError(f"{where} was handed a secret key: a server holds evaluation keys only, the secret key stays with the client")
