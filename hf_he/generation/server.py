"""The generation server: a public decoder, evaluation keys, and the encrypted caches of the generations that run on it. It never holds a secret key.

    server = GenerationServer(model, keys.evaluation)
    answer = server.infer(prompt.to_bytes(), refresh)          # the interface of hf_he.Server, over HTTP too (`hf-he serve --generate`)
    answer = server.infer(token.to_bytes(), refresh)

It learns how long the sequences are and how many tokens are generated, not which ones. A token is appended in full or not at all, and a repeated
request for the last one is answered again without computing, so a client may always ask again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_he.backends import Ciphertext
from hf_he.errors import CorruptFileError, GenerationError, ModelMismatchError, ParameterError
from hf_he.finetuning.adapter import AdapterLayout
from hf_he.generation.adapter import EncryptedLora, is_encrypted
from hf_he.generation.cache import EncryptedCache
from hf_he.generation.decoder import EncryptedDecoder
from hf_he.generation.messages import (
    CACHE_KIND,
    CACHE_REQUEST_KIND,
    CHOICE_KIND,
    CLIENT,
    PROMPT_KIND,
    SERVER,
    TOKEN_KIND,
    CacheRequest,
    EncryptedPrompt,
    EncryptedToken,
    StoredCache,
)
from hf_he.generation.model import decoder_fingerprint, load_decoder
from hf_he.keys import ServerKeys
from hf_he.ops import argmax
from hf_he.protocol import EncryptedResult
from hf_he.server import Progress, Refresh, Server, message_kind

MAX_GENERATIONS = 16
DEFAULT_CONTEXT = 64


@dataclass
class Generation:
    """The cache of one generation, the last answer, and, where the server picks the tokens, its last choice."""

    cache: EncryptedCache
    select: str = CLIENT
    answer: bytes = field(default=b"", repr=False)
    choice: Ciphertext | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TokenWork:
    """A checked prompt or token; without embeddings, the token that the server picked."""

    message: EncryptedPrompt | EncryptedToken = field(repr=False)
    embeddings: Ciphertext | None = field(repr=False)


class GenerationServer(Server):
    """Runs a decoder on encrypted prompts and tokens.

    `model` is a folder with a polynomial-mode causal language model, `adapter` one with a plain PEFT adapter to merge into it or with one that stays
    encrypted (hf_he.generation.adapter). `context`: token lanes of
    a ciphertext, a power of two, and the longest prompt; sequences per generation follow from it. `max_tokens`: how many tokens of a sequence
    a cache may hold (default: `context`). The MAX_GENERATIONS last used caches are kept. Errors of `hf_he.Server`.
    """

    def __init__(
        self,
        model: str | Path,
        evaluation_keys: str | Path | bytes | ServerKeys,
        *,
        refresh: str = "client",
        adapter: str | Path | None = None,
        context: int = DEFAULT_CONTEXT,
        max_tokens: int | None = None,
    ) -> None:
        self._adapter = adapter
        self.tokens = context
        self.max_tokens = context if max_tokens is None else max_tokens
        super().__init__(model, evaluation_keys, refresh=refresh)
        self._install: Callable[[], None] | None = None
        self.decoder = self._decoder()
        self.decoder.cache(self.max_tokens, 1)
        self._generations: OrderedDict[str, Generation] = OrderedDict()

    def describe(self) -> dict[str, Any]:
        """As `Server.describe`, with the token lanes and the tokens a cache may hold."""
        return super().describe() | {"context": self.tokens, "max_tokens": self.max_tokens}

    @property
    def max_batch_bytes(self) -> int:
        """No valid message is larger."""
        chunks = -(-self.max_tokens // self.tokens)
        states = len(self.model.base_model.layers) * chunks * 2
        return max(self._blocks, states) * self._ciphertext_bytes + 2**20

    def open(self, data: bytes) -> Any:
        """Check a message completely. Raises CorruptFileError, ParameterError, ModelMismatchError, WrongKeyError or GenerationError."""
        kind = message_kind(data)
        if kind == PROMPT_KIND:
            return self._open_prompt(EncryptedPrompt.from_bytes(data))
        if kind in (TOKEN_KIND, CHOICE_KIND):
            return self._open_token(EncryptedToken.from_bytes(data, kind))
        if kind == CACHE_REQUEST_KIND:
            request = CacheRequest.from_bytes(data)
            request.identity.check(self.identity, "cache request")
            self._generation(request.generation)
            return request
        if kind == CACHE_KIND:
            stored = StoredCache.from_bytes(data)
            stored.identity.check(self.identity, "cache")
            return stored, self._opened_cache(stored)
        if kind == "secret_key":
            return super().open(data)
        raise CorruptFileError("this is not a message to a generation server: client and server need the same version of hf_he")

    def run(self, work: Any, refresh: Refresh, progress: Progress | None = None) -> bytes:
        """The answer to checked work."""
        if isinstance(work, TokenWork):
            return self._locked(refresh, partial(self._next, work, progress))
        if isinstance(work, CacheRequest):
            return self._locked(refresh, partial(self._stored, work))
        return self._locked(refresh, partial(self._restored, *work))

    # ---- what the base class asks for ----
    def _load(self, model: str | Path) -> tuple[torch.nn.Module, str]:
        plain = None if is_encrypted(self._adapter) else self._adapter
        self._base_fingerprint = decoder_fingerprint(model)
        return load_decoder(model, plain), decoder_fingerprint(model, self._adapter)

    def _decoder(self) -> EncryptedDecoder:
        if not is_encrypted(self._adapter):
            return EncryptedDecoder(self.session, self.model)
        lora = EncryptedLora.load(self._adapter)
        lora.identity.check(replace(self.identity, model=self._base_fingerprint), "encrypted adapter")
        tuned = lora.attach(self.model)
        self._install = partial(lora.install, self.session, tuned, AdapterLayout.of(tuned, self.packing))
        return EncryptedDecoder(self.session, tuned.get_base_model(), uniform=False)

    def _install_adapter(self) -> None:
        """Bring an encrypted adapter into the model: with the first message, because that may take a refresh by the client."""
        if self._install is not None:
            self._install()
            self._install = None

    def _place(self) -> None:
        """Decoders run at the defaults of hf_he.ops, demand by demand."""

    # ---- messages ----
    def _open_prompt(self, message: EncryptedPrompt) -> TokenWork:
        message.identity.check(self.identity, "encrypted prompt")
        packing = self.packing
        longest = min(packing.tokens, self.max_tokens)
        if len(message.lengths) != packing.sequences or max(message.lengths) > longest:
            raise ModelMismatchError(
                f"prompts of {max(message.lengths)} tokens in {len(message.lengths)} lanes do not fit this server, which takes up to {longest} in "
                f"{packing.sequences}: use the context and max_tokens it was started with"
            )
        if message.generation in self._generations:
            raise GenerationError("this prompt was sent before: encrypt it again to begin another generation")
        if message.select == SERVER:
            self._check_choice(message.prompts)
        return TokenWork(message, self._ciphertext(message.embeddings, (self._blocks,), "prompt"))

    def _open_token(self, message: EncryptedToken) -> TokenWork:
        message.identity.check(self.identity, "encrypted token")
        generation = self._generation(message.generation)
        if (message.embeddings is None) != (generation.select == SERVER):
            raise GenerationError(f"the {generation.select} picks the tokens of this generation: begin another one with the other select")
        embeddings = None if message.embeddings is None else self._ciphertext(message.embeddings, (self._blocks,), "token")
        return TokenWork(message, embeddings)

    def _opened_cache(self, stored: StoredCache) -> Generation:
        cache = EncryptedCache.restore(self.session, self.model.config, stored, self.max_tokens)
        if stored.choice is None:
            return Generation(cache)
        self._check_choice(stored.prompts)
        choice = self.backend.deserialize(stored.choice, "ciphertext")
        self.identity.check(replace(self.identity, key_id=choice.key_id), "choice")
        if choice.batch_shape != (1,) or choice.components != 2:
            raise CorruptFileError("the choice stored with this cache is not one ciphertext: begin the generation again")
        return Generation(cache, SERVER, choice=choice)

    def _check_choice(self, prompts: int) -> None:
        vocabulary = self.model.config.vocab_size
        if prompts != 1 or not self.decoder.uniform or vocabulary > min(argmax.MAX_CANDIDATES, self.packing.slots):
            raise ParameterError(
                f"the server picks tokens for one prompt at a time, of at most {min(argmax.MAX_CANDIDATES, self.packing.slots)}, and without an encrypted "
                f"adapter; this is {prompts} of {vocabulary}: use select='client'"
            )

    def _generation(self, name: str) -> Generation:
        try:
            self._generations.move_to_end(name)
            return self._generations[name]
        except KeyError:
            raise GenerationError(
                f"this server holds no generation {name} (it keeps the last {MAX_GENERATIONS}): send its stored cache with resume, or begin again"
            ) from None

    def _keep(self, name: str, generation: Generation) -> None:
        self._generations[name] = generation
        self._generations.move_to_end(name)
        while len(self._generations) > MAX_GENERATIONS:
            self._generations.popitem(last=False)

    # ---- computing ----
    def _next(self, work: TokenWork, progress: Progress | None) -> bytes:
        message = work.message
        self._install_adapter()
        if isinstance(message, EncryptedPrompt):
            cache = self.decoder.cache(self.max_tokens, message.prompts)
            cache.lengths[:] = message.lengths
            generation = Generation(cache, message.select)
            self._answer(generation, message.generation, partial(self.decoder.prefill, cache, work.embeddings), progress)
            self._keep(message.generation, generation)
            return generation.answer
        generation = self._generation(message.generation)
        cache, seen = generation.cache, int(generation.cache.lengths.max())
        if message.seen == seen - 1 and generation.answer:
            return generation.answer
        if message.seen != seen:
            raise GenerationError(f"a token after {message.seen} others was sent, the cache holds {seen}: client and server are out of step, begin again")
        if cache.full:
            raise GenerationError(f"the cache is full with {seen} tokens: start the server with a larger max_tokens")
        before = cache.snapshot()
        try:
            self._answer(generation, message.generation, partial(self.decoder.decode, cache, work.embeddings, generation.choice), progress)
        except BaseException:
            cache.roll_back(before)
            raise
        cache.advance()
        return generation.answer

    def _answer(self, generation: Generation, name: str, compute: Callable[[], Ciphertext], progress: Progress | None) -> None:
        """Logits, or the choice among them, into `generation`."""
        self._position = {"state": "running", "batch": 1, "batches": 1, "start": 0}
        if progress:
            progress(self.progress())
        before, start = self.session.refresh.count, time.perf_counter()
        result, choice = compute(), None
        if generation.select == SERVER:
            result = choice = self.decoder.choose(result)
        result = self.backend.drop_level(result, 0)
        seconds = time.perf_counter() - start
        report = self._report(seconds, [seconds], self.session.refresh.count - before)
        generation.answer = EncryptedResult(self.identity, 1, self.packing.features, name, self.backend.serialize(result), report).to_bytes()
        generation.choice = choice

    # ---- caches as messages ----
    def _stored(self, request: CacheRequest) -> bytes:
        generation = self._generation(request.generation)
        stored = generation.cache.store(self.identity, request.generation)
        if generation.choice is not None:
            stored = replace(stored, choice=self.backend.serialize(generation.choice))
        if request.forget:
            del self._generations[request.generation]
        return stored.to_bytes()

    def _restored(self, stored: StoredCache, generation: Generation) -> bytes:
        self._keep(stored.generation, generation)
        return replace(stored, layers=(), choice=None).to_bytes()
