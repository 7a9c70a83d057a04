"""`hf-he bench model --project`: counts priced with published times; what the prices are and what the rows say."""

import json
from collections import Counter
from pathlib import Path

import pytest
from test_bench_model import KEYS
from typer.testing import CliRunner

from hf_he.bench.finetune import PAPER_SHAPE, SHIPPED_SHAPE, count_inference
from hf_he.bench.pricing import PricedBackend
from hf_he.bench.projection import PRICES, PRIMITIVES, Published, project, table
from hf_he.ckks.parameters import parameter_set
from hf_he.cli import app
from hf_he.errors import DataError
from hf_he.packing import Packing

FILE = Path(__file__).resolve().parent.parent / "recipes" / "benchmarks" / "gpu_primitives.json"


@pytest.fixture(scope="module")
def published() -> Published:
    return Published.load(FILE)


def test_the_command_prints_both_packings_of_a_shape():
    result = CliRunner().invoke(app, ["bench", "model", "--project", str(FILE), "--json"])
    assert result.exit_code == 0, result.output
    narrow, wide = json.loads(result.stdout)
    for row in (narrow, wide):
        assert set(row) == KEYS | {"priced", "operations", "with_other_bootstraps", "step", "published"} and row["priced"] is True
        assert row["seconds_sample"] == pytest.approx(row["seconds_batch"] / row["batch"]) and row["peak_gpu_gb"] is None
        assert sum(row["by_op"].values()) == pytest.approx(row["seconds_batch"])
    assert (narrow["features_per_ciphertext"], wide["features_per_ciphertext"]) == (128, 1) and wide["step"] is None
    assert narrow["seconds_sample"] > 3 * wide["seconds_sample"] and narrow["step"]["seconds_batch"] > narrow["seconds_batch"]
    assert [line[3] for line in table([narrow, wide])[1]] == ["inference", "LoRA step", "inference"]


def test_prices_are_sums_of_counts_times_published_times(published):
    ms = published.milliseconds
    units = Counter({("hoisted rotation", 3): 5, ("hoisted rotation", 7): 5, ("relinearize", 2): 1, ("multiply", 2): 1, ("refresh", 0): 2, ("decompose", 1): 9})
    expected = {"hoisted rotation": 10 * ms["rotate"], "refresh": 2 * ms["bootstrap"]}
    found = published.seconds(units)
    assert {name: found[name] for name in expected} == {name: pytest.approx(value / 1000) for name, value in expected.items()}
    assert found["relinearize"] + found["multiply"] == pytest.approx(ms["multiply"] / 1000) and "decompose" not in found


def test_every_counted_unit_has_a_price(published):
    """Also those of one feature per ciphertext, whose matrix products are counted weight by weight."""
    units = count_inference(SHIPPED_SHAPE, parameter_set("n16-bootstrap"), Packing.fit(1 << 15, 1, 32))
    assert {name for name, _ in units} <= set(PRICES)
    config = SHIPPED_SHAPE.config
    assert not config and sum(count for (name, _), count in units.items() if name == "weight") == 2 * (4 * 128**2 + 2 * 128 * 512) + 128**2 + 2 * 128
    backend = PricedBackend(published.counted)
    assert (backend.parameters.max_level, backend.parameters.security_bits) == (published.levels, 128)


def test_the_papers_shape_against_its_bars(published):
    row = project(PAPER_SHAPE, None, published)
    assert (row["batch"], row["features_per_ciphertext"], row["shape"]["name"]) == (1, 256, "paper")
    assert row["seconds_sample"] < row["paper"]["inference_s"] and row["step"]["seconds_sample"] < row["paper"]["finetune_s"]
    bootstraps = row["bootstraps"] * published.milliseconds["bootstrap"] / 1000
    for other in row["with_other_bootstraps"]:
        assert other["seconds_sample"] == pytest.approx(row["seconds_sample"] + bootstraps * (other["milliseconds"] / published.milliseconds["bootstrap"] - 1))


def test_files_that_say_too_little_are_refused(tmp_path):
    data = json.loads(FILE.read_text())
    for change in ({"source": None, "milliseconds": {}}, {"milliseconds": dict.fromkeys(PRIMITIVES, 0)}, {"milliseconds": dict.fromkeys(PRIMITIVES, 1)}):
        (tmp_path / "times.json").write_text(json.dumps(data | change))
        with pytest.raises(DataError, match=r"times\.json"):
            Published.load(tmp_path / "times.json")
    with pytest.raises(DataError, match="cannot read"):
        Published.load(tmp_path / "none.json")
