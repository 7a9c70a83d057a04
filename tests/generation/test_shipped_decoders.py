"""The decoders in model_cards: what a token of theirs costs as the context grows, and a generation that a restarted server goes on with."""

from itertools import pairwise

import pytest
import torch

from hf_he import GenerationClient, GenerationServer
from hf_he.checkpoints import default_decoder
from hf_he.ckks.parameters import parameter_set
from hf_he.generation.model import load_decoder
from hf_he.generation.plan import plan_generation
from hf_he.packing import Packing
from hf_he.scripts.plan import collect

PER_DOUBLING = {"gaussian_kernel": 1, "normalized_gaussian_kernel": 2, "power_softmax": 2}
"""Rotations a layer: over the keys, and over the row sums where there are any."""


@pytest.mark.parametrize("kernel", PER_DOUBLING)
def test_cost_of_a_token_at_16_32_and_64_tokens(kernel):
    model, parameters = load_decoder(default_decoder(kernel)), parameter_set("n14")
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    plans = [plan_generation(model, parameters, Packing.fit(parameters.slots, hidden, tokens)).tokens[0] for tokens in (16, 32, 64)]
    rotations = [plan.operations["rotate"] for plan in plans]
    assert [b - a for a, b in pairwise(rotations)] == [layers * PER_DOUBLING[kernel]] * 2
    for name in ("multiply", "relinearize", "multiply_plain", "rescale"):
        assert len({plan.operations[name] for plan in plans}) == 1, name
    assert len({len(plan.refreshes) for plan in plans}) == 1


def test_hf_he_plan_takes_decoders():
    data = collect(default_decoder("power_softmax"), "n14")
    assert len(data["refreshes"]) == 13 and {row["kind"] for row in data["placement"]} == {"attention", "norm", "activation"}


@pytest.mark.parametrize("kernel", PER_DOUBLING)
def test_a_restarted_server_goes_on_with_the_same_tokens(kernel):
    directory, prompt = default_decoder(kernel), [[260, 41, 87, 300]]
    client = GenerationClient.from_pretrained(directory, backend="simulator", context=16)
    keys = client.keygen()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = client.model.generate(torch.tensor(prompt), attention_mask=torch.ones(1, 4), **options)[0, 4:].tolist()
    generation = client.begin(prompt, GenerationServer(directory, keys.evaluation, context=16))
    tokens = [int(generation.logits[0].argmax())]
    generation.step(tokens[-1:])
    tokens.append(int(generation.logits[0].argmax()))
    resumed = client.resume(generation.store(), [prompt[0] + tokens[:1]], GenerationServer(directory, keys.evaluation, context=16))
    for _ in range(2):
        tokens.append(int(resumed.step(tokens[-1:])[0].argmax()))
    assert tokens == expected
    assert resumed.max_logit_error < 1e-3
