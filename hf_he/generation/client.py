"""The generation client: tokenizer, embeddings and the secret key. Prompts go out encrypted, logits come back, and the client picks the tokens.

client = GenerationClient.from_pretrained(directory)
keys = client.keygen()
client.server = GenerationServer(directory, keys.evaluation)          # or hf_he.connect("http://127.0.0.1:8765")
model.generate(**tokenizer(text, return_tensors="pt"), custom_generate=hf_he.encrypted_generate, client=client, max_new_tokens=8)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_he.backends import HEBackend, get_backend
from hf_he.ckks.parameters import parameter_set
from hf_he.client import DEFAULT_PARAMETERS, MAX_REFRESHES_PER_BATCH, InferenceServer, Progress, Refresher
from hf_he.errors import CorruptFileError, GenerationError, ParameterError, RangeError, ShapeError, WrongKeyError
from hf_he.generation.adapter import EncryptedLora, encrypt_adapter, is_encrypted
from hf_he.generation.messages import CLIENT, SELECTIONS, SERVER, EncryptedPrompt, EncryptedToken, StoredCache
from hf_he.generation.model import decoder_fingerprint, load_decoder
from hf_he.generation.plan import generation_rotations
from hf_he.generation.server import DEFAULT_CONTEXT
from hf_he.generation.session import Generation, Reference, no_refresh
from hf_he.keys import Keys
from hf_he.ops.uniform import Spread, unpack_uniform
from hf_he.packing import Packing, pack_embeddings, unpack_state
from hf_he.peft import HELoraConfig
from hf_he.protocol import EncryptedResult, Identity, widest_batch


class GenerationClient:
    """Encrypts prompts and tokens for one decoder, answers refresh requests, decrypts logits.

    `adapter`, `context` and `max_tokens` are those of the server. The plaintext polynomial model on this side embeds tokens and, with `check`, runs
    along: a token whose values would leave a fitted range is refused before anything is encrypted, and `Generation.max_logit_error` compares.
    An adapter that stays encrypted on the server (`encrypt_adapter`) the client decrypts for that; without `check` neither happens.
    """

    def __init__(
        self,
        directory: str | Path,
        backend: HEBackend,
        keys: Keys | None = None,
        *,
        adapter: str | Path | None = None,
        context: int = DEFAULT_CONTEXT,
        max_tokens: int | None = None,
        check: bool = True,
        server: InferenceServer | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.backend = backend
        self._uniform = not is_encrypted(adapter)
        self._encrypted_adapter = EncryptedLora.load(adapter) if is_encrypted(adapter) else None
        self.model: PreTrainedModel = load_decoder(directory, None if self._encrypted_adapter else adapter).double()
        self.model_fingerprint = decoder_fingerprint(directory, adapter)
        self.packing = Packing.fit(backend.parameters.slots, self.model.config.hidden_size, context)
        self.max_tokens = context if max_tokens is None else max_tokens
        self.check = check
        self.server = server
        self.last: Generation | None = None
        self.keys: Keys | None = None
        if keys is not None:
            self.use_keys(keys)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, backend: str = "auto", parameters: str = DEFAULT_PARAMETERS, keys: Keys | str | Path | None = None, **options: Any
    ) -> GenerationClient:
        """A client for the decoder in `directory`; with `keys`, backend and parameters are those the keys were made for. `options` as above."""
        if keys is None:
            return cls(directory, get_backend(backend, parameter_set(parameters)), **options)
        keys = keys if isinstance(keys, Keys) else Keys.load(keys)
        return cls(directory, keys.backend, keys, **options)

    def use_keys(self, keys: Keys) -> None:
        if keys.backend.name != self.backend.name or keys.backend.parameters.fingerprint != self.backend.parameters.fingerprint:
            raise ParameterError(f"these keys are for the {keys.backend.name} backend or for other parameters: build the client with keys=... instead")
        self.keys = keys
        if self._encrypted_adapter is not None and self.check:
            base = replace(self.identity, model=decoder_fingerprint(self.directory))
            self._encrypted_adapter.identity.check(base, "encrypted adapter")
            self.model = self._encrypted_adapter.decrypt(self.model, self.packing, self.backend, keys)
            self._encrypted_adapter = None

    def encrypt_adapter(self, adapter: str | Path, folder: str | Path) -> Path:
        """A plain PEFT adapter of this client's model, encrypted, into `folder`: what GenerationServer takes as `adapter`. Returns the file."""
        return encrypt_adapter(self.model, adapter, self.identity, self.packing, self.backend, self._keys).save(folder)

    def keygen(self, progress: Callable[[int, int], None] | None = None, *, bootstrapping: bool = False, lora: HELoraConfig | None = None) -> Keys:
        """Fresh keys for exactly the rotations that prompts and tokens of this decoder need, for those of an adapter `lora` that stays encrypted, and for
        bootstrapping if asked."""
        rotations = generation_rotations(self.model, self.backend.parameters, self.packing, self.max_tokens, lora)
        self.use_keys(Keys.generate(self.backend, rotations, progress, bootstrapping=bootstrapping))
        return self._keys

    @property
    def identity(self) -> Identity:
        return Identity(self.backend.name, self.backend.parameters.fingerprint, self.model_fingerprint, self._keys.key_id)

    def begin(
        self, prompts: Sequence[Sequence[int]], server: InferenceServer | None = None, progress: Progress | None = None, select: str = CLIENT
    ) -> Generation:
        """Send token ids of up to `packing.sequences` prompts, each of 1 to `packing.tokens` and `max_tokens`; `Generation.logits` follow their last tokens.

        With `select` "server", for one prompt, the server takes the most likely token itself and needs no embedding of it: `Generation.chosen`.

        Raises ShapeError for prompts that do not fit, RangeError for one that leaves a fitted range, ParameterError for an unknown `select`.
        """
        if select not in SELECTIONS:
            raise ParameterError(f"select must be one of {', '.join(SELECTIONS)}, got {select!r}")
        packing = self.packing
        if not 1 <= len(prompts) <= packing.sequences:
            raise ShapeError(
                f"{len(prompts)} prompts do not fit {packing.sequences} sequence lanes of {packing.tokens} tokens: use a smaller context, or fewer"
            )
        longest = min(packing.tokens, self.max_tokens)
        if not all(1 <= len(prompt) <= longest for prompt in prompts):
            raise ShapeError(
                f"prompts must have 1 to {longest} tokens, got {[len(prompt) for prompt in prompts]}: shorten them, or raise context and max_tokens"
            )
        generation = Generation(self, self._server(server), [len(prompt) for prompt in prompts], self._reference())
        filled = self._filled(prompts, generation.reference)
        start = time.perf_counter()
        embeddings = self._encrypted(self._embedded(filled))
        lengths = tuple(generation.lengths[i % len(prompts)] for i in range(packing.sequences))
        message = EncryptedPrompt(self.identity, lengths, len(prompts), embeddings, select)
        generation.name, generation.select = message.generation, select
        generation.seconds["encrypt"] += time.perf_counter() - start
        generation.receive(message.to_bytes(), progress)
        self.last = generation
        return generation

    def resume(self, stored: bytes, prompts: Sequence[Sequence[int]], server: InferenceServer | None = None) -> Generation:
        """Go on from the bytes of `Generation.store`, on any server of the same model and keys. `prompts`: all tokens the cache holds, which the
        client must have kept; the next call is `Generation.step` with the token after them."""
        message = StoredCache.from_bytes(stored)
        message.identity.check(self.identity, "cache")
        generation = Generation(self, self._server(server), [len(prompt) for prompt in prompts], self._reference(), message.generation)
        generation.select = CLIENT if message.choice is None else SERVER
        if tuple(generation.lengths) != message.lengths[: message.prompts]:
            raise GenerationError(f"the cache holds {message.lengths} tokens, {tuple(generation.lengths)} were given: pass all tokens but the last one chosen")
        if generation.reference is not None:
            for prompt in prompts:
                generation.reference.begin(torch.tensor([list(prompt)]), len(prompt))
        StoredCache.from_bytes(generation.server.infer(stored, no_refresh)).identity.check(self.identity, "answer of the server")
        self.last = generation
        return generation

    # ---- for Generation ----
    @property
    def _keys(self) -> Keys:
        if self.keys is None:
            raise WrongKeyError("this client has no keys: call client.keygen(), or pass keys= a folder written by `hf-he keygen`")
        return self.keys

    def _server(self, server: InferenceServer | None) -> InferenceServer:
        server = server or self.server
        if server is None:
            raise ParameterError("no server: set client.server to a GenerationServer, or to hf_he.connect(url)")
        return server

    def _reference(self) -> Reference | None:
        return Reference(self.model) if self.check else None

    def refresher(self) -> Refresher:
        return Refresher(self.backend, self._keys, MAX_REFRESHES_PER_BATCH, max(2, widest_batch(self.model.config, self.packing)))

    def encrypted_token(self, generation: str, seen: int, tokens: Sequence[int] | None) -> bytes:
        """One token per sequence as a message; None: the one that the server picked."""
        if tokens is None:
            return EncryptedToken(self.identity, generation, seen, None).to_bytes()
        states = self._embedded(torch.tensor([[int(token)] for token in tokens]))
        return EncryptedToken(self.identity, generation, seen, self._encrypted(np.repeat(states, self.packing.tokens, axis=1))).to_bytes()

    def decrypt(self, result: EncryptedResult, prompts: int) -> np.ndarray:
        """[prompts, vocabulary] logits. Raises the typed errors of a result that does not fit."""
        result.identity.check(self.identity, "encrypted result")
        ciphertext = self.backend.deserialize(result.logits, "ciphertext")
        vocabulary, packing = self.model.config.vocab_size, self.packing
        if ciphertext.key_id != self._keys.key_id:
            raise WrongKeyError(f"the logits belong to key {ciphertext.key_id}, not {self._keys.key_id}: decrypt with the keys they were encrypted for")
        uniform = prompts == 1 and self._uniform
        count = Spread.of(vocabulary, packing).ciphertexts if uniform else packing.blocks(vocabulary)
        if ciphertext.batch_shape != (count,):
            raise CorruptFileError(f"the result's ciphertext has shape {ciphertext.batch_shape}: client and server need the same version of hf_he")
        slots = self.backend.decrypt(ciphertext, self._keys.secret)
        logits = unpack_uniform(slots, packing, vocabulary)[None] if uniform else unpack_state(slots, packing, vocabulary)[:prompts, 0]
        if not np.isfinite(logits).all():
            raise CorruptFileError("the result decrypts to numbers that are not finite (its scale is wrong): begin the generation again")
        return logits

    def _embedded(self, tokens: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return self.model.get_input_embeddings()(tokens).numpy()

    def _encrypted(self, embeddings: np.ndarray) -> bytes:
        return self.backend.serialize(self.backend.encrypt(pack_embeddings(embeddings, self.packing), self._keys.secret))

    def _filled(self, prompts: Sequence[Sequence[int]], reference: Reference | None) -> torch.Tensor:
        """[B', T]: each prompt, then more real tokens. No prompt token attends to those, but their states must stay in the fitted ranges too."""
        lanes, rows = self.packing.tokens, []
        for prompt in (list(prompt) for prompt in prompts):
            candidates = [torch.tensor([(prompt + more * lanes)[:lanes]]) for more in (prompt, prompt[::-1], prompt[-1:])]
            for index, row in enumerate(candidates):
                try:
                    if reference is not None:
                        reference.begin(row, len(prompt))
                    break
                except RangeError:
                    if index == len(candidates) - 1:
                        raise
            rows.append(row)
        return torch.cat(rows)
