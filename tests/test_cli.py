"""The command line: help without torch, the file commands one after another, the demo, and errors without tracebacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import SENTENCES, save_tiny_model
from typer.testing import CliRunner

from hf_he import backends, errors
from hf_he.ckks.parameters import PARAMETER_SETS
from hf_he.cli import app, main
from hf_he.scripts import demo

COMMANDS = ("demo", "keygen", "encrypt", "infer", "decrypt", "serve", "publish", "plan", "env", "train", "convert", "evaluate", "finetune", "bench")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(SENTENCES) + "\n\n", encoding="utf-8")
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_help_of_every_command_needs_neither_torch_nor_transformers():
    program = """
import contextlib, io, sys
import hf_he_cli
for command in sys.argv[1:]:
    sys.argv = ["hf-he", *([command] if command != "-" else []), "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        hf_he_cli.main()
    assert "Usage" in output.getvalue(), command
assert not {"torch", "transformers", "numba"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program, "-", *COMMANDS], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_file_commands(model, text, tmp_path):
    keys, encrypted = tmp_path / "keys", tmp_path / "batch.enc"
    run("keygen", "--model", model, "--out", keys, "--backend", "simulator")
    assert sorted(path.name for path in keys.iterdir()) == ["evaluation.keys", "public.key", "secret.key"]
    with pytest.raises(errors.ParameterError, match="holds a secret key already"):
        run("keygen", "--model", model, "--out", keys, "--backend", "simulator")
    run("encrypt", text, "--model", model, "--keys", keys, "--out", encrypted)
    assert not any(word.encode() in encrypted.read_bytes() for word in ("film", "acting"))

    inferred = json.loads(run("infer", encrypted, "--model", model, "--keys", keys, "--json"))
    assert [sentence["text"] for sentence in inferred["sentences"]] == SENTENCES
    assert inferred["agreement"] == 1.0 and inferred["accuracy"] is None and inferred["bytes"]["ciphertext_in"] == encrypted.stat().st_size

    decrypted = json.loads(run("decrypt", tmp_path / "batch.result", "--model", model, "--keys", keys, "--json"))
    assert decrypted["sentences"] == inferred["sentences"]
    assert "agreement with plaintext 100.0%" in run("decrypt", tmp_path / "batch.result", "--model", model, "--keys", keys)

    (keys / "batches" / next((keys / "batches").iterdir()).name).unlink()
    with pytest.raises(errors.DataError, match="the sentences of this batch are unknown"):
        run("decrypt", tmp_path / "batch.result", "--model", model, "--keys", keys)


def test_demo_prints_the_json_contract(model, text, tmp_path):
    trace = tmp_path / "trace.txt"
    data = json.loads(run("demo", "--model", model, "--backend", "simulator", "--text", text, "--num-sentences", 3, "--json", "--trace", trace))
    assert data["backend"] == "simulator" and len(data["sentences"]) == 3 and data["agreement"] == 1.0
    assert all(value > 0 for value in data["bytes"].values())
    assert all(data["seconds"][name] > 0 for name in ("keygen", "encrypt", "server", "decrypt", "total"))
    assert "refresh encrypt" not in trace.read_text() and "linear rotate" in trace.read_text()


def test_demo_prints_tables(model, text):
    output = run("demo", "--model", model, "--backend", "simulator", "--text", text, "--refresh", "client")
    for expected in (SENTENCES[0], "negative", "Server time by operation", "attention", "Server time by primitive", "rotate", "peak memory", "128 bits"):
        assert expected in output


def test_demo_fails_when_predictions_differ(model, text, monkeypatch):
    from hf_he.results import InferenceResult
    from hf_he.scripts import demo

    monkeypatch.setattr(InferenceResult, "agreement", property(lambda self: 0.98))
    monkeypatch.setattr(demo, "local_server", in_this_process)
    run("demo", "--model", model, "--backend", "simulator", "--text", text, "--refresh", "client", "--json", code=1)


@pytest.mark.parametrize(("parameters", "policy"), [("n14", "client"), ("n16-bootstrap", "bootstrap")])
def test_plan_needs_no_keys(model, parameters, policy):
    data = json.loads(run("plan", "--model", model, "--parameters", parameters, "--json"))
    assert data["refresh"] == policy and all(refresh["ciphertexts"] > 0 for refresh in data["refreshes"])
    assert {row["kind"] for row in data["placement"]} == {"attention", "norm", "activation"}
    assert data["key_bytes"]["model"]["count"] == 1 + len(data["rotations"]) and sum(data["seconds"].values()) > 0
    assert ("bootstrapping" in data["key_bytes"]) == (policy == "bootstrap")
    assert "Placement of a batch" in run("plan", "--model", model, "--parameters", parameters)


def test_demo_says_when_the_parameters_do_not_bootstrap(model, text):
    with pytest.raises(errors.BackendUnavailableError, match="--refresh client"):
        run("demo", "--model", model, "--backend", "simulator", "--parameters", "n14", "--text", text, "--refresh", "bootstrap")


def test_demo_needs_no_client_unless_told_otherwise(model, text):
    data = json.loads(run("demo", "--model", model, "--backend", "simulator", "--text", text, "--json"))
    assert data["refreshes"] == 0 < data["bootstraps"] and data["agreement"] == 1.0
    data = json.loads(run("demo", "--model", model, "--backend", "simulator", "--text", text, "--parameters", "n14", "--json"))
    assert data["refreshes"] > 0 == data["bootstraps"] and data["agreement"] == 1.0


def test_the_demo_bootstraps_where_it_can():
    from hf_he.scripts.demo import choose_policy

    for backend in ("auto", "native", "simulator"):
        assert choose_policy(backend, None, None) == ("n16-bootstrap", "bootstrap")
        assert choose_policy(backend, None, "client") == ("n14", "client")
        assert choose_policy(backend, "n15", None) == ("n15", "client")
        assert choose_policy(backend, "n16-bootstrap", None) == ("n16-bootstrap", "bootstrap")
        assert choose_policy(backend, "n16-bootstrap", "client") == ("n16-bootstrap", "client")
    assert choose_policy("fhelium", None, None) == ("n14", "client") and choose_policy("desilo", None, None) == ("n14-6", "client")
    assert choose_policy("fhelium", None, "bootstrap") == ("n16-bootstrap", "bootstrap")


def test_env_names_every_backend_and_parameter_set():
    data = json.loads(run("env", "--json"))
    assert data["parameter_sets"].keys() == PARAMETER_SETS.keys()
    assert all(entry["security_bits"] == 128 and entry["log2_qp"] <= entry["log2_qp_limit"] for entry in data["parameter_sets"].values())
    assert data["backends"]["simulator"] == {"available": True, "reason": "available"}
    table = run("env")
    assert "n14" in table
    shown = "".join(table.replace("│", "").split())
    assert all("".join(entry["reason"].split()) in shown for entry in data["backends"].values()), "brackets are text, not markup"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("decrypt", "missing.result", "--keys", "missing"), "CorruptFileError: cannot read the secret-key file"),
        (("keygen", "--parameters", "n99"), "ParameterError: unknown parameter set 'n99'"),
        (("infer", "missing.enc", "--flooding", "0.1"), "ParameterError: only --json shows logits here"),
        (("serve", "--evaluation-keys", "missing.keys"), "CorruptFileError: cannot read the evaluation-key file"),
    ],
    ids=["no-keys", "unknown-parameters", "no-logits", "no-evaluation-keys"],
)
def test_errors_are_one_line_with_the_fix(model, arguments, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-he", *arguments, "--model", str(model)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(error)


def test_text_files_are_checked(model, tmp_path):
    from hf_he.scripts.files import read_sentences

    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in (("none.txt", "cannot read"), ("empty.txt", "no sentences"), ("latin.txt", "not UTF-8")):
        with pytest.raises(errors.DataError, match=message):
            read_sentences(tmp_path / name)


class in_this_process:
    """Stands in for the server process."""

    url = "here"

    def __init__(self, model, evaluation_keys, refresh):
        from hf_he.server import Server

        self.server = Server(model, evaluation_keys, refresh=refresh)

    def __enter__(self):
        self.server.url = self.url
        return self.server

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(("backend", "device", "number"), [("native", None, 32), ("simulator", None, 32), ("desilo", None, 2), ("desilo", "cuda", 32)])
def test_demos_of_slow_backends_are_reduced_on_a_cpu_and_say_so(backend, device, number, capsys, monkeypatch):
    monkeypatch.setattr(backends, "_default_device", device)
    assert demo.default_number(backend) == number
    said = capsys.readouterr().err
    assert ("reduced size: 2 sentences" in said) == (number == 2) and ("--num-sentences" in said) == (number == 2)
