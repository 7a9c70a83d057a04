"""Where machine code is kept, and what happens where it cannot be."""

import os
import subprocess
import sys

import pytest

from hf_he.ckks import jit

# The module alone: importing the package takes seconds.
SCRIPT = """
import importlib.util
import sys

spec = importlib.util.spec_from_file_location("jit", sys.argv[1])
jit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jit)

@jit.kernel
def twice(x):
    return 2 * x

@jit.kernel
def thrice(x):
    return 3 * x

before = jit.has_compiled()
print(twice(21), thrice(14), before, jit.has_compiled(), jit.cache_folder())
"""


def run(folder, **variables):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "HF_HE_CACHE", "PYTHONWARNINGS")} | variables
    done = subprocess.run([sys.executable, script, jit.__file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done, [path.name for path in folder.rglob("*.nb?")]


@pytest.mark.parametrize("variable", ["HF_HE_CACHE", "NUMBA_CACHE_DIR"])
def test_without_a_writable_folder_nothing_is_cached_and_one_warning_names_the_variable(variable, tmp_path):
    (tmp_path / "file").touch()
    done, cached = run(tmp_path, **{variable: str(tmp_path / "file" / "cache")})
    assert done.stdout.startswith("42 42 False False ") and cached == []
    assert done.stderr.count("RuntimeWarning: cannot write to") == 1 and f"Set {variable} to a folder" in done.stderr


def test_machine_code_is_kept_in_the_folder_of_these_sources(tmp_path):
    done, cached = run(tmp_path, HF_HE_CACHE=str(tmp_path / "cache"))
    folder = done.stdout.split()[-1]
    assert done.stdout.startswith("42 42 False True ")
    assert folder.startswith(str(tmp_path / "cache" / "kernels-")) and "RuntimeWarning" not in done.stderr
    assert len(cached) == 4 == sum(len([f for f in files if ".nb" in f]) for _, _, files in os.walk(folder))
