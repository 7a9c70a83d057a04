"""Scores against scikit-learn and scipy, padding to the encrypted length, range counts, baselines, and the JSON of `hf-he evaluate`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn import metrics
from tiny_model import SENTENCES, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification
from typer.testing import CliRunner

import hf_he  # noqa: F401  (registers HEBert)
from hf_he import evaluation
from hf_he.data import TextDataset
from hf_he.errors import DataError
from hf_he.evaluation import baselines, encode_texts, evaluate_model, predictions_from_logits, score

ROWS = TextDataset("mr", "dev", tuple(SENTENCES), None, (1, 0, 1, 1, 0))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(directory):
    return AutoModelForSequenceClassification.from_pretrained(directory)


@pytest.fixture
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_scores_equal_independent_implementations():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 2, 200), generator.integers(0, 2, 200)
    assert score("accuracy", labels, predictions) == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert score("f1", labels, predictions) == pytest.approx(metrics.f1_score(labels, predictions))
    assert score("matthews_correlation", labels, predictions) == pytest.approx(metrics.matthews_corrcoef(labels, predictions))
    values, guesses = generator.normal(size=200), generator.normal(size=200)
    assert score("pearson", values, guesses) == pytest.approx(pearsonr(values, guesses).statistic)


@pytest.mark.parametrize("metric", ["f1", "matthews_correlation", "pearson"])
def test_a_constant_predictor_scores_zero(metric):
    assert score(metric, np.array([0, 1, 1]), np.zeros(3)) == 0.0


def test_unknown_metric():
    with pytest.raises(DataError, match="accuracy, f1, matthews_correlation and pearson"):
        score("bleu", np.zeros(2), np.zeros(2))


def test_rows_are_padded_to_the_encrypted_length(tokenizer):
    encoded = encode_texts(tokenizer, ROWS)
    assert {tensor.shape for tensor in encoded.values()} == {(5, 32)}
    pairs = encode_texts(tokenizer, replace(ROWS, second=ROWS.first), max_length=16)
    assert pairs["token_type_ids"].max() == 1 and pairs["input_ids"].shape == (5, 16)


def test_result_is_that_of_the_model_and_does_not_depend_on_the_batch_size(model, tokenizer):
    result = evaluate_model(model, tokenizer, ROWS, batch_size=2)
    with torch.no_grad():
        expected = model(**encode_texts(tokenizer, ROWS)).logits
    torch.testing.assert_close(torch.from_numpy(result.logits), expected, atol=1e-5, rtol=1e-5)
    assert result.score == pytest.approx(float((expected.argmax(-1).numpy() == np.asarray(ROWS.labels)).mean()))
    assert (result.mode, result.metric, result.out_of_range) == ("polynomial", "accuracy", 0)


def test_every_approximated_layer_is_reported_over_all_positions(model, tokenizer):
    ranges = evaluate_model(model, tokenizer, ROWS).ranges
    assert set(ranges) == set(model.config.approximations)
    assert ranges["bert.encoder.layer.0.attention.self"]["count"] == 5 * 2 * 32 * 32
    assert ranges["bert.encoder.layer.0.output.LayerNorm"]["count"] == 5 * 32


def test_values_outside_are_counted_instead_of_raised(model, tokenizer):
    entries = model.config.approximations
    entries["bert.pooler.activation"] |= {"interval": [-1e-3, 1e-3]}
    model.set_approximations(entries)
    result = evaluate_model(model, tokenizer, ROWS)
    assert result.out_of_range == result.ranges["bert.pooler.activation"]["out_of_range"] > 0


def test_logits_that_are_not_finite_are_wrong_whatever_the_label():
    logits = np.array([[np.nan, 0.0], [0.0, np.inf], [0.0, 1.0], [np.nan, 1.0], [1.0, 0.0]])
    assert list(predictions_from_logits(ROWS, logits) == ROWS.labels) == [False, False, True, False, True]
    assert list(predictions_from_logits(replace(ROWS, task="stsb"), logits[:, :1])) == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_head_of_another_task_is_refused(model, tokenizer):
    with pytest.raises(DataError, match=r"has 2 output.*task stsb needs 1"):
        evaluate_model(model, tokenizer, replace(ROWS, task="stsb", labels=(0.5,) * 5))


def test_a_stock_classifier_has_no_ranges(model, tokenizer):
    config = model.config
    stock = BertForSequenceClassification._from_config(
        BertForSequenceClassification.config_class(vocab_size=config.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    result = evaluate_model(stock, tokenizer, ROWS)
    assert (result.ranges, result.mode) == ({}, "exact")


def test_baselines_learn_a_word_and_know_the_majority():
    texts = tuple(f"{word} {number}" for number in range(30) for word in ("good", "great", "bad"))
    train = TextDataset("mr", "train", texts, None, (1, 1, 0) * 30)
    found = baselines(train, TextDataset("mr", "test", ("good film", "bad film"), None, (1, 0)))
    assert found == {"majority": 0.5, "tfidf_logistic_regression": 1.0}


def test_regression_baselines():
    texts = tuple(f"{word} {number}" for number in range(30) for word in ("far", "near"))
    train = TextDataset("stsb", "train", texts, texts, (1.0, 4.0) * 30)
    found = baselines(train, TextDataset("stsb", "dev", ("far", "near"), ("far", "near"), (0.5, 4.5)))
    assert found["majority"] == 0.0 and found["tfidf_logistic_regression"] == pytest.approx(1.0)


@pytest.fixture
def sst2_folder(tmp_path):
    (tmp_path / "sst2").mkdir()
    lines = "".join(f"{text}\t{label}\n" for text, label in zip(ROWS.first, ROWS.labels, strict=True))
    for split in ("train", "dev"):
        (tmp_path / "sst2" / f"{split}.tsv").write_text("sentence\tlabel\n" + lines)
    return tmp_path


def run(*arguments):
    import typer

    from hf_he.scripts.evaluate import evaluate

    app = typer.Typer()
    app.command()(evaluate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("mode", ["exact", "polynomial"])
def test_command_prints_the_json_contract(directory, sst2_folder, mode):
    result = run("--model", directory, "--task", "sst2", "--split", "dev", "--mode", mode, "--data-dir", sst2_folder, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {"task", "split", "mode", "rows", "metric", "score", "out_of_range", "ranges", "baselines"} == set(data)
    assert (data["task"], data["split"], data["mode"], data["rows"], data["metric"], data["out_of_range"]) == ("sst2", "dev", mode, 5, "accuracy", 0)
    assert set(data["baselines"]) == {"majority", "tfidf_logistic_regression"}


def test_command_diagnoses_a_model_that_leaves_every_range(model, tokenizer, sst2_folder, tmp_path):
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(1e4)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    result = run("--model", tmp_path / "model", "--task", "sst2", "--split", "dev", "--data-dir", sst2_folder, "--no-baselines", "--json")
    data = json.loads(result.stdout, parse_constant=pytest.fail)
    assert data["score"] == 0.0 and data["out_of_range"] > 0 and data["ranges"]["bert.pooler.activation"]["maximum"] is None


def test_command_prints_tables(directory, sst2_folder):
    result = run("--model", directory, "--task", "sst2", "--split", "dev", "--data-dir", sst2_folder, "--limit", 3, "--no-baselines")
    assert "3 rows, polynomial mode" in result.stdout and "0 values outside" in result.stdout


def test_encrypted_mode_counts_refused_sentences_as_wrong(directory, sst2_folder):
    common = ("--model", directory, "--task", "sst2", "--split", "dev", "--data-dir", sst2_folder, "--no-baselines", "--json")
    plain = json.loads(run(*common).stdout)
    encrypted = json.loads(run(*common, "--mode", "encrypted", "--backend", "simulator").stdout)
    assert (encrypted["score"], encrypted["agreement"], encrypted["refused"], encrypted["mode"]) == (plain["score"], 1.0, 0, "encrypted")
    assert encrypted["max_logit_error"] < 1e-2


def test_command_says_what_is_wrong(directory, sst2_folder, tmp_path):
    unknown = run("--model", directory, "--mode", "fast", "--task", "sst2", "--data-dir", sst2_folder)
    assert unknown.exit_code == 2 and all(name in unknown.output for name in ("--mode", "fast", "exact", "polynomial", "encrypted"))
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "there is no folder"), ("empty", "holds no config.json")):
        wrong = run("--model", tmp_path / name, "--task", "sst2", "--split", "dev", "--data-dir", sst2_folder)
        assert isinstance(wrong.exception, DataError) and message in str(wrong.exception)


def test_missing_scikit_learn_is_a_data_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        evaluation.baselines(ROWS, ROWS)
