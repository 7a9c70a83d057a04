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
    """The prompt, and a token for each number of chunks that the cache may have: of one sequence (`tokens`) and of several (`batched_tokens`)."""

    prompt: StepPlan
    tokens: tuple[StepPlan, ...]
    batched_tokens: tuple[StepPlan, ...]

    @property
    def rotations(self) -> set[int]:
        return {step for plan in (self.prompt, *self.tokens, *self.batched_tokens) for step in plan.rotations}


@torch.no_grad()
def plan_generation(model: PreTrainedModel, parameters: CKKSParameters, packing: Packing, max_tokens: int | None = None) -> GenerationPlan:
    """Run `model` on a backend that only counts: a prompt that fills all lanes but one, then the first token in each chunk of the cache."""
    session = CountingSession(parameters, packing)
    backend = session.backend

    def run(cache: EncryptedCache, **arguments: torch.Tensor) -> StepPlan:
        backend.reset()
        _ = model(inputs_embeds=session.state(session.top), past_key_values=cache, use_cache=True, **arguments).logits.ciphertext
        cache.settle()
        return StepPlan(backend.log.operations(), tuple(backend.refreshes), dict(backend.rotation_levels), dict(backend.seconds))

    plans = []
    for prompts in (1, packing.sequences):
        cache = EncryptedCache(session, model.config, max_tokens, prompts)
        cache.lengths[:] = max(packing.tokens - 1, 1)
        prompt, tokens = run(cache), []
        for chunk in range(-(-cache.max_tokens // packing.tokens)):
            cache.lengths[:] = chunk * packing.tokens or max(packing.tokens - 1, 1)
            with session.single_token(cache.uniform):
                tokens.append(run(cache, position_ids=cache.positions()))
        plans.append(tuple(tokens))
    return GenerationPlan(prompt, *plans)


def generation_rotations(model: PreTrainedModel, parameters: CKKSParameters, packing: Packing, max_tokens: int) -> set[int]:
    """Rotation steps that prompts and tokens use: what the evaluation keys must cover."""
    return plan_generation(model, parameters, packing, max_tokens).rotations
