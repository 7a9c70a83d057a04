"""Noise flooding: its distribution, its grid, the bound, and the two ways a user meets it."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny_model import SENTENCES
from typer.testing import CliRunner

from hf_he.cli import app
from hf_he.errors import CorruptFileError, ParameterError
from hf_he.flooding import GRID_BITS, flood, leaked_bits
from hf_he.scripts.publish import publish


@pytest.mark.parametrize("deviation", [1e-6, 0.25, 0.3, 1.0, 700.0])
def test_noise_is_gaussian_of_a_power_of_two_deviation_and_on_a_grid(deviation):
    values = np.random.default_rng(0).uniform(-1, 1, (4, 5000))
    shown = flood(values, deviation)
    rounded = 2.0 ** math.ceil(math.log2(deviation))
    noise = (shown - values) / rounded
    assert shown.shape == values.shape and deviation <= rounded < 2 * deviation
    assert stats.kstest(noise.reshape(-1), "norm").pvalue > 1e-6 and abs(noise.std() - 1) < 0.03
    steps = shown / (rounded * 2.0**-GRID_BITS)
    assert np.array_equal(steps, np.rint(steps))
    assert not np.array_equal(shown, flood(values, deviation))


def test_noise_must_have_a_size():
    for deviation in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ParameterError, match="positive"):
            flood(np.zeros(3), deviation)


@given(st.integers(1, 10**6), st.floats(1.0, 1e4))
def test_the_bound_is_above_what_a_gaussian_channel_can_carry(count, ratio):
    """Errors of power error^2 through noise of power deviation^2 carry at most Shannon's capacity; small ones reach it."""
    capacity, bound = count / 2 * math.log1p(ratio**-2) / math.log(2), leaked_bits(1e-6, count, ratio * 1e-6)
    assert capacity <= bound * (1 + 1e-9) and bound <= capacity * (1 + ratio**-2) * (1 + 1e-9)


def test_logits_that_are_shown_are_flooded(client, server):
    sentences = client.prepare(SENTENCES[:1])
    encrypted = client.encrypt(sentences)
    result = client.run(server, encrypted)
    exact, shown = (client.decrypt(result, sentences, flooding)[0].logits for flooding in (0.0, 0.25))
    assert exact != shown and max(abs(a - b) for a, b in zip(exact, shown, strict=True)) < 0.25 * 8
    assert all((value / (0.25 * 2.0**-GRID_BITS)).is_integer() for value in shown)


def test_a_published_adapter(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    weights = {"a.lora_A.weight": torch.randn(2, 8, generator=generator), "a.lora_B.weight": 1e-3 * torch.randn(8, 2, generator=generator)}
    own, out = tmp_path / "adapter", tmp_path / "published"
    own.mkdir()
    with pytest.raises(CorruptFileError, match="adapter"):
        publish(own, out, 0.01, None)
    (own / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file(weights, own / "adapter_model.safetensors")
    publish(own, out, 0.01, 1e-6)
    published = load_file(out / "adapter_model.safetensors")
    assert (out / "adapter_config.json").read_bytes() == (own / "adapter_config.json").read_bytes()
    for name, value in weights.items():
        noise = published[name] - value
        assert noise.all() and noise.std() < 0.03 * value.std() and published[name].dtype == value.dtype
    said = capsys.readouterr().out
    assert "32 values" in said and "bits about errors of up to 1e-06" in " ".join(said.split())
    result = CliRunner().invoke(app, ["publish", str(own), "--out", str(out), "--error", "1e-6", "--json"], catch_exceptions=False)
    data = json.loads(result.stdout)
    assert data == {"adapter": str(out), "values": 32, "precision": 0.01, "error": 1e-6, "bits": data["bits"]} and 0 < data["bits"] < 1
    with pytest.raises(ParameterError, match="another --out"):
        publish(own, own, 0.01, None)
    save_file({"a.lora_B.weight": torch.zeros(8, 2)}, own / "adapter_model.safetensors")
    with pytest.raises(CorruptFileError, match="not trained"):
        publish(own, out, 0.01, None)
