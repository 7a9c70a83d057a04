"""The study's points, its resumable results, its Pareto front and its command, on a tiny model."""

import json
from dataclasses import replace

import pytest
from tiny_model import SENTENCES, save_tiny_model
from typer.testing import CliRunner

from hf_he.checkpoints import load_classifier
from hf_he.cli import app
from hf_he.data import TextDataset
from hf_he.errors import CorruptFileError
from hf_he.finetuning import study
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.study import Axes, Measured, Point, Study, plot, summarise

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
    assert all(0.0 <= entry.score <= 1.0 and entry.last_loss > 0 for entry in first[:2])
    assert first[0].train["seconds"] > first[1].train["seconds"] > first[1].infer["seconds"] > 0
    assert first[0].train["operations"]["rotate"] > first[0].infer["operations"]["rotate"]
    assert first[2].score is None and "squarings" in first[2].error
    monkeypatch.setattr(Study, "measure", lambda *_: pytest.fail("a finished point was run again"))
    assert list(runner.run(POINTS)) == first


def test_results_of_another_study_do_not_count(runner, directory, tmp_path):
    (entry,) = runner.run(POINTS[2:])
    other = Study(directory, ROWS, ROWS, replace(SETTINGS, learning_rate=1e-3), "n14", runner.results)
    assert not other._finished()
    runner.results.write_text(runner.results.read_text() + "{}\n")
    with pytest.raises(CorruptFileError, match="line 2"):
        list(runner.run(POINTS[2:]))
    assert entry.error


def entry(score, seconds, point=None, seed=0):
    costs = {"operations": {"rotate": 10}, "refreshes": 3, "seconds": seconds}
    return Measured(point or Point(), seed, 2, 4, score, 0.5, 0.6, costs, costs)


def test_the_front_holds_what_nothing_beats():
    measured = [
        entry(0.70, 10.0),
        entry(0.72, 20.0, Point(rank=4)),
        entry(0.70, 12.0, Point(rank=8)),
        entry(0.60, 5.0, Point(squarings=4)),
        entry(None, 1.0, Point(squarings=3)),
    ]
    assert [row["pareto"] for row in summarise(measured)] == [True, True, False, True, False]


def test_seeds_are_averaged_and_a_failed_one_is_not_hidden():
    rows = summarise([entry(0.6, 1.0), entry(0.8, 1.0, seed=1), entry(0.9, 2.0, Point(rank=8)), entry(None, 2.0, Point(rank=8), seed=1)])
    assert (rows[0]["score"], rows[0]["lowest"], rows[0]["highest"]) == (pytest.approx(0.7), 0.6, 0.8)
    assert rows[1]["score"] is None


def test_the_plot_is_a_png(tmp_path):
    plot(summarise([entry(0.7, 1.0), entry(0.8, 2.0, Point(rank=8))]), tmp_path / "study.png", "a study")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


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
    assert "**0.8000**" in table and "ApproximationError" in table
    assert (tmp_path / "out" / "study.png").is_file()
    for wrong in (["--ranks", "two"], ["--ranks", "own"], ["--norm-degrees", "own,0"]):
        assert CliRunner().invoke(app, ["study", "--config", str(recipe), *wrong]).exit_code == 2
