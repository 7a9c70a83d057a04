"""Wrong input to the command line: one line that names the fix, no traceback, and an exit status that scripts can use."""

import errno
from types import SimpleNamespace

import pytest
import typer
from safetensors import SafetensorError
from tiny_model import save_tiny_model
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from hf_he import Client, HEGPTNeoXConfig, HEGPTNeoXForCausalLM, __version__, cli, errors
from hf_he.scripts import demo
from hf_he.scripts.display import data_size


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def test_commands_are_grouped_and_the_version_is_shown():
    output = invoke("--help").output
    assert [output.index(panel) for panel in (cli.CLASSIFY, cli.TRAIN, cli.CLEAR, cli.COST)] == sorted(output.index(panel) for panel in (
        cli.CLASSIFY, cli.TRAIN, cli.CLEAR, cli.COST))  # fmt: skip
    shown = invoke("--version")
    assert shown.exit_code == 0 and shown.output.split() == ["hf-he", __version__]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("demo", "--refresh", "magic"), ("--refresh", "client", "bootstrap")),
        (("infer", "x.enc", "--refresh", "magic"), ("--refresh", "client", "bootstrap")),
        (("generate", "--prompt", "a", "--kernel", "magic"), ("--kernel", "gaussian_kernel", "power_softmax")),
        (("generate", "--prompt", "a", "--select", "magic"), ("--select", "client", "server")),
        (("generate", "--prompt", "a", "--top-p", "3"), ("--top-p",)),
        (("generate", "--prompt", "a", "--temperature", "-1"), ("--temperature",)),
        (("evaluate", "--mode", "magic"), ("--mode", "exact", "polynomial", "encrypted")),
        (("evaluate", "--split", "magic"), ("--split", "test", "dev", "train")),
        (("convert", "bert-tiny", "--out", "x", "--attention-kernel", "magic"), ("--attention-kernel", "power_softmax")),
        (("finetune", "--refresh", "magic"), ("--refresh", "client", "bootstrap")),
        (("finetune", "--optimizer-location", "moon"), ("--optimizer-location", "server", "client")),
        (("finetune", "--learning-rate", "-1"), ("--learning-rate",)),
        (("finetune", "--epochs", "-1"), ("--epochs",)),
        (("serve", "--evaluation-keys", "x", "--port", "99999"), ("--port", "65535")),
    ],
    ids=lambda value: value[-2] if isinstance(value, tuple) and len(value) > 1 else "",
)
def test_a_wrong_option_names_what_is_allowed_and_exits_with_2(arguments, names):
    result = invoke(*arguments)
    assert result.exit_code == 2 and all(name in result.output for name in names), result.output


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.DataError("pass another file"), "DataError: pass another file"),
        (ModuleNotFoundError("No module named 'fastapi'", name="fastapi"), "pip install 'hf-he[serve]'"),
        (ModuleNotFoundError("No module named 'sklearn.linear_model'", name="sklearn.linear_model"), "pip install 'hf-he[train]'"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), "Permission denied: out/x"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "make room"),
    ],
    ids=["ours", "serve", "train", "permission", "full", "full-file", "full-safetensors"],
)
def test_foreseen_errors_end_in_one_line(error, message, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 1 and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(("command", "hint"), [("finetune", "--resume"), ("train", "the same command goes on"), ("demo", "interrupted\n")])
def test_an_interruption_is_one_line_that_says_how_to_go_on(command, hint, monkeypatch, capsys):
    app = typer.Typer()
    app.callback()(lambda: None)

    @app.command(command)
    def run():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("sys.argv", ["hf-he", command])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 130 and shown.strip().startswith("interrupted") and hint in shown


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_source_that_is_no_model_is_refused_by_name(tmp_path):
    result = invoke("convert", tmp_path / "none", "--out", tmp_path / "out")
    assert isinstance(result.exception, errors.DataError) and "neither a folder with a saved BERT" in str(result.exception)


def test_a_model_without_tokenizer_files_is_refused_instead_of_reading_unknown_words(tmp_path):
    """transformers makes tokenizers of BERT and GPT-NeoX from nothing, of special tokens alone."""
    model, decoder, stock = save_tiny_model(tmp_path / "model"), tmp_path / "decoder", tmp_path / "stock"
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    HEGPTNeoXForCausalLM(HEGPTNeoXConfig(**size)).save_pretrained(decoder)
    BertForSequenceClassification(BertConfig(**size)).save_pretrained(stock)
    for path in model.glob("tokenizer*"):
        path.unlink()
    failed = [
        invoke("evaluate", "--model", model, "--no-baselines"),
        invoke("evaluate", "--task", "lm", "--mode", "exact", "--model", decoder),
        invoke("convert", stock, "--out", tmp_path / "out"),
    ]
    for result in failed:
        assert isinstance(result.exception, errors.DataError) and "holds no tokenizer files" in str(result.exception), result.output
    with pytest.raises(errors.DataError, match="holds no tokenizer files"):
        Client.from_pretrained(model, backend="simulator")


DAMAGED = {
    "no weights": ("model.safetensors", None, "no usable"),
    "weights": ("model.safetensors", b"\x10", "no usable"),
    "config": ("config.json", b"{", "config.json is not readable JSON"),
    "tokenizer": ("tokenizer.json", b"{}", "no usable tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("command", ["evaluate", "lm", "convert"])
def test_damaged_models_are_typed_errors(command, damage, tmp_path):
    model, (name, content, message) = save_tiny_model(tmp_path / "model"), DAMAGED[damage]
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    if command == "lm":
        HEGPTNeoXForCausalLM(HEGPTNeoXConfig(**size)).save_pretrained(model)
    elif command == "convert":
        BertForSequenceClassification(BertConfig(**size)).save_pretrained(model)
        message = "neither a folder with a saved BERT" if damage == "config" else message
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content)
    arguments = {
        "evaluate": ("evaluate", "--model", model, "--no-baselines"),
        "lm": ("evaluate", "--task", "lm", "--mode", "exact", "--model", model),
        "convert": ("convert", model, "--out", tmp_path / "out"),
    }
    result = invoke(*arguments[command])
    assert isinstance(result.exception, (errors.DataError, errors.CorruptFileError)) and message in str(result.exception)


def test_other_bad_input_is_a_typed_error_too(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "dev.tsv").write_text("sentence\tlabel\n")
    result = invoke("evaluate", "--task", "sst2", "--split", "dev", "--data-dir", tmp_path)
    assert isinstance(result.exception, errors.DataError) and "holds no rows" in str(result.exception)
    for option in ("--tokens", "--priced"):
        result = invoke("bench", "attention", option, "32,a")
        assert result.exit_code == 2 and option in result.output and "whole numbers" in result.output
    stock = tmp_path / "stock"
    BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).save_pretrained(stock)
    result = invoke("evaluate", "--model", stock)
    assert isinstance(result.exception, errors.DataError) and "has no polynomial mode: convert it" in str(result.exception)


def test_an_empty_prompt_is_refused_before_anything_else():
    result = invoke("generate", "--prompt", "", "--backend", "simulator")
    assert isinstance(result.exception, errors.DataError) and "the prompt is empty" in str(result.exception)


def test_sizes_are_shown_as_people_read_them():
    assert [data_size(size) for size in (812, 3_140, 252_400_000, 999_600, 2_870_000_000)] == ["812 B", "3.14 kB", "252 MB", "1 MB", "2.87 GB"]


@pytest.mark.parametrize(("gigabytes", "policy", "warned"), [(8, "bootstrap", True), (8, "client", False), (64, "bootstrap", False)])
def test_the_demo_says_before_it_starts_when_memory_is_short(gigabytes, policy, warned, monkeypatch, capsys):
    monkeypatch.setattr(demo.psutil, "virtual_memory", lambda: SimpleNamespace(available=gigabytes * 1e9))
    demo._check_memory("auto", policy)
    assert ("--refresh client 3 GB are enough" in capsys.readouterr().err) == warned
