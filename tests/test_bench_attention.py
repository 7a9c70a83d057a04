"""The attention operators beside each other: right results, counted refreshes, prices and the printed figures."""

import warnings

import pytest
from typer.testing import CliRunner

from hf_he.bench import attention
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.cli import app
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import Packing, ScoreLayout
from hf_he.planner import CountingSession


@pytest.fixture(scope="module")
def rows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = CKKSParameters.from_bits(11, 50, 40, 7, special_bits=50, special_count=2, insecure=True)
    return {row["operator"]: row for row in attention.measure(8, 1, "simulator", parameters)}


def test_every_operator_is_right_where_it_is_timed(rows):
    assert set(rows) == set(attention.NAMES)
    for name, row in rows.items():
        assert row["max_error"] < attention.TOLERANCE + 5e-3, name
        assert row["sequences"] == 2 and row["seconds"] > 0 and row["ratio"] == row["cpu_seconds"] / rows["power_softmax"]["cpu_seconds"]


def test_softmax_refreshes_most(rows):
    assert rows["softmax"]["refreshed"] > rows["power_softmax"]["refreshed"] >= rows["gaussian_kernel"]["refreshed"]


def test_priced_rows_include_bootstraps():
    found = {row["operator"]: row for row in attention.priced(32)}
    for row in found.values():
        assert (row["seconds"] > row["seconds_without_refreshes"]) == (row["refreshed"] > 0)
    assert found["softmax"]["ratio"] > 1.0 == found["power_softmax"]["ratio"]
    assert found["softmax"]["function_ratio"] > found["softmax"]["ratio"]


def test_only_softmax_and_kernel_refresh_scores_at_the_levels_of_the_function():
    parameters = parameter_set(attention.PRICED)
    session = CountingSession(parameters, Packing.fit(parameters.slots, 16, 128))
    scores = ScoreLayout(session.packing, 1).ciphertexts
    refreshed = {}
    for operator in attention.operators(*attention.sample(session.packing)):
        attention._price_at(operator, session, AttentionLevels(attention.FUNCTION_QUERY_LEVEL, 2))
        refreshed[operator.name] = [count for _, count in session.backend.refreshes]
    assert scores == 8 and scores not in refreshed["power_softmax"]
    assert refreshed["softmax"][0] == refreshed["gaussian_kernel"][0] == scores


def test_printed_figures_are_ratios_to_power_softmax():
    ratios = {(row["operator"], row["tokens"]): row["ratio"] for row in attention.paper_ratios([32, 128, 1024])}
    assert len(ratios) == 6 and ratios["power softmax", 1024] == 1.0
    assert ratios["softmax by squaring", 1024] == pytest.approx(173.4 / 8.6)


def test_command(monkeypatch):
    monkeypatch.setattr(attention, "measure", lambda tokens, rounds, announce: [])
    result = CliRunner().invoke(app, ["bench", "attention", "--quick", "--json"])
    assert result.exit_code == 0 and '"priced"' in result.stdout
