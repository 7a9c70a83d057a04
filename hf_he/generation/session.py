"""One generation as the client sees it, and the plaintext model that runs along."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_he.errors import CorruptFileError, GenerationError, RangeError, RefreshError, ShapeError
from hf_he.generation.messages import CLIENT, CacheRequest, StoredCache
from hf_he.protocol import EncryptedResult

if TYPE_CHECKING:
    from hf_he.client import InferenceServer, Progress
    from hf_he.generation.client import GenerationClient

MIN_SHARE = 0.9
"""Of the token that a server picked: less is a tie."""


class Reference:
    """The plaintext polynomial model over the same tokens, one sequence after another. Raises RangeError where a value leaves its fitted range."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._caches: list[DynamicCache] = []
        self._logits: list[np.ndarray] = []

    @property
    def logits(self) -> np.ndarray:
        """[B', vocabulary] after the last token of each sequence."""
        return np.stack(self._logits)

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, length: int) -> None:
        """Another sequence: the first `length` of `tokens` [1, T]; the others are only checked."""
        cache = DynamicCache(config=self._model.config)
        logits = self._model(tokens, past_key_values=cache, use_cache=True).logits
        if length < tokens.shape[1]:
            cache.crop(length - tokens.shape[1])
        self._caches.append(cache)
        self._logits.append(logits[0, length - 1].numpy())

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> None:
        """One more token of every sequence; on a RangeError none has moved."""
        logits, lengths = [], [cache.get_seq_length() for cache in self._caches]
        try:
            for token, cache in zip(tokens, self._caches, strict=True):
                logits.append(self._model(torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True).logits[0, -1].numpy())
        except BaseException:
            for cache, length in zip(self._caches, lengths, strict=True):
                if cache.get_seq_length() > length:
                    cache.crop(length - cache.get_seq_length())
            raise
        self._logits = logits


@dataclass
class Generation:
    """Sequences being generated. `lengths`: tokens sent so far; `logits` [B', vocabulary] predict the next ones, or, where `select` is "server", are
    near 1 for the token that the server picked."""

    client: GenerationClient = field(repr=False)
    server: InferenceServer = field(repr=False)
    lengths: list[int]
    reference: Reference | None = field(default=None, repr=False)
    name: str = ""
    select: str = CLIENT
    logits: np.ndarray | None = field(default=None, repr=False)
    reports: list[dict[str, Any]] = field(default_factory=list, repr=False)
    seconds: dict[str, float] = field(default_factory=lambda: {"encrypt": 0.0, "server": 0.0, "decrypt": 0.0}, repr=False)
    sizes: dict[str, int] = field(default_factory=lambda: {"sent": 0, "received": 0}, repr=False)
    max_logit_error: float | None = None
    _unanswered: list[int] | None = field(default=None, init=False, repr=False)
    _clipped: bool = field(default=False, init=False, repr=False)

    def step(self, tokens: Sequence[int], progress: Progress | None = None) -> np.ndarray:
        """Append one token per sequence; the logits of the next. After a failure (of the connection, of a refresh) the same tokens may be sent again.

        Raises GenerationError when there is no room, for other tokens than those of a step that failed, which the server may hold by now, and once a
        refreshed value was clipped; RangeError as `Reference`, and at that value.
        """
        client, tokens = self.client, [int(token) for token in tokens]
        if len(tokens) != len(self.lengths):
            raise ShapeError(f"{len(tokens)} tokens for {len(self.lengths)} sequences: give one each")
        if self._clipped:
            raise GenerationError("a value of this generation left its range, and the server's cache keeps what came of it: begin another one")
        if max(self.lengths) >= client.max_tokens:
            raise GenerationError(f"{max(self.lengths)} tokens fill the cache: use a larger max_tokens on client and server")
        if self._unanswered is None:
            if self.reference is not None:
                self.reference.step(tokens)
            self._unanswered = tokens
        elif tokens != self._unanswered:
            raise GenerationError("the last step failed and the server may hold its tokens: send the same ones again, or begin another generation")
        start = time.perf_counter()
        message = client.encrypted_token(self.name, max(self.lengths), tokens if self.select == CLIENT else None)
        self.seconds["encrypt"] += time.perf_counter() - start
        self.receive(message, progress)
        self._unanswered = None
        self.lengths = [length + 1 for length in self.lengths]
        return self.logits

    def store(self, *, forget: bool = False) -> bytes:
        """The cache, encrypted, as bytes to keep anywhere; `forget`: the server drops it."""
        request = CacheRequest(self.client.identity, self.name, forget)
        answer = self.server.infer(request.to_bytes(), no_refresh)
        StoredCache.from_bytes(answer).identity.check(self.client.identity, "cache")
        return answer

    @property
    def chosen(self) -> int:
        """The token that the server picked. Raises RangeError when its logits were too close to tell, or too large."""
        share = self.logits[0]
        if share.max() < MIN_SHARE or abs(share.sum() - 1.0) > 0.1:
            raise RangeError(
                f"the server's choice is a blend (its largest share is {share.max():.2f}): the logits were too close or too large; select on the client"
            )
        return int(share.argmax())

    def receive(self, message: bytes, progress: Progress | None) -> None:
        """Send a message, answer refresh requests, keep the logits."""
        refresher = self.client.refresher()
        start = time.perf_counter()
        answer = self.server.infer(message, refresher, progress)
        self.seconds["server"] += time.perf_counter() - start
        self._clipped = bool(refresher.clipped)
        refresher.check()
        start = time.perf_counter()
        result = EncryptedResult.from_bytes(answer)
        if result.batch_id != self.name:
            raise CorruptFileError("the server answered for another generation: begin again")
        self.logits = self.client.decrypt(result, len(self.lengths))
        self.seconds["decrypt"] += time.perf_counter() - start
        self.reports.append(result.report)
        self.sizes["sent"] += len(message)
        self.sizes["received"] += len(answer)
        if self.reference is not None and self.select == CLIENT:
            self.max_logit_error = max(float(np.abs(self.logits - self.reference.logits).max()), self.max_logit_error or 0.0)


def no_refresh(_: bytes) -> bytes:
    raise RefreshError("the server asked for a refresh where nothing is computed: do not trust it")
