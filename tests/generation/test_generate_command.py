"""`hf-he generate`: the JSON contract, and where refreshes happen."""

import json

import pytest
from typer.testing import CliRunner

from hf_he.cli import app

KEYS = {
    "backend", "prompt", "tokens", "text", "tokens_polynomial", "seconds_per_token", "bootstraps_per_token", "refreshes_per_token", "operations_per_token",
    "cache_bytes", "max_logit_error",
}  # fmt: skip


@pytest.mark.parametrize("refresh", ["client", "bootstrap"])
def test_shipped_decoder_in_a_server_process(refresh):
    result = CliRunner().invoke(
        app, ["generate", "--prompt", "The ship sailed", "--max-new-tokens", "3", "--backend", "simulator", "--refresh", refresh, "--json"]
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data.keys() == KEYS and data["backend"] == "simulator" and len(data["tokens"]) == 3
    assert data["tokens"] == data["tokens_polynomial"] and data["text"].startswith("The ship sailed") and data["max_logit_error"] < 1e-2
    assert data["cache_bytes"] > 0 and data["operations_per_token"]["rotate"] > 0
    done, other = ("refreshes_per_token", "bootstraps_per_token")[:: 1 if refresh == "client" else -1]
    assert data[done] > 0 and data[other] == 0
