"""A whole recipe in miniature: stock BERT and TSV files in, a published polynomial-mode HEBert out, and a second run that does nothing."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_model import WORDS
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer
from transformers import pipeline as hf_pipeline
from typer.testing import CliRunner

import hf_he
from hf_he import data
from hf_he.errors import DataError, UnsupportedModelError
from hf_he.scripts.train import train
from hf_he.training import pipeline
from hf_he.training.conversion import convert_checkpoint
from hf_he.training.recipe import load_recipe

GOOD, BAD = ("good", "great", "funny"), ("bad", "dull", "sad")
STAGE = {"epochs": 4, "learning_rate": 2e-3, "batch_size": 16, "dropout": 0.0}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A random two-layer stock BERT with a masked-language-model head and the tiny vocabulary."""
    folder = tmp_path_factory.mktemp("stock")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, stock):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "sst2").mkdir()
    for split, offset, rows in (("train", 0, 96), ("dev", 50, 40)):
        lines = []
        for index in range(offset, offset + rows):
            word = (GOOD if index % 2 else BAD)[index % 3]
            lines.append(f"{WORDS[index % 2]} {word} {WORDS[2 + index % 4]}\t{index % 2}")
        (folder / "sst2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    values = {
        "task": "sst2", "data_dir": str(folder), "student": str(stock), "teacher": str(stock), "teacher_dtype": "float32",
        "output_dir": str(folder / "out"), "max_length": 8, "teacher_max_length": 8, "unlabelled": "none", "label_repeats": 1, "random_rows": 16,
        "degrees": {"norm_newton_steps": 1, "activations": {"gelu": 15, "tanh": 15}},
        "teacher_stage": STAGE,
        "softmax_stage": STAGE | {"loss": {"soft": 1.0}},
        "kernel_stage": STAGE | {"loss": {"soft": 1.0, "hidden": 0.1, "penalty": 0.1}},
        "polynomial_stage": STAGE | {"learning_rate": 2e-4, "loss": {"soft": 1.0, "penalty": 0.1}},
        "refine_stage": STAGE | {"epochs": 1, "learning_rate": 1e-4, "loss": {"soft": 1.0, "penalty": 0.1}},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments):
    import typer

    app = typer.Typer()
    app.command()(train)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(recipe):
    result = run("--config", recipe, "--json")
    assert result.exit_code == 0
    return recipe.parent / "out", json.loads(result.stdout)


def test_the_student_learns_in_polynomial_mode_and_stays_in_range(trained):
    _, report = trained
    assert report["scores"]["dev"]["polynomial"] == 1.0
    assert {name: report["ranges"][name]["out_of_range"] for name in ("train rows", "dev rows")} == {"train rows": 0, "dev rows": 0}
    assert set(report["comparison"]["dev"]) == {"softmax student", "teacher", "majority", "tfidf_logistic_regression"}


def test_the_published_folder_is_half_precision_and_loads_as_float32_in_polynomial_mode(trained):
    out, report = trained
    assert {weight.dtype for weight in load_file(out / "published" / "model.safetensors").values()} == {torch.float16}
    model, info = AutoModelForSequenceClassification.from_pretrained(out / "published", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.dtype, model.config.mode, type(model)) == (torch.float32, "polynomial", hf_he.HEBertForSequenceClassification)
    assert model.config.approximations == report["approximations"]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    names = {path.name for path in (out / "published").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_hf_he.py", "README.md", "report.json", "training.png"} <= names
    assert hf_pipeline("text-classification", model=str(out / "published"))("the great film")[0]["label"] == "positive"


def test_the_card_has_valid_metadata_and_the_measured_score(trained):
    out, report = trained
    card = ModelCard.load(out / "published" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("apache-2.0", "transformers", "text-classification")
    assert [result.metric_value for result in card.data.eval_results] == [round(report["scores"]["dev"]["polynomial"], 4)]
    for heading in ("Scores", "Approximations and ranges", "Threat model", "Provenance", "Intended use"):
        assert f"## {heading}" in card.text
    assert "{" not in card.text.replace("```", "")


def test_a_second_run_repeats_only_stages_whose_settings_changed(trained, recipe):
    out, _ = trained
    written = {stage: (out / stage / "stage.json").stat().st_mtime_ns for stage in ("teacher", "soft_labels", "softmax", "kernel", "polynomial", "refine")}
    changed = yaml.safe_load(recipe.read_text()) | {"margin": 0.5}
    other = recipe.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(changed))
    assert run("--config", other).exit_code == 0
    again = {stage for stage in written if (out / stage / "stage.json").stat().st_mtime_ns != written[stage]}
    assert again == {"polynomial", "refine"}


def test_other_data_of_the_same_size_is_another_setting(recipe, tmp_path, monkeypatch):
    """Without a teacher too, whose soft labels would see other unlabelled texts; a folder that only moved is none."""
    texts, found = tuple(f"text {number}" for number in range(8)), []
    monkeypatch.setattr(pipeline, "run_stage", lambda folder, settings, work, announce: found.append(settings))
    monkeypatch.setattr(data, "load_imdb_sentences", lambda: texts)

    def settings(**changes):
        pipeline.Pipeline(load_recipe(recipe, teacher="none", **changes)).softmax()
        return found[-1]

    for name, old, new in (("same", "good", "good"), ("train", "good", "great"), ("dev", "good", "great")):
        (tmp_path / name / "sst2").mkdir(parents=True)
        for split in ("train", "dev"):
            content = (recipe.parent / "sst2" / f"{split}.tsv").read_text()
            (tmp_path / name / "sst2" / f"{split}.tsv").write_text(content.replace(old, new) if split == name else content)
    first = settings()
    assert settings(data_dir=str(tmp_path / "same")) == first
    with_texts = settings(unlabelled="imdb", unlabelled_rows=4)
    texts = tuple(reversed(texts))
    others = [settings(unlabelled="imdb", unlabelled_rows=4), settings(unlabelled="imdb", unlabelled_rows=3)]
    others += [settings(data_dir=str(tmp_path / name)) for name in ("train", "dev")]
    assert all(a != b for a in (first, with_texts, *others) for b in (first, with_texts, *others) if a is not b)


@pytest.mark.parametrize("other", [("--max-steps", 2), ("--seed", 7)])
def test_a_full_run_is_not_replaced_by_another(trained, recipe, other):
    out, _ = trained
    with pytest.raises(DataError, match=r"kernel is finished, of a full run .* give another --output-dir"):
        run("--config", recipe, *other)
    assert json.loads((out / "refine" / "stage.json").read_text())["recipe"]["max_steps"] is None


def test_max_steps_makes_a_trial_run(recipe, tmp_path):
    assert run("--config", recipe, "--max-steps", 2, "--output-dir", tmp_path).exit_code == 0
    log = json.loads((tmp_path / "kernel" / "stage.json").read_text())["log"]
    assert log[-1]["step"] == 2


def test_a_recipe_without_a_teacher_learns_from_labels_alone(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text()) | {"teacher": "none", "train_rows": 64, "name": "taught-by-nobody"}
    for stage in ("softmax_stage", "kernel_stage", "polynomial_stage", "refine_stage"):
        values[stage] = values[stage] | {"epochs": 1, "loss": {"label": 1.0}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert run("--config", path, "--output-dir", tmp_path / "out").exit_code == 0
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"softmax", "kernel", "polynomial", "refine", "published"}
    report = json.loads((tmp_path / "out" / "published" / "report.json").read_text())
    assert set(report["comparison"]["dev"]) == {"softmax student", "majority", "tfidf_logistic_regression"}
    assert report["ranges"]["train rows"]["rows"] == 64
    card = (tmp_path / "out" / "published" / "README.md").read_text()
    assert "# taught-by-nobody" in card and "- Teacher: none." in card


def test_conversion_copies_weights_and_puts_a_new_head_on_an_encoder(stock):
    source = BertForMaskedLM.from_pretrained(stock)
    model = convert_checkpoint(stock, num_labels=3)
    torch.testing.assert_close(model.bert.encoder.layer[1].output.dense.weight, source.bert.encoder.layer[1].output.dense.weight)
    assert (model.config.num_labels, model.config.attention_kernel, model.config.mode) == (3, "gaussian_kernel", "exact")


def test_conversion_keeps_a_trained_head(stock, tmp_path):
    source = BertForSequenceClassification.from_pretrained(stock, num_labels=2)
    source.save_pretrained(tmp_path)
    model = convert_checkpoint(tmp_path)
    torch.testing.assert_close(model.classifier.weight, source.classifier.weight)
    with pytest.raises(UnsupportedModelError, match="head of 2 labels"):
        convert_checkpoint(tmp_path, num_labels=3)
