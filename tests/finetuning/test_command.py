"""`hf-he finetune`: the JSON contract, tables, the plot, plaintext mode, and refusals in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_run import DATA
from typer.testing import CliRunner

from hf_he.checkpoints import load_classifier
from hf_he.cli import app
from hf_he.errors import CheckpointError, DataError, ParameterError, TrainingError
from hf_he.finetuning.recipe import FinetuneRecipe
from hf_he.training.recipe import load_recipe

KEYS = {
    "backend", "steps", "losses", "losses_polynomial", "adapter_relative_error", "seconds_per_step", "by_op", "operations", "bootstraps_per_step",
    "peak_memory_gb", "score_before", "score_after",
}  # fmt: skip


@pytest.fixture
def recipe(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneRecipe, "datasets", lambda self: (DATA, DATA))
    arguments = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "learning_rate": 0.002, "target_modules": ["value"], "lora_rank": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny), "arguments": arguments}))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_encrypted_with_a_server_process(recipe, tmp_path):
    data = json.loads(run("--encrypted", "--config", recipe, "--backend", "simulator", "--max-steps", 2, "--json"))
    assert data.keys() == KEYS
    assert data["steps"] == 2 == len(data["losses"]) and data["adapter_relative_error"] < 1e-4 and data["backend"] == "simulator"
    assert (tmp_path / "run" / "losses.png").stat().st_size > 1000 and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="holds a run already"):
        run("--encrypted", "--config", recipe, "--backend", "simulator", "--max-steps", 2)
    with pytest.raises(CheckpointError, match="holds an encrypted run, whose adapter"):
        run("--config", recipe, "--max-steps", 2)
    output = run("--encrypted", "--config", recipe, "--backend", "simulator", "--max-steps", 2, "--resume")
    for expected in ("Loss before each update", "Server time of a step", "planner's estimate", "adapter against the twin", "2 in all"):
        assert expected in output


def test_plain_mode_gives_the_twin(recipe, tmp_path):
    data = json.loads(run("--config", recipe, "--max-steps", 2, "--json"))
    assert data.keys() == KEYS and data["backend"] == "plaintext" and data["losses"] is None and len(data["losses_polynomial"]) == 2
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(ParameterError, match="add --encrypted"):
        run("--config", recipe, "--resume")


def test_an_own_recipe_says_how_long_a_run_is(recipe, tmp_path):
    def steps(*options, **arguments):
        written = yaml.safe_load(recipe.read_text())
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(written | {"arguments": written["arguments"] | arguments}))
        return json.loads(run("--config", path, "--json", *options))["steps"]

    assert steps(max_steps=2) == 2 and steps("--max-steps", 3, max_steps=2) == 3 and steps("--epochs", 1, max_steps=3) == 2
    assert steps(num_train_epochs=2) == 4 and steps() == 10


def test_without_a_recipe_ten_steps_of_the_shipped_one(monkeypatch):
    monkeypatch.setattr("hf_he.finetuning.report.plain_run", lambda recipe, args: [recipe.task, args.max_steps, args.learning_rate])
    assert json.loads(run("--json")) == ["mr", 10, 2e-3] and json.loads(run("--epochs", 1, "--json")) == ["mr", -1, 1e-2]


def test_a_resumed_run_keeps_its_number_of_steps(recipe, tmp_path):
    options = ["--encrypted", "--config", recipe, "--backend", "simulator"]
    run(*options, "--prepare", "--max-steps", 1)
    written = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(written | {"arguments": written["arguments"] | {"num_train_epochs": 1}}))
    assert json.loads(run(*options, "--resume", "--json"))["steps"] == 1
    with pytest.raises(TrainingError, match="steps is 2 now and was 1"):
        run(*options, "--resume", "--epochs", 1)


def test_prepare_names_the_commands(recipe, tmp_path):
    output = run("--encrypted", "--prepare", "--config", recipe, "--backend", "simulator", "--features", 1)
    assert "hf-he serve --model" in output and "--finetune FOLDER" in output and "this command again, with --resume" in output
    assert (tmp_path / "run" / "client" / "keys" / "evaluation.keys").is_file()
    assert json.loads((tmp_path / "run" / "client" / "run.json").read_text())["settings"]["features"] == 1
    with pytest.raises(ParameterError, match="--features has no meaning with --task lm"):
        run("--encrypted", "--task", "lm", "--features", 1)


def test_recipes_are_checked(tmp_path):
    path = tmp_path / "recipe.yaml"
    texts = {
        "a: 1": "unknown key 'a'", "[": "not YAML", "# caf\xe9": "not YAML", "short_runs: 3": "must be keys and values", "task: poetry": "not one of",
        "train_rows: many": "train_rows must be a whole number", "approximations: {a: 1}": "approximations: a must be keys and values",
    }  # fmt: skip
    for text, message in texts.items():
        path.write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=message):
            load_recipe(path, FinetuneRecipe)
    with pytest.raises(DataError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml", FinetuneRecipe)
    with pytest.raises(DataError, match="unknown argument 'lora_depth'"):
        FinetuneRecipe(arguments={"lora_depth": 3}).training_arguments()
    with pytest.raises(DataError, match="could not convert string to float: 'fast'"):
        FinetuneRecipe(arguments={"learning_rate": "fast"}).training_arguments()
    with pytest.raises(DataError, match="needs `steps`"):
        FinetuneRecipe(short_runs={"warmup_steps": 3})


@pytest.mark.parametrize("name", ["finetune_mr", "finetune_sst2"])
def test_the_shipped_recipes_are_readable_and_their_polynomials_fit(name, tmp_path):
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / name / "config.yaml", FinetuneRecipe)
    assert recipe.training_arguments(max_steps=10).lora_rank == 2 and (recipe.model_folder / "config.json").is_file()
    model = load_classifier(recipe.start_model(tmp_path))
    for layer, module in model.polynomial_layers().items():
        approximation = getattr(module, "approximation", None) or module.kernel_approximation
        asked = recipe.approximations[layer].get("interval", approximation.interval)
        assert approximation.interval == tuple(asked) and approximation.max_error < 0.006, layer


def test_short_runs_have_a_schedule_of_their_own():
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "finetune_mr" / "config.yaml", FinetuneRecipe)
    chosen = [recipe.training_arguments(max_steps=steps).settings(8528, divisor=1.0, eps=0.02, loss_bound=12.0) for steps in (10, 15, 16, -1, None)]
    assert [(run.learning_rate, run.warmup_steps) for run in chosen] == [(2e-3, 3), (2e-3, 5), (1e-2, 0), (1e-2, 0), (1e-2, 0)]
    assert recipe.training_arguments(max_steps=10, learning_rate=0.5).learning_rate == 0.5
    own = replace(recipe, arguments=recipe.arguments | {"max_steps": 10})
    assert own.training_arguments().learning_rate == 2e-3 and own.training_arguments(max_steps=-1).learning_rate == 1e-2


def test_approximations_of_a_recipe_replace_those_of_a_copy(tiny, tmp_path):
    before = load_classifier(tiny)
    name = next(name for name, entry in before.config.approximations.items() if "newton_steps" in entry)
    recipe = FinetuneRecipe(model=str(tiny), approximations={name: {"interval": [0.1, 99.0], "degree": 31}})
    after = load_classifier(recipe.start_model(tmp_path))
    expected = before.config.approximations | {name: before.config.approximations[name] | {"interval": [0.1, 99.0], "degree": 31}}
    assert after.config.approximations == expected
    for ours, theirs in zip(before.parameters(), after.parameters(), strict=True):
        assert ours.equal(theirs)
    assert FinetuneRecipe(model=str(tiny)).start_model(tmp_path) == tiny
    with pytest.raises(DataError, match="no layer 'tanh'"):
        FinetuneRecipe(model=str(tiny), approximations={"tanh": {"degree": 3}}).start_model(tmp_path)
