"""`hf-he bench model`: the contract of its JSON, right answers within the ranges, projections that say so."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hf_he.bench import model as whole
from hf_he.ckks.parameters import parameter_set
from hf_he.cli import app
from hf_he.errors import BackendUnavailableError, DataError
from hf_he.nn import RangeTracker

KEYS = {
    "backend", "device", "versions", "shape", "features_per_ciphertext", "batch", "seconds_batch", "seconds_sample", "by_op", "bootstraps",
    "peak_memory_gb", "peak_gpu_gb", "security_bits", "paper",
}  # fmt: skip


def bench(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["bench", "model", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_shipped_model_on_the_simulator():
    row = bench("--backend", "simulator", "--batch", "3")
    assert set(row) == KEYS
    assert (row["backend"], row["device"], row["features_per_ciphertext"], row["batch"]) == ("simulator", "cpu", 128, 3)
    assert row["seconds_sample"] == pytest.approx(row["seconds_batch"] / 3)
    assert 0.5 * row["seconds_batch"] < sum(row["by_op"].values()) <= row["seconds_batch"]
    assert {"linear", "attention", "norm", "activation", "refresh"} <= set(row["by_op"])
    assert row["peak_gpu_gb"] is None and row["peak_memory_gb"] > 0 and row["security_bits"] >= 128 and row["bootstraps"] == 0
    assert row["paper"] == {"inference_s": 26.5, "finetune_s": 61.03, "hardware": "one RTX 4090"}


def test_projections_say_so_and_grow_with_the_packed_batches():
    one, three = (whole.priced(whole.workload("shipped", batch)) for batch in (2, 5))
    assert set(one) == KEYS | {"priced"} and one["priced"] is True
    assert three["seconds_batch"] == pytest.approx(3 * one["seconds_batch"])
    assert one["peak_memory_gb"] is None


def test_one_feature_per_ciphertext_is_priced_at_less_than_a_fifth_per_sentence():
    narrow, wide = (whole.priced(whole.workload("shipped", None, features)) for features in (128, 1))
    assert (narrow["batch"], wide["batch"]) == (2, 256)
    assert narrow["seconds_sample"] > 5 * wide["seconds_sample"]


def test_paper_shape_is_within_its_ranges_and_bootstraps():
    work = whole.workload("paper")
    with RangeTracker(work.model) as tracker:
        work.model(embedding_output=torch.from_numpy(work.embeddings).float(), attention_mask=torch.from_numpy(work.mask))
    assert tracker.out_of_range == 0, tracker.to_dict()
    row = whole.priced(work)
    assert row["bootstraps"] > 0 and row["features_per_ciphertext"] == 256


def test_what_cannot_run_says_so():
    with pytest.raises(DataError, match="choose from"):
        whole.workload("huge")
    with pytest.raises(BackendUnavailableError, match="CPU only"):
        whole.measure(whole.workload("shipped", 1), "native", "cuda", print)
    result = CliRunner().invoke(app, ["bench", "model", "--priced", "--backend", "simulator"])
    assert result.exit_code != 0


@pytest.mark.parametrize(("backend", "parameters"), [("native", "n14"), ("fhelium", "n14"), ("desilo", "n14-6")])
def test_the_shipped_shape_runs_on_parameters_that_the_backend_has(backend, parameters):
    assert whole.workload("shipped", 1, backend=backend).parameters == parameter_set(parameters)
    assert whole.workload("shipped", 1, parameters="n13", backend=backend).parameters == parameter_set("n13")


def test_a_card_is_waited_for_and_its_memory_counted(monkeypatch):
    """Seconds by operation come from a batch of their own; memory that others took before does not count."""
    waits, taken = [], [3 * 10**9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 10**9 - taken[0], 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: taken.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * 10**9)
    card = whole.Card("cuda:1")
    card.begin_peak_period()
    assert card.peak_gb() == 2.0 and taken.pop() == "cuda:1"
    taken[0] = 11 * 10**9
    assert card.peak_gb() == 8.0
    cpu = whole.Card("cpu")
    cpu.synchronise()
    assert cpu.peak_gb() is None and not waits
    monkeypatch.setattr(whole, "Card", lambda device: card)
    work = whole.workload("shipped", 3)
    row = whole.measure(work, "simulator", "cpu", lambda text: None)
    assert row["peak_gpu_gb"] == 8.0 and {"linear", "attention", "norm"} <= set(row["by_op"]) and min(row["by_op"].values()) > 0
    assert len(waits) > 100 and set(waits) == {"cuda:1"}
