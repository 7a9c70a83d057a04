"""What encrypted generation takes, counted without keys or data: rotations for the key generation, operations per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_he.ckks.parameters import CKKSParameters
from hf_he.generation.cache import EncryptedCache
from hf_he.packing import Packing
from hf_he.planner import CountingSession


@dataclass(frozen=True)
class StepPlan:
    """Counts of one forward: `operations` by primitive, `refreshes` as (level, ciphertexts), `rotations`: step -> highest level."""

    operations: dict[str, int]
    refreshes: tuple[tuple[int, int], ...]
    rotations: dict[int, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class GenerationPlan:
    """The prompt, and a token of each number of chunks that the cache may have."""

    prompt: StepPlan
    tokens: tuple[StepPlan, ...]

    @property
    def rotations(self) -> set[int]:
        return {step for plan in (self.prompt, *self.tokens) for step in plan.rotations}


@torch.no_grad()
def plan_generation(model: PreTrainedModel, parameters: CKKSParameters, packing: Packing, max_tokens: int | None = None) -> GenerationPlan:
    """Run `model` on a backend that only counts: a prompt that fills all lanes but one, then the first token in each chunk of the cache."""
    session = CountingSession(parameters, packing)
    backend = session.backend
    cache = EncryptedCache(session, model.config, max_tokens)

    def counted() -> StepPlan:
        plan = StepPlan(backend.log.operations(), tuple(backend.refreshes), dict(backend.rotation_levels), dict(backend.seconds))
        backend.reset()
        return plan

    backend.reset()
    cache.lengths[:] = max(packing.tokens - 1, 1)
    _ = model(inputs_embeds=session.state(session.top), past_key_values=cache, use_cache=True).logits.ciphertext
    prompt, tokens = counted(), []
    for chunk in range(-(-cache.max_tokens // packing.tokens)):
        cache.lengths[:] = chunk * packing.tokens or max(packing.tokens - 1, 1)
        with session.single_token():
            state = session.state(session.top)
            _ = model(inputs_embeds=state, position_ids=cache.positions(), past_key_values=cache, use_cache=True).logits.ciphertext
        tokens.append(counted())
    return GenerationPlan(prompt, tuple(tokens))


def generation_rotations(model: PreTrainedModel, parameters: CKKSParameters, packing: Packing, max_tokens: int) -> set[int]:
    """Rotation steps that prompts and tokens use: what the evaluation keys must cover."""
    return plan_generation(model, parameters, packing, max_tokens).rotations
