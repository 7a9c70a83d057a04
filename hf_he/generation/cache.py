"""The encrypted key-value cache: a transformers `Cache` whose states are ciphertexts, at constant levels, and can be written to bytes.

    cache = EncryptedCache(session, model.config)
    cache.lengths[:] = prompt_lengths
    model(inputs_embeds=prompts, past_key_values=cache)                 # the prompts' keys and values are the cache
    cache.settle()
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
from hf_he.ops.decode import CACHE_LEVELS, CachedStates
from hf_he.ops.operand import Operand
from hf_he.protocol import Identity
from hf_he.tensor import HEADS, EncryptedSession, EncryptedTensor

KEY_LEVEL, VALUE_LEVEL = CACHE_LEVELS.query, CACHE_LEVELS.value


class EncryptedCacheLayer(CacheLayerMixin):
    """Keys and values of one layer: lists of unbatched ciphertexts, one per chunk."""

    def __init__(self, cache: EncryptedCache) -> None:
        super().__init__()
        self.keys: list[Ciphertext] = []
        self.values: list[Ciphertext] = []
        self._cache = cache
        self._prompt: tuple[Operand, Operand] | None = None

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
        cache.settle()
        if not cache.session.replicated:
            self._prompt = key.operand, value.operand
            return key, value
        with cache.session.backend.log.measure("cache"):
            if not self.keys:
                raise ShapeError("a cache begins with a prompt: run the model on one before its first single token")
            self._append(self.keys, key.operand, KEY_LEVEL)
            self._append(self.values, value.operand, VALUE_LEVEL)
        return self._whole(self.keys), self._whole(self.values)

    def settle(self) -> None:
        """Place the states of a prompt on its lanes, after attention has taken them at the levels it needs: what waits has then kept its input."""
        if self._prompt is not None:
            with self._cache.session.backend.log.measure("cache"):
                lanes, (key, value) = self._cache.valid()[0], self._prompt
                self.keys, self.values = [decode.placed(key, lanes, KEY_LEVEL)], [decode.placed(value, lanes, VALUE_LEVEL)]
            self._prompt = None

    def _append(self, chunks: list[Ciphertext], new: Operand, level: int) -> None:
        for index, lanes in enumerate(self._cache.next_lanes()):
            if not lanes.any():
                continue
            placed = decode.placed(new, lanes, level)
            if index == len(chunks):
                chunks.append(placed)
            else:
                chunks[index] = self._cache.session.backend.add(chunks[index], placed)

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
    """The cache of one generation. `lengths` [B] are the tokens of each sequence lane, public; `max_tokens` how many it may hold; `prompts` how many
    of the sequence lanes differ, the others being copies.

    Grouped keys and values are kept once per query head. Raises ShapeError when the heads are not as wide as the hidden states, and when a chunk per
    feature of a head is not enough for `max_tokens`.
    """

    def __init__(self, session: EncryptedSession, config: Any, max_tokens: int | None = None, prompts: int | None = None) -> None:
        packing = session.packing
        self.session = session
        self.heads = config.num_attention_heads
        self.max_tokens = packing.tokens if max_tokens is None else max_tokens
        self.prompts = packing.sequences if prompts is None else prompts
        width = self.heads * (getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        if width != packing.features:
            raise ShapeError(f"the {self.heads} heads have {width} features, the states {packing.features}: generation on ciphertexts needs as many")
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

    def settle(self) -> None:
        """Finish what a prompt left to do; before the cache is used."""
        for layer in self.layers:
            layer.settle()

    def last_lanes(self) -> np.ndarray:
        """[T, B] of 0/1: where each prompt's last token is."""
        return (np.arange(self.session.packing.tokens)[:, None] == self.lengths - 1).astype(np.float64)

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
        self.settle()
        layers = [tuple(backend.serialize(backend.stack(chunks)) for chunks in (layer.keys, layer.values)) for layer in self.layers]
        return StoredCache(identity, generation, as_lengths(self.lengths), self.prompts, self.session.packing.tokens, layers)

    @classmethod
    def restore(cls, session: EncryptedSession, config: Any, stored: StoredCache, max_tokens: int | None = None) -> EncryptedCache:
        """The cache of a message whose identity was checked.

        Raises ModelMismatchError or CorruptFileError for anything that this session could not have written.
        """
        cache = cls(session, config, max_tokens, stored.prompts)
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
            layer.keys = _chunks(session, keys, len(cache.valid()), KEY_LEVEL, stored.identity.key_id)
            layer.values = _chunks(session, values, len(cache.valid()), VALUE_LEVEL, stored.identity.key_id)
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
