"""The encrypted key-value cache: a transformers `Cache` whose states are ciphertexts, at constant levels, and can be written to bytes.

    cache = EncryptedCache(session, model.config)
    cache.lengths[:] = prompt_lengths
    model(inputs_embeds=prompts, past_key_values=cache)                 # the prompts' keys and values are the cache
    with session.single_token():
        model(inputs_embeds=token, position_ids=cache.positions(), past_key_values=cache)
        cache.advance()

Token t of a sequence sits in token lane t of its keys and values (of chunk t // T when there are more tokens than lanes), all other lanes are 0.
Keys and values are stored at the lowest levels at which decoding works (hf_he.ops.decode); reading and appending costs none of them, so a cache is never
refreshed, and its noise grows by one fresh product per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from hf_he.backends.base import Ciphertext
from hf_he.errors import CorruptFileError, ModelMismatchError, ShapeError, UnsupportedEncryptedOperation
from hf_he.generation.messages import StoredCache, as_lengths
from hf_he.ops import decode
from hf_he.ops.decode import CACHE_LEVELS, CachedStates, at_level
from hf_he.ops.operand import Operand
from hf_he.protocol import Identity
from hf_he.tensor import HEADS, EncryptedSession, EncryptedTensor


class EncryptedCacheLayer(CacheLayerMixin):
    """Keys and values of one layer: lists of unbatched ciphertexts, one per chunk."""

    def __init__(self, cache: EncryptedCache) -> None:
        super().__init__()
        self.keys: list[Ciphertext] = []
        self.values: list[Ciphertext] = []
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: EncryptedTensor, value_states: EncryptedTensor, *args: Any, **kwargs: Any) -> tuple[EncryptedTensor, EncryptedTensor]:
        """Keep the states of a prompt and return them as they are, or append those of one token and return the whole cache."""
        cache = self._cache
        for states in (key_states, value_states):
            if not isinstance(states, EncryptedTensor) or states.kind != HEADS or states.session is not cache.session:
                raise UnsupportedEncryptedOperation("an encrypted cache takes encrypted keys and values [B, heads, T, head_dim] of its own session")
        self.is_initialized = True
        key, value = (states if states.shape[1] == cache.heads else _repeated(states, cache.heads) for states in (key_states, value_states))
        new = at_level(key.operand, CACHE_LEVELS.query + 1), at_level(value.operand, CACHE_LEVELS.value + 1)
        with cache.session.backend.log.measure("cache"):
            if not cache.session.replicated:
                self.keys, self.values = ([decode.select(cache.session, states, cache.valid()[0])] for states in new)
                return key, value
            self._append(*new)
        return tuple(self._whole(chunks) for chunks in (self.keys, self.values))

    def _append(self, key: Ciphertext, value: Ciphertext) -> None:
        cache = self._cache
        if not self.keys:
            raise ShapeError("a cache begins with a prompt: run the model on one before its first single token")
        lanes = cache.next_lanes()
        for chunks, new in ((self.keys, key), (self.values, value)):
            for index, selected in enumerate(lanes):
                if not selected.any():
                    continue
                if index == len(chunks):
                    chunks.append(decode.select(cache.session, new, selected))
                else:
                    chunks[index] = decode.append(cache.session, chunks[index], new, selected)

    def _whole(self, chunks: list[Ciphertext]) -> EncryptedTensor:
        cache = self._cache
        packing = cache.session.packing
        operand = CachedStates(cache.session, packing.features, tuple(chunks), cache.valid(1))
        shape = (packing.sequences, cache.heads, len(chunks) * packing.tokens, packing.features // cache.heads)
        return EncryptedTensor(operand, shape, HEADS)

    def get_seq_length(self) -> int:
        return int(self._cache.lengths.max()) if self.keys else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self._cache.max_tokens


class EncryptedCache(Cache):
    """The cache of one generation. `lengths` [B] are the tokens of each sequence lane, public; `max_tokens` how many it may hold.

    Grouped keys and values are kept once per query head. Raises ShapeError when a chunk per feature of a head is not enough for `max_tokens`.
    """

    def __init__(self, session: EncryptedSession, config: Any, max_tokens: int | None = None) -> None:
        packing = session.packing
        self.session = session
        self.heads = config.num_attention_heads
        self.max_tokens = packing.tokens if max_tokens is None else max_tokens
        limit = packing.tokens * (packing.features // self.heads)
        if not 1 <= self.max_tokens <= limit:
            raise ShapeError(f"a cache of {self.max_tokens} tokens is outside of 1..{limit}, what {packing.tokens} lanes and this head size allow")
        self.lengths = np.ones(packing.sequences, dtype=np.int64)
        super().__init__(layers=[EncryptedCacheLayer(self) for _ in range(config.num_hidden_layers)])

    def __repr__(self) -> str:
        return f"EncryptedCache({len(self.layers)} layers, {int(self.lengths.max())} of {self.max_tokens} tokens)"

    def valid(self, new: int = 0) -> np.ndarray:
        """[chunks, T, B] of 0/1: the lanes that hold a token, `new` more than `lengths`."""
        return self._lanes(lambda token: token < self.lengths + new, int(self.lengths.max()) + new)

    def next_lanes(self) -> np.ndarray:
        """[chunks, T, B] of 0/1: where each sequence's next token belongs."""
        return self._lanes(lambda token: token == self.lengths, int(self.lengths.max()) + 1)

    def positions(self) -> torch.Tensor:
        """[B, 1]: the rotary position of each sequence's next token."""
        return torch.from_numpy(self.lengths[:, None].copy())

    def advance(self) -> None:
        """Count the token that every layer has appended."""
        self.lengths += 1

    def snapshot(self) -> list[tuple[list[Ciphertext], list[Ciphertext]]]:
        """What `roll_back` takes to undo a token that was not finished. No copies of ciphertexts."""
        return [(list(layer.keys), list(layer.values)) for layer in self.layers]

    def roll_back(self, snapshot: list[tuple[list[Ciphertext], list[Ciphertext]]]) -> None:
        for layer, (keys, values) in zip(self.layers, snapshot, strict=True):
            layer.keys, layer.values = keys, values

    @property
    def full(self) -> bool:
        return int(self.lengths.max()) >= self.max_tokens

    def store(self, identity: Identity, generation: str) -> StoredCache:
        """The cache as a message."""
        backend = self.session.backend
        layers = [tuple(backend.serialize(backend.stack(chunks)) for chunks in (layer.keys, layer.values)) for layer in self.layers]
        return StoredCache(identity, generation, as_lengths(self.lengths), self.session.packing.tokens, layers)

    @classmethod
    def restore(cls, session: EncryptedSession, config: Any, stored: StoredCache, max_tokens: int | None = None) -> EncryptedCache:
        """The cache of a message whose identity was checked.

        Raises ModelMismatchError or CorruptFileError for anything that this session could not have written.
        """
        cache = cls(session, config, max_tokens)
        packing = session.packing
        if stored.tokens != packing.tokens or len(stored.lengths) != packing.sequences or len(stored.layers) != len(cache.layers):
            raise ModelMismatchError(
                f"the cache holds {len(stored.layers)} layers of {len(stored.lengths)} sequences x {stored.tokens} lanes, this server has "
                f"{len(cache.layers)} of {packing.sequences} x {packing.tokens}: start it with the same model and --context"
            )
        if max(stored.lengths) > cache.max_tokens:
            raise ShapeError(f"the cache holds {max(stored.lengths)} tokens, this server takes {cache.max_tokens}: start it with a larger --max-tokens")
        cache.lengths[:] = stored.lengths
        for layer, (keys, values) in zip(cache.layers, stored.layers, strict=True):
            layer.keys = _chunks(session, keys, len(cache.valid()), CACHE_LEVELS.query, stored.identity.key_id)
            layer.values = _chunks(session, values, len(cache.valid()), CACHE_LEVELS.value, stored.identity.key_id)
            layer.is_initialized = True
        return cache

    def _lanes(self, inside: Any, tokens: int) -> np.ndarray:
        packing = self.session.packing
        chunks = -(-tokens // packing.tokens)
        token = np.arange(chunks * packing.tokens)[:, None]
        return inside(token).reshape(chunks, packing.tokens, packing.sequences).astype(np.float64)


def _chunks(session: EncryptedSession, data: bytes, count: int, level: int, key_id: str) -> list[Ciphertext]:
    backend = session.backend
    stored = backend.deserialize(data, "ciphertext")
    canonical = backend.parameters.scale_at(level)
    if stored.batch_shape != (count,) or stored.level != level or stored.components != 2 or abs(stored.scale / canonical - 1) > 1e-9:
        raise CorruptFileError(f"the cache holds {stored.batch_shape} ciphertexts at level {stored.level}, ({count},) at level {level} belong there")
    if stored.key_id != key_id:
        raise CorruptFileError("the cache names another key than its ciphertexts: begin the generation again")
    return [backend.take(stored, index) for index in range(count)]


def _repeated(states: EncryptedTensor, heads: int) -> EncryptedTensor:
    """Grouped heads once per query head, while the projection that makes them is waiting."""
    batch, own, tokens, head_dim = states.shape
    rows = np.repeat(np.arange(own * head_dim).reshape(own, head_dim), heads // own, axis=0).reshape(-1)
    operand: Operand = states.operand.select(rows)
    return EncryptedTensor(operand, (batch, heads, tokens, head_dim), HEADS)
