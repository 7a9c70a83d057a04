"""The study's points, its resumable results, its Pareto front and its command, on a tiny model."""

import json
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_model import SENTENCES, save_tiny_model
from typer.testing import CliRunner

from hf_he.checkpoints import load_classifier
from hf_he.cli import app
from hf_he.data import TextDataset
from hf_he.errors import CorruptFileError
from hf_he.evaluation import encode_texts
from hf_he.finetuning import study
from hf_he.finetuning.calibration import calibrate
from hf_he.finetuning.order import DataOrder
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import PolynomialTraining
from hf_he.finetuning.step import adapted_model
from hf_he.finetuning.study import Axes, Measured, Point, Study, polynomial_levels
from hf_he.finetuning.study_report import place_labels, plot, summarise
from hf_he.scripts.plan import collect, collect_step

ROWS = TextDataset("mr", "train", tuple(SENTENCES), None, (1, 0, 1, 1, 0))
SETTINGS = TrainingSettings(steps=2, sequences=4, target_modules=("query", "value"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def runner(directory, tmp_path):
    return Study(directory, ROWS, ROWS, SETTINGS, "n14", tmp_path / "results.jsonl")


POINTS = [Point(2, 6, 7, 15), Point(1, 6, 7, 15), Point(2, 1, 7, 15)]


def test_points_vary_one_axis_at_a_time():
    points = Axes(rank=(2, 8), squarings=(5,), norm_degree=(7, 3), activation_degree=(7,)).points()
    assert points == [Point(2, 5, 7, 7), Point(8, 5, 7, 7), Point(2, 5, 3, 7), Point(8, 5, 7, 7), Point(2, 5, 3, 7)][:3]
    both = Axes(rank=(2, 1), squarings=(5, 4), norm_degree=(7,), activation_degree=(7,)).points()
    assert Point(1, 4, 7, 7) in both and len(both) == 4


def test_what_is_its_own_is_left_alone_and_no_extreme(directory):
    points = Axes(rank=(2,), squarings=(None,), norm_degree=(None, 7, 31), activation_degree=(None,)).points()
    assert points == [Point(), Point(norm_degree=7), Point(norm_degree=31)]
    model = load_classifier(directory)
    before = {name: dict(entry) for name, entry in model.config.approximations.items()}
    Point(activation_degree=7).apply(model)
    for name, entry in model.config.approximations.items():
        changed = {} if "newton_steps" in entry or "squarings" in entry else {"degree": 7}
        assert entry == before[name] | changed


def test_a_run_measures_quality_and_cost_and_goes_on_where_it_stopped(runner, monkeypatch):
    first = list(runner.run(POINTS))
    assert [entry.point for entry in first] == POINTS
    assert all(0.0 <= entry.score <= 1.0 and entry.last_loss > 0 and entry.dev_loss > 0 for entry in first[:2])
    assert first[0].infer["levels"] == first[1].infer["levels"]
    assert first[0].train["seconds"] > first[1].train["seconds"] > first[1].infer["seconds"] > 0
    assert first[0].train["operations"]["rotate"] > first[0].infer["operations"]["rotate"]
    assert first[2].score is None and "squarings" in first[2].error
    monkeypatch.setattr(Study, "measure", lambda *_: pytest.fail("a finished point was run again"))
    assert list(runner.run(POINTS)) == first


def test_costs_and_plans_of_a_hidden_size_that_is_no_power_of_two(tmp_path):
    model = save_tiny_model(tmp_path, hidden_size=96, num_attention_heads=6)
    train, infer = Study(model, ROWS, ROWS, SETTINGS, "n14", tmp_path / "results.jsonl").cost(Point(), SETTINGS)
    planned = collect(model, "n14")
    assert planned["features_per_ciphertext"] == collect_step(model, "n14", 4)["features_per_ciphertext"] == 32
    assert train["operations"]["rotate"] > infer["operations"]["rotate"] > planned["operations"]["rotate"] > 0


def test_results_of_another_study_do_not_count(runner, directory, tmp_path):
    (entry,) = runner.run(POINTS[2:])
    other = Study(directory, ROWS, ROWS, replace(SETTINGS, learning_rate=1e-3), "n14", runner.results)
    assert not other._finished()
    runner.results.write_text(runner.results.read_text() + "{}\n")
    with pytest.raises(CorruptFileError, match="line 2"):
        list(runner.run(POINTS[2:]))
    assert entry.error


def test_a_second_seed_keeps_what_was_found_and_trains_another_run(runner, directory, monkeypatch):
    (first,) = runner.run(POINTS[:1])
    both = Study(directory, ROWS, ROWS, SETTINGS, "n14", runner.results, seeds=(0, 1))
    monkeypatch.setattr(Study, "cost", lambda *_: pytest.fail("the cost of a point does not depend on the seed"))
    again, second = both.run(POINTS[:1])
    assert again == first and second.seed == 1
    assert second.last_loss != first.last_loss
    assert (second.train, second.infer, second.before) == (first.train, first.infer, first.before)


def test_a_point_is_the_twin_of_its_own_polynomials(runner, directory):
    """Against a loop of the twin's written out here, with the loss of torch."""
    point = Point(1, 6, 7, 15)
    found = runner.measure(point, 3)
    model, tokenizer = load_classifier(directory), runner.tokenizer
    point.apply(model)
    settings = replace(SETTINGS, rank=1)
    order = DataOrder(len(ROWS), SETTINGS.sequences, 3)
    model.save_pretrained(runner.results.parent / "point")
    ranges = calibrate(runner.results.parent / "point", tokenizer, ROWS, settings, [order.step(1), order.step(2)], 3)
    settings = replace(settings, **asdict(ranges) | {"loss_scale": 1.0})
    torch.manual_seed(3)
    training = PolynomialTraining(adapted_model(model.double(), settings), settings)
    for number in (1, 2):
        rows = ROWS.select(order.step(number))
        training.step(encode_texts(tokenizer, rows), rows.labels)
    with torch.no_grad():
        expected = training.model(**encode_texts(tokenizer, ROWS), labels=torch.tensor(ROWS.labels)).loss
    assert found.last_loss == pytest.approx(training.losses[-1], rel=1e-9)
    assert found.dev_loss == pytest.approx(float(expected), rel=1e-5)


def test_levels_of_a_forward(directory):
    """Kernels take a level per squaring; degree d takes ceil(log2(d + 1)), in two layers of two norms and one activation each, and in the pooler."""
    model = load_classifier(directory)
    entries = model.config.approximations
    Point(squarings=6, norm_degree=15, activation_degree=7).apply(model)
    norms = sum("newton_steps" in entry for entry in entries.values())
    kernels = sum("squarings" in entry for entry in entries.values())
    assert polynomial_levels(model) == 6 * kernels + 4 * norms + 3 * (len(entries) - norms - kernels)


def entry(score, seconds, point=None, seed=0, dev_loss=None):
    costs = {"operations": {"rotate": 10}, "refreshes": 3, "seconds": seconds, "levels": 20}
    dev_loss = 1.0 - score if dev_loss is None and score is not None else dev_loss
    return Measured(point or Point(), seed, 2, 4, 0.5, score, dev_loss, 0.6, costs, costs, "RangeError: no" if score is None else "")


def test_the_front_holds_what_nothing_beats():
    measured = [
        entry(0.70, 10.0),
        entry(0.72, 20.0, Point(rank=4)),
        entry(0.70, 12.0, Point(rank=8)),
        entry(0.60, 5.0, Point(squarings=4)),
        entry(None, 1.0, Point(squarings=3)),
    ]
    assert [row["pareto"] for row in summarise(measured)] == [True, True, False, True, False]


def test_the_front_of_the_dev_loss_is_its_own():
    rows = summarise([entry(0.70, 10.0, dev_loss=0.6), entry(0.69, 12.0, Point(rank=4), dev_loss=0.5)])
    assert [row["pareto"] for row in rows] == [True, False]
    assert [row["pareto_loss"] for row in rows] == [True, True]


def test_seeds_are_averaged_and_a_failed_one_is_not_hidden():
    four, eight = Point(rank=4), Point(rank=8)
    runs = [entry(0.6, 1.0), entry(0.8, 1.0, seed=1), entry(0.7, 2.0, four), entry(0.8, 2.0, four, 1), entry(0.9, 2.0, eight), entry(None, 2.0, eight, 1)]
    rows = summarise(runs)
    assert rows[0]["score"] == pytest.approx(0.7) and rows[0]["score_spread"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert rows[0]["dev_loss"] == pytest.approx(0.3)
    assert rows[1]["dev_loss_change"] == pytest.approx(-0.05) and rows[1]["dev_loss_change_error"] == pytest.approx(0.05)
    assert [run["seed"] for run in rows[1]["runs"]] == [0, 1] and rows[1]["runs"][0]["score"] == 0.7
    assert rows[2]["score"] is None and "RangeError" in rows[2]["error"] and rows[2]["runs"][0]["score"] == 0.9
    assert rows[1]["score_change"] == pytest.approx(0.05) and rows[0]["score_change"] == 0.0
    json.dumps(rows, allow_nan=False)


def test_without_a_centre_there_are_no_differences():
    rows = summarise([entry(None, 1.0), entry(0.8, 2.0, Point(rank=8))])
    assert rows[1]["score"] == 0.8 and rows[1]["score_change"] is None and rows[1]["dev_loss_change"] is None


def test_the_plot_is_a_png(tmp_path):
    plot(summarise([entry(0.7, 1.0), entry(0.8, 2.0, Point(rank=8))]), tmp_path / "study.png", "a study")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_labels_of_near_points_do_not_overlap():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(6, 4))
    entries = [(1.0 + 0.01 * number, 1.0, f"label {number}") for number in range(6)]
    axis.plot(*zip(*[entry[:2] for entry in entries], strict=True), "o")
    axis.set(xlim=(0.8, 1.3), ylim=(0.9, 1.1))
    figure.canvas.draw()
    place_labels(axis, entries, [0.02] * len(entries), ["k"] * len(entries))
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in axis.texts]
    assert len(boxes) == len(entries)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    pyplot.close(figure)


def test_the_command_writes_table_and_plot(directory, tmp_path, monkeypatch):
    measured = [
        entry(0.7, 10.0),
        entry(0.8, 20.0, Point(rank=4)),
        replace(entry(None, 0.0, Point(squarings=1)), train=None, infer=None, error="ApproximationError: no"),
    ]
    monkeypatch.setattr(study.Study, "run", lambda self, points: iter(measured))
    recipe = tmp_path / "recipe.yaml"
    for split in ("train", "dev"):
        (tmp_path / "sst2").mkdir(exist_ok=True)
        (tmp_path / "sst2" / f"{split}.tsv").write_text("sentence\tlabel\na great film\t1\nthe plot was dull\t0\n")
    recipe.write_text(f"model: {directory}\ntask: sst2\ndata_dir: {tmp_path}\narguments: {{output_dir: {tmp_path}}}\n")
    result = CliRunner().invoke(app, ["study", "--config", str(recipe), "--output-dir", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    data = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert [point["score"] for point in data["points"]] == [0.7, 0.8, None]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "**0.8000**" in table and "| against the first |" in table and "ApproximationError" in table
    assert (tmp_path / "out" / "study.png").is_file()
    for wrong in (["--ranks", "two"], ["--ranks", "own"], ["--norm-degrees", "own,0"]):
        assert CliRunner().invoke(app, ["study", "--config", str(recipe), *wrong]).exit_code == 2
