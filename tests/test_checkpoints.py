"""Saved models: found by folder or name, and refused for a task that they were not trained for."""

import json
from pathlib import Path

import pytest
from tiny_model import save_tiny_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_he.checkpoints import default_decoder, default_model, find_model, load_classifier, load_tokenizer, model_fingerprint
from hf_he.errors import ApproximationError, CorruptFileError, DataError
from hf_he.generation.model import load_decoder


def test_a_model_is_found_by_folder_or_by_name(tmp_path):
    assert find_model("he-bert-tiny-mr") == default_model() and find_model("he-gpt-neox-tiny/power_softmax") == default_decoder("power_softmax")
    assert find_model(default_model()) == default_model() and find_model("no-such-model") == Path("no-such-model")
    (tmp_path / "config.json").write_text("{}")
    assert find_model(tmp_path) == tmp_path


def test_models_of_another_task_are_refused_instead_of_getting_a_random_head():
    with pytest.raises(DataError, match="holds HEGPTNeoXForCausalLM, and this needs a classifier"):
        load_classifier(default_decoder())
    with pytest.raises(DataError, match="holds HEBertForSequenceClassification, and this needs a decoder"):
        load_decoder(default_model())


def test_folders_that_are_not_there_and_stock_models_say_what_to_give(tmp_path):
    for load in (load_tokenizer, load_classifier, load_decoder, model_fingerprint):
        with pytest.raises(DataError, match=r"there is no folder .*nowhere: give that of a saved model"):
            load(tmp_path / "nowhere")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    with pytest.raises(DataError, match=r"bert holds a stock bert, .*: convert it by `hf-he convert .*bert --out FOLDER --calibrate TEXT`"):
        load_classifier(tmp_path / "bert")
    with pytest.raises(DataError, match=r"holds a stock llama, .*: convert it by hf_he.convert_llama"):
        load_decoder(tmp_path / "llama")


@pytest.mark.parametrize("value", [[], [1.0], None, "ab", 3])
def test_an_interval_that_is_none_is_a_typed_error(value, tmp_path):
    config = save_tiny_model(tmp_path) / "config.json"
    written = json.loads(config.read_text())
    next(iter(written["approximations"].values()))["interval"] = value
    config.write_text(json.dumps(written))
    with pytest.raises((ApproximationError, CorruptFileError)):
        load_classifier(tmp_path)


def test_loading_here_shows_no_progress_bar_and_leaves_those_of_others(capsys):
    logging.enable_progress_bar()
    load_classifier(default_model())
    load_decoder(default_decoder())
    assert "Loading weights" not in capsys.readouterr().err and logging.is_progress_bar_enabled()
