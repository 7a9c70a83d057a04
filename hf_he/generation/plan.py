"""What encrypted generation takes, counted without keys or data: rotations for the key generation, operations per token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from hf_he.backends.base import Ciphertext
from hf_he.ckks.parameters import CKKSParameters
from hf_he.finetuning.adapter import AdapterLayout, EncryptedAdapter
from hf_he.generation.decoder import EncryptedDecoder
from hf_he.ops.argmax import MAX_CANDIDATES
from hf_he.packing import Packing
from hf_he.peft import HELoraConfig, with_fresh_adapter
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
    """The prompt, and a token for each number of chunks that the cache may have: of one sequence (`tokens`), of several (`batched_tokens`), and the
    server's choice of a token, where the vocabulary is small enough."""

    prompt: StepPlan
    tokens: tuple[StepPlan, ...]
    batched_tokens: tuple[StepPlan, ...]
    choice: StepPlan | None

    @property
    def rotations(self) -> set[int]:
        plans = [self.prompt, *self.tokens, *self.batched_tokens, *([] if self.choice is None else [self.choice])]
        return {step for plan in plans for step in plan.rotations}


def plan_generation(
    model: PreTrainedModel, parameters: CKKSParameters, packing: Packing, max_tokens: int | None = None, uniform: bool = True
) -> GenerationPlan:
    """Run `model` on a backend that only counts: a prompt that fills all lanes but one, then the first token in each chunk of the cache."""
    session = CountingSession(parameters, packing)
    backend, decoder = session.backend, EncryptedDecoder(session, model, uniform)

    def run(compute: Callable[[], Ciphertext]) -> tuple[StepPlan, Ciphertext]:
        backend.reset()
        result = compute()
        return StepPlan(backend.log.operations(), tuple(backend.refreshes), dict(backend.rotation_levels), dict(backend.seconds)), result

    prompts, tokens = [], []
    for sequences in (1, packing.sequences):
        cache = decoder.cache(max_tokens, sequences)
        cache.lengths[:] = max(packing.tokens - 1, 1)
        plan, logits = run(partial(decoder.prefill, cache, backend.fresh(session.top)))
        prompts.append((plan, logits))
        steps = []
        for chunk in range(-(-cache.max_tokens // packing.tokens)):
            cache.lengths[:] = chunk * packing.tokens or max(packing.tokens - 1, 1)
            steps.append(run(partial(decoder.decode, cache, backend.fresh(session.top)))[0])
        tokens.append(tuple(steps))
    prompt, logits = prompts[0]
    if not uniform or decoder.vocabulary > min(MAX_CANDIDATES, packing.slots):
        return GenerationPlan(replace(prompt, rotations=prompt.rotations | prompts[1][0].rotations), *tokens, None)
    cache = decoder.cache(max_tokens, 1)
    cache.lengths[:] = max(packing.tokens - 1, 1)
    decoder.prefill(cache, backend.fresh(session.top))
    choice, one_hot = run(partial(decoder.choose, logits))
    with_choice, _ = run(partial(decoder.decode, cache, None, one_hot))
    choice = replace(choice, rotations=choice.rotations | with_choice.rotations)
    return GenerationPlan(replace(prompt, rotations=prompt.rotations | prompts[1][0].rotations), *tokens, choice)


def generation_rotations(
    model: PreTrainedModel, parameters: CKKSParameters, packing: Packing, max_tokens: int | None = None, lora: HELoraConfig | None = None
) -> set[int]:
    """Rotation steps that prompts and tokens use, with and without an adapter `lora` that stays encrypted: what the evaluation keys must cover."""
    rotations = plan_generation(model, parameters, packing, max_tokens).rotations
    if lora is None:
        return rotations
    tuned = with_fresh_adapter(copy.deepcopy(model), copy.deepcopy(lora))
    session = CountingSession(parameters, packing)
    layout = AdapterLayout.of(tuned, packing)
    dense = replace(session.backend.fresh(session.top), batch_shape=(layout.count,))
    EncryptedAdapter(session, tuned, layout, dense).install()
    decoder = EncryptedDecoder(session, tuned.get_base_model(), uniform=False)
    cache = decoder.cache(max_tokens, 1)
    cache.lengths[:] = max(packing.tokens - 1, 1)
    decoder.prefill(cache, session.backend.fresh(session.top))
    decoder.decode(cache, session.backend.fresh(session.top))
    return rotations | set(session.backend.rotation_levels)
