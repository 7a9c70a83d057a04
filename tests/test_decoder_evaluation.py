"""Encrypted evaluation of decoders: accuracy beside polynomial mode, and where the time goes."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hf_he import HEGPTNeoXConfig, HEGPTNeoXForCausalLM, HELlamaConfig, HELlamaForCausalLM
from hf_he.cli import app
from hf_he.decoder_evaluation import BREAKDOWN, evaluate_encrypted
from hf_he.errors import ShapeError
from hf_he.nn import RangeTracker
from hf_he.scripts import evaluate_language

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
DECODERS = {
    "neox": lambda **changes: HEGPTNeoXForCausalLM(HEGPTNeoXConfig(**SIZES, **changes)),
    "llama": lambda **changes: HELlamaForCausalLM(HELlamaConfig(**SIZES, **changes)),
}


def polynomial(architecture, blocks, **changes):
    """A random decoder with intervals around what these blocks need."""
    torch.manual_seed(0)
    model = DECODERS[architecture](**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
        with RangeTracker(model) as tracker:
            model(blocks)
    entries = {}
    for name, seen in tracker.ranges.items():
        largest, around = 1.2 * max(-seen.minimum, seen.maximum), [seen.minimum / 2, 2 * seen.maximum]
        entries[name] = {
            "variance": {"interval": around, "degree": 7, "newton_steps": 0},
            "exponent": {"interval": [min(1.2 * seen.minimum, -8.0), 0.0], "squarings": 5},
            "input": {"interval": [-largest, largest], "degree": 7},
            "power_mean": {"interval": around, "degree": 7, "goldschmidt_steps": 2},
        }[seen.statistic]
    model.set_approximations(entries)
    model.set_mode("polynomial")
    return model


@pytest.mark.parametrize("kernel", ["gaussian_kernel", "power_softmax"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_logits_tokens_and_perplexity_agree(architecture, kernel):
    blocks = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    model = polynomial(architecture, blocks, attention_kernel=kernel)
    seen = []
    result = evaluate_encrypted(model, blocks, "simulator", "n14", lambda done, total: seen.append((done, total)))
    assert result.mse < 1e-6 and result.max_logit_error < 1e-2
    assert result.same_next_token == 1.0 and result.same_tokens > 0.95
    assert result.perplexity == pytest.approx(result.perplexity_polynomial, rel=1e-3)
    assert (result.prefixes, result.tokens, result.batch, result.security_bits) == (3, 16, 32, 128) and seen == [(3, 3)]
    assert result.seconds_by_part.keys() == BREAKDOWN.keys() and result.refreshes >= 1
    assert 0 < sum(result.seconds_by_part.values()) <= 1.01 * result.seconds


def test_lengths_fill_the_packing():
    blocks = torch.zeros(1, 12, dtype=torch.long)
    with pytest.raises(ShapeError, match="8 or 16"):
        evaluate_encrypted(polynomial("neox", blocks), blocks, "simulator")


def test_command(monkeypatch, tmp_path):
    blocks = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    model = polynomial("neox", blocks)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(evaluate_language, "load_decoder", lambda directory, mode: (model, None))
    monkeypatch.setattr(evaluate_language, "spread_blocks", lambda tokenizer, split, data_dir, length, limit: blocks)
    arguments = ["evaluate", "--task", "lm", "--mode", "encrypted", "--backend", "simulator", "--model", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["kernel"] == "gaussian_kernel" and data["prefixes"] == 4 and data["mse"] < 1e-6
    assert "same next token 100" in CliRunner().invoke(app, arguments).stdout
