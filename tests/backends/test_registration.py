"""A backend of another package: found by its entry point, by the command line and by the server process too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_he.backends import BACKENDS, available_backends, backend_class, get_backend
from hf_he.ckks.parameters import parameter_set
from hf_he.errors import BackendUnavailableError

HERE = Path(__file__).parent


@pytest.fixture
def installed(tmp_path):
    """A folder of installed packages with one whose backends are called as asked."""

    def install(**points: str) -> Path:
        folder = tmp_path / "fifth-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fifth\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[hf_he.backends]", *lines]) + "\n")
        return tmp_path

    return install


def test_found_by_name(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed(fifth="fifth:FifthBackend"))
    assert available_backends()["fifth"] == (True, "available")
    assert get_backend("fifth", parameter_set("n13")).name == "fifth"
    with pytest.raises(BackendUnavailableError, match="desilo, fifth"):
        backend_class("sixth")


def test_our_names_stay_ours_and_broken_ones_are_named(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed(native="fifth:FifthBackend", broken="no_such_module:Backend"))
    assert backend_class("native").__module__ == BACKENDS["native"].partition(":")[0]
    with pytest.raises(BackendUnavailableError, match="the broken backend cannot be imported"):
        backend_class("broken")
    assert not available_backends()["broken"][0]


def test_a_whole_demo_runs_on_it(installed):
    """Client and server are processes of their own; the model's handlers, planner and wire know nothing of this backend."""
    paths = [str(installed(fifth="fifth:FifthBackend")), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "hf_he", "demo", "--backend", "fifth", "--refresh", "client", "--num-sentences", "2", "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["backend"], data["agreement"]) == ("fifth", 1.0)
