"""A decoder on ciphertexts: prompts, tokens and the server's own choice, for the server and for the plan."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hf_he.backends.base import Ciphertext
from hf_he.generation.cache import EncryptedCache
from hf_he.ops import argmax, decode, reduce
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand
from hf_he.tensor import EncryptedSession, EncryptedTensor, state_tensor


class EncryptedDecoder:
    """`model`: a causal language model in polynomial mode, its maps plain or with encrypted low-rank weights. States of one prompt's tokens are
    uniform (hf_he.ops.uniform) unless `uniform` is False, which encrypted weights need."""

    def __init__(self, session: EncryptedSession, model: PreTrainedModel, uniform: bool = True) -> None:
        self.session = session
        self.model = model
        self.uniform = uniform

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size

    def cache(self, max_tokens: int | None, prompts: int) -> EncryptedCache:
        return EncryptedCache(self.session, self.model.config, max_tokens, prompts)

    def is_uniform(self, prompts: int) -> bool:
        return self.uniform and prompts == 1

    @torch.no_grad()
    def prefill(self, cache: EncryptedCache, embeddings: Ciphertext) -> Ciphertext:
        """Logits after the last token of each prompt of `cache.lengths`, as `decode` gives them; fills the cache."""
        session = self.session
        hidden = self.model.base_model(inputs_embeds=session.hidden_state(embeddings), past_key_values=cache, use_cache=True).last_hidden_state
        cache.settle()
        last = reduce.sum_lanes(session, decode.placed(hidden.operand, cache.last_lanes(), 1))
        with session.single_token(self.is_uniform(cache.prompts)):
            state = session.hidden_state(session.backend.reshape(last, (1,)))
            return self.model.get_output_embeddings()(state).ciphertext

    @torch.no_grad()
    def decode(self, cache: EncryptedCache, embeddings: Ciphertext | None, choice: Ciphertext | None = None) -> Ciphertext:
        """Logits after one more token, the same in every token lane; appends to the cache, which `advance` then counts. Without embeddings the token is
        `choice`, a one-hot vector from `choose`."""
        session = self.session
        with session.single_token(self.is_uniform(cache.prompts)):
            state = self._chosen(choice) if embeddings is None else session.hidden_state(embeddings)
            return self.model(inputs_embeds=state, position_ids=cache.positions(), past_key_values=cache, use_cache=True).logits.ciphertext

    def choose(self, logits: Ciphertext) -> Ciphertext:
        """The largest of one prompt's logits as a one-hot vector."""
        return argmax.encrypted(self.session, logits, self.vocabulary)

    def _chosen(self, choice: Ciphertext) -> EncryptedTensor:
        table = self.model.get_input_embeddings().weight
        weight = self.session.derived(table, "transposed", lambda table: table.detach().T)
        return state_tensor(WaitingLinear(Operand(self.session, table.shape[0], choice), weight, None))
