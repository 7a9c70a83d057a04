"""Recipes refuse what they do not know; the shipped one loads."""

from pathlib import Path

import pytest
import yaml

from hf_he.errors import DataError
from hf_he.training.language_recipe import LanguageRecipe
from hf_he.training.recipe import Recipe, load_recipe

SHIPPED = Path(__file__).parents[2] / "recipes" / "he_bert_tiny" / "config.yaml"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_shipped_recipe_loads_and_flags_override_it():
    recipe = load_recipe(SHIPPED, seed=7, output_dir=None)
    assert (recipe.task, recipe.seed, recipe.output_dir) == ("mr", 7, "out/he_bert_tiny")
    assert recipe.polynomial_stage.loss.penalty > 0


def test_nested_values_and_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, "kernel_stage: {learning_rate: 3e-4, epochs: 2, loss: {penalty: 1}}"))
    assert (recipe.kernel_stage.learning_rate, recipe.kernel_stage.epochs, recipe.kernel_stage.loss.penalty) == (3e-4, 2.0, 1.0)
    assert recipe.teacher_stage == Recipe().teacher_stage
    assert load_recipe(write(tmp_path, "kind: classifier")) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown key 'learning_rte'; known: calibration_rows, data_dir"),
        ("kernel_stage: {loss: {penality: 1}}", "kernel_stage: loss: unknown key 'penality'"),
        ("kernel_stage: {epochs: many}", "kernel_stage: epochs must be a number, got 'many'"),
        ("kernel_stage: {unlabelled_rows: half}", "unlabelled_rows must be a whole number or null, got 'half'"),
        ("seed: a", "seed must be a whole number, got 'a'"),
        ("task: wikipedia", "task 'wikipedia' is not one of mr"),
        ("unlabelled: wikipedia", "must be imdb or none"),
        ("kernel_stage: 3", "expected keys and values, got 3"),
        ("targets: {activations: [gelu]}", "targets: activations must be keys and values, got"),
        ("targets: {exponent: true}", "targets: exponent must be a number, got True"),
        ("degrees: {activations: {gelu: deep}}", "degrees: activations: gelu must be a whole number, got 'deep'"),
    ],
)
def test_mistakes_are_named(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpora: sotu", "corpora must be a list, got 'sotu'"),
        ("seeds: [0, one]", "seeds must be a whole number, got 'one'"),
        ("variants: [a]", "variants must be keys and values, got"),
        ("variants: {softmax: softmax}", "variants: softmax must be keys and values, got 'softmax'"),
        ("variants: {softmax: {attention_kernel: softmax}, a: {attention_kernel: [softmax]}}", "variant a needs an attention_kernel"),
        ("architecture: {tie_embeddings: maybe}", "architecture: tie_embeddings must be true or false"),
    ],
)
def test_mistakes_in_language_recipes_are_named(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_recipe(write(tmp_path, text), LanguageRecipe)


@pytest.mark.parametrize(("folder", "kind"), [("he_bert_tiny", Recipe), ("he_bert_tiny_base", Recipe), ("lm", LanguageRecipe)])
def test_shipped_recipes_are_read_as_they_are_written(folder, kind):
    """Which keeps finished stages valid: their settings are compared."""
    path = SHIPPED.parents[1] / folder / "config.yaml"
    written, read = yaml.safe_load(path.read_text()), load_recipe(path, kind).to_dict()

    def same(a, b):
        return all(same(a[key], b[key]) for key in a) if isinstance(a, dict) else a == b

    assert same(written, read)


def test_missing_recipe(tmp_path):
    (tmp_path / "no.yaml").write_text("[a]\nb = 1\n")
    with pytest.raises(DataError, match=r"no\.yaml is not YAML: give a recipe"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(DataError, match="does not exist: give a recipe"):
        load_recipe(tmp_path / "none.yaml")
