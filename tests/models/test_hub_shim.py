"""A saved checkpoint loads in a fresh process: after `import hf_he`, through the shim without it, and says what to install otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from hf_he import HEBertConfig, HEBertForSequenceClassification, save_hub_shim

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({path!r}, **{kwargs})
print(type(model).__module__, type(model).__name__, model(torch.tensor([[5, 6, 7]])).logits.tolist())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = HEBertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20)
    HEBertForSequenceClassification(config).eval().save_pretrained(path)
    return path


def python(code, tmp_path, *, with_package=True):
    """Run `code` in a fresh interpreter; without the package, an import hook hides it."""
    if not with_package:
        hide = "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
        hide += "        if name.split('.')[0] == 'hf_he':\n            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        code = hide + "sys.meta_path.insert(0, Hide())\n" + code
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


def test_shim_is_three_lines_and_in_the_config(checkpoint):
    assert (checkpoint / "modeling_hf_he.py").read_text().count("\n") == 3
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "modeling_hf_he.HEBertConfig",
        "AutoModel": "modeling_hf_he.HEBertModel",
        "AutoModelForMaskedLM": "modeling_hf_he.HEBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_hf_he.HEBertForSequenceClassification",
    }


def test_shim_for_a_bare_config(tmp_path):
    config = HEBertConfig()
    assert save_hub_shim(tmp_path / "new", config).is_file()
    assert config.auto_map["AutoModel"] == "modeling_hf_he.HEBertModel"


def test_loads_after_import(checkpoint, tmp_path):
    result = python("import hf_he" + LOAD.format(path=str(checkpoint), kwargs={}), tmp_path)
    assert result.stdout.startswith("hf_he.models.he_bert.modeling_he_bert HEBertForSequenceClassification"), result.stderr


def test_loads_through_the_shim_without_import(checkpoint, tmp_path):
    through_shim = python(LOAD.format(path=str(checkpoint), kwargs={"trust_remote_code": True}), tmp_path)
    imported = python("import hf_he" + LOAD.format(path=str(checkpoint), kwargs={}), tmp_path)
    assert through_shim.returncode == 0, through_shim.stderr
    assert through_shim.stdout == imported.stdout


def test_without_the_package_the_user_is_told_what_to_install(checkpoint, tmp_path):
    result = python(LOAD.format(path=str(checkpoint), kwargs={"trust_remote_code": True}), tmp_path, with_package=False)
    assert result.returncode != 0
    assert "hf_he" in result.stderr and "pip install hf_he" in result.stderr


def test_without_import_or_trust_nothing_runs(checkpoint, tmp_path):
    result = python(LOAD.format(path=str(checkpoint), kwargs={"trust_remote_code": False}), tmp_path)
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr


def test_tokenizer_and_pipeline_find_their_classes(checkpoint, tmp_path):
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))])}
    BertTokenizer(vocab=vocabulary).save_pretrained(checkpoint)
    code = f"import hf_he\nfrom transformers import pipeline\nprint(pipeline('text-classification', {str(checkpoint)!r})('w1 w2'))"
    result = python(code, tmp_path)
    assert "LABEL_" in result.stdout, result.stderr


def test_importing_the_package_does_not_import_the_encrypted_side(tmp_path):
    loaded = python("import sys, hf_he\nprint([m for m in sys.modules if m.startswith(('hf_he.ckks', 'hf_he.backends', 'numba'))])", tmp_path)
    assert loaded.stdout.strip() == "[]", loaded.stderr
