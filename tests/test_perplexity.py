"""Perplexity against a token-by-token computation."""

import math

import pytest
import torch

from hf_he import HEGPTNeoXConfig, HEGPTNeoXForCausalLM
from hf_he.errors import ShapeError
from hf_he.perplexity import evaluate_perplexity


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = HEGPTNeoXConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, initializer_range=0.5, max_position_embeddings=16
    )
    return HEGPTNeoXForCausalLM(config).train()


def test_equals_the_mean_of_every_single_prediction(model):
    blocks = torch.randint(40, (5, 8), generator=torch.Generator().manual_seed(1))
    result = evaluate_perplexity(model, blocks, batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        losses = [-model(row[None, :place]).logits[0, -1].log_softmax(-1)[row[place]] for row in blocks for place in range(1, 8)]
    expected = float(torch.stack(losses).mean())
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_token == pytest.approx(expected / math.log(2), rel=1e-5)
    assert (result.tokens, result.out_of_range, result.mode) == (35, 0, "exact")
    assert set(result.ranges) == set(model.polynomial_layers())


def test_a_model_without_knowledge_has_the_perplexity_of_its_vocabulary(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate_perplexity(model, torch.arange(16).view(2, 8)).perplexity == pytest.approx(40.0, rel=1e-5)


def test_logits_that_are_no_numbers_have_the_largest_perplexity(model):
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    assert evaluate_perplexity(model, torch.arange(16).view(2, 8)).perplexity == math.exp(700.0)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,)])
def test_nothing_to_predict(model, shape):
    with pytest.raises(ShapeError, match="nothing to predict"):
        evaluate_perplexity(model, torch.zeros(shape, dtype=torch.long))
