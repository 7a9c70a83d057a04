"""Where backends run: `--device`, and errors that say what to do where there is no such device."""

import sys

import pytest
import torch
from typer.testing import CliRunner

import hf_he
from hf_he import backends, local_server
from hf_he.backends import default_device, get_backend, set_default_device
from hf_he.bench.model import versions
from hf_he.ckks.parameters import parameter_set
from hf_he.cli import app
from hf_he.errors import BackendUnavailableError, HEError, ParameterError

NO_CUDA = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.setattr(backends, "_default_device", None)


@pytest.mark.parametrize("name", ["native", "simulator"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cpu_backends_refuse_cuda_and_name_the_way_out(name, device):
    with pytest.raises(BackendUnavailableError, match=f"the {name} backend runs on a CPU only: .*--backend fhelium.* for {device}"):
        get_backend(name, parameter_set("n13"), device)
    set_default_device(device)
    with pytest.raises(BackendUnavailableError, match="CPU only"):
        get_backend(name, parameter_set("n13"))
    assert get_backend(name, parameter_set("n13"), "cpu").name == name


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "", "mps", "cpu:0"])
def test_what_is_no_device(device):
    with pytest.raises(ParameterError, match="cpu, cuda or cuda:N"):
        set_default_device(device)
    assert default_device() is None
    if device:
        with pytest.raises(ParameterError, match="cpu, cuda or cuda:N"):
            get_backend("simulator", parameter_set("n13"), device)


@pytest.mark.parametrize("name", ["fhelium", "desilo"])
def test_cuda_where_there_is_none(name):
    if not backends.available_backends()[name][0]:
        with pytest.raises(BackendUnavailableError, match="not installed"):
            get_backend(name, parameter_set("n14-6"), "cuda")
    elif NO_CUDA:
        with pytest.raises(BackendUnavailableError, match=r"CUDA.*--device cpu|--device cpu.*CUDA"):
            get_backend(name, parameter_set("n14-6"), "cuda:3")


@pytest.mark.parametrize(
    ("package", "number", "runs"), [("desilofhe", "2.0.1", True), ("desilofhe_cu132", "2.0.0", True), ("desilofhe_cu130", "1.17.0", False)]
)
def test_the_packages_of_desilo_for_cuda_count(package, number, runs, tmp_path, monkeypatch):
    folder = tmp_path / f"{package}-{number}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
    (tmp_path / "desilofhe.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    available, said = backends.available_backends()["desilo"]
    assert available == runs and number in said and ("non-commercial" in said if runs else "written for 2.0" in said)
    assert versions("desilo", "cpu")["desilofhe"] == number


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["infer", "batch.enc"],
        ["serve", "--evaluation-keys", "evaluation.keys"],
        ["generate", "--prompt", "x"],
        ["finetune", "--encrypted"],
        ["bench", "model"],
    ],
    ids=" ".join,
)
def test_every_command_takes_a_device(arguments):
    result = CliRunner().invoke(app, [*arguments, "--device", "tpu"])
    assert isinstance(result.exception, HEError) and "cpu, cuda or cuda:N" in str(result.exception)


def test_the_server_process_runs_where_its_client_does(monkeypatch):
    commands = []

    def refuse(command, **options):
        commands.append(command)
        raise HEError("not started")

    monkeypatch.setattr(local_server.subprocess, "Popen", refuse)
    for device in (None, "cuda:1"):
        hf_he.set_default_device(device)
        with pytest.raises(HEError, match="not started"), local_server.local_server("model", "keys"):
            pass
    assert "--device" not in commands[0] and commands[0][0] == sys.executable
    assert commands[1][-2:] == ["--device", "cuda:1"]
