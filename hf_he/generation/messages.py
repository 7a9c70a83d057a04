"""What crosses the wire in encrypted generation.

    encrypted_prompt   embeddings of the prompts, their lengths in the clear          -> encrypted_result: logits, and a cache on the server
    encrypted_token    the embedding of one new token per sequence                     -> encrypted_result: logits
    generated_token    the server picks the token itself (`select="server"`)           -> encrypted_result: the choice as a one-hot vector
    cache_request      the cache of a generation, and whether the server forgets it    -> key_value_cache
    key_value_cache    to go on with, on a server that was restarted or on another one  -> key_value_cache, without its content

A generation is named by the batch id of its prompt, and every message says how many tokens came before, so nothing is applied twice.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_he.errors import CorruptFileError
from hf_he.protocol import Identity, as_array, as_bytes
from hf_he.serialization import pack, unpack

PROMPT_KIND, TOKEN_KIND, CHOICE_KIND = "encrypted_prompt", "encrypted_token", "generated_token"
CACHE_REQUEST_KIND, CACHE_KIND = "cache_request", "key_value_cache"
CACHE_FORMAT = "1"
SELECTIONS = CLIENT, SERVER = "client", "server"
MAX_TOKENS = 2**17
_ID = re.compile(r"[0-9a-f]{16}")
_AGAIN = "write it again with this version of hf_he"


@dataclass(frozen=True)
class EncryptedPrompt:
    """`embeddings`: one ciphertext tensor [hidden / c]; `lengths`: tokens of each packed sequence, whose later lanes hold other real tokens;
    `prompts`: how many of the sequences differ, the others being copies; `select`: who picks the tokens, "client" or "server"."""

    identity: Identity
    lengths: tuple[int, ...]
    prompts: int
    embeddings: bytes = field(repr=False)
    select: str = CLIENT
    generation: str = field(default_factory=lambda: secrets.token_hex(8))

    def to_bytes(self) -> bytes:
        metadata = {**self.identity.to_metadata(), "generation": self.generation, "lengths": json.dumps(self.lengths), "prompts": str(self.prompts)}
        metadata["select"] = self.select
        return pack(PROMPT_KIND, {"embeddings": as_array(self.embeddings)}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedPrompt:
        arrays, metadata = unpack(data, PROMPT_KIND)
        lengths = read_lengths(metadata)
        prompts = _prompts(metadata, lengths)
        if metadata.get("select") not in SELECTIONS:
            raise CorruptFileError(f"the prompt does not say who picks the tokens: {_AGAIN}")
        return cls(Identity.from_metadata(metadata), lengths, prompts, as_bytes(arrays, "embeddings"), metadata["select"], _generation(metadata))


@dataclass(frozen=True)
class EncryptedToken:
    """One new token per sequence, after `seen` tokens of the longest: `embeddings` [hidden / c], the same in every token lane. Without
    `embeddings` it is the token that the server chose itself."""

    identity: Identity
    generation: str
    seen: int
    embeddings: bytes | None = field(repr=False)

    def to_bytes(self) -> bytes:
        metadata = {**self.identity.to_metadata(), "generation": self.generation, "seen": str(self.seen)}
        if self.embeddings is None:
            return pack(CHOICE_KIND, {}, metadata)
        return pack(TOKEN_KIND, {"embeddings": as_array(self.embeddings)}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, kind: str = TOKEN_KIND) -> EncryptedToken:
        arrays, metadata = unpack(data, kind)
        embeddings = as_bytes(arrays, "embeddings") if kind == TOKEN_KIND else None
        return cls(Identity.from_metadata(metadata), _generation(metadata), _count(metadata, "seen"), embeddings)


@dataclass(frozen=True)
class CacheRequest:
    """Ask for the cache of `generation`; with `forget` the server drops it."""

    identity: Identity
    generation: str
    forget: bool = False

    def to_bytes(self) -> bytes:
        return pack(CACHE_REQUEST_KIND, {}, {**self.identity.to_metadata(), "generation": self.generation, "forget": str(int(self.forget))})

    @classmethod
    def from_bytes(cls, data: bytes) -> CacheRequest:
        _, metadata = unpack(data, CACHE_REQUEST_KIND)
        if metadata.get("forget") not in ("0", "1"):
            raise CorruptFileError(f"the cache request does not say whether to forget it: {_AGAIN}")
        return cls(Identity.from_metadata(metadata), _generation(metadata), metadata["forget"] == "1")


@dataclass(frozen=True)
class StoredCache:
    """A serialised cache: per layer one ciphertext tensor [chunks] of keys and one of values; no layers where a server only confirms. `choice`: the
    token that the server picked last, if it does.

    The format version is part of the file; `lengths` are the tokens it holds of each sequence, `tokens` the lanes of a chunk.
    """

    identity: Identity
    generation: str
    lengths: tuple[int, ...]
    prompts: int
    tokens: int
    layers: Sequence[tuple[bytes, bytes]] = field(repr=False)
    choice: bytes | None = field(default=None, repr=False)

    def to_bytes(self) -> bytes:
        arrays = {}
        for index, (keys, values) in enumerate(self.layers):
            arrays |= {f"layers.{index}.keys": as_array(keys), f"layers.{index}.values": as_array(values)}
        if self.choice is not None:
            arrays["choice"] = as_array(self.choice)
        metadata = {"cache_format": CACHE_FORMAT, "generation": self.generation, "lengths": json.dumps(self.lengths), "tokens": str(self.tokens)}
        metadata["prompts"] = str(self.prompts)
        return pack(CACHE_KIND, arrays, {**self.identity.to_metadata(), **metadata})

    @classmethod
    def from_bytes(cls, data: bytes) -> StoredCache:
        arrays, metadata = unpack(data, CACHE_KIND)
        if metadata.get("cache_format") != CACHE_FORMAT:
            raise CorruptFileError(f"this cache has another format than {CACHE_FORMAT}, the one this hf_he reads: begin the generation again")
        names = [(f"layers.{index}.keys", f"layers.{index}.values") for index in range(len(arrays) // 2)]
        if set(arrays) - {"choice"} != {name for pair in names for name in pair}:
            raise CorruptFileError(f"the cache misses the keys or values of a layer: {_AGAIN}")
        layers = [(as_bytes(arrays, keys), as_bytes(arrays, values)) for keys, values in names]
        lengths = read_lengths(metadata)
        choice = as_bytes(arrays, "choice") if "choice" in arrays else None
        prompts, tokens = _prompts(metadata, lengths), _count(metadata, "tokens")
        return cls(Identity.from_metadata(metadata), _generation(metadata), lengths, prompts, tokens, layers, choice)


def read_lengths(metadata: dict[str, str]) -> tuple[int, ...]:
    """Lengths of the sequences out of metadata: positive, at most MAX_TOKENS. Raises CorruptFileError for anything else."""
    try:
        lengths: Any = json.loads(metadata["lengths"])
        if not isinstance(lengths, list) or not lengths or not all(type(n) is int and 1 <= n <= MAX_TOKENS for n in lengths):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise CorruptFileError(f"the message does not say how long its sequences are: {_AGAIN}") from None
    return tuple(lengths)


def _prompts(metadata: dict[str, str], lengths: tuple[int, ...]) -> int:
    count = _count(metadata, "prompts")
    if count > len(lengths) or any(length != lengths[index % count] for index, length in enumerate(lengths)):
        raise CorruptFileError(f"the message names {count} prompts for sequences that are no copies of them: {_AGAIN}")
    return count


def _count(metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MAX_TOKENS):
        raise CorruptFileError(f"the message's {name} is not a number from 1 to {MAX_TOKENS}: {_AGAIN}")
    return int(text)


def _generation(metadata: dict[str, str]) -> str:
    if not _ID.fullmatch(metadata.get("generation", "")):
        raise CorruptFileError(f"the message does not name its generation: {_AGAIN}")
    return metadata["generation"]


def as_lengths(lengths: np.ndarray) -> tuple[int, ...]:
    return tuple(int(n) for n in lengths)
