"""Python blocks of the documents, as pasted, on the simulator; the shipped models, as loaded by whoever passes no dtype; scripts of the recipes."""

import re
import runpy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

from hf_he import backends
from hf_he.checkpoints import MODEL_CARDS

ROOT = MODEL_CARDS.parent
FOLDERS = sorted(path.parent for path in MODEL_CARDS.rglob("config.json"))
BLOCKS = {
    f"{folder.relative_to(ROOT)}, {number}": block
    for folder in (ROOT, *FOLDERS)
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL))
}
SCRIPTS = [path for path in sorted((ROOT / "recipes").rglob("*.py")) if "from hf_he" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", BLOCKS)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    (tmp_path / "model_cards").symlink_to(MODEL_CARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "simulator")
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    if "llama_directory" in BLOCKS[name]:
        LlamaForCausalLM(LlamaConfig(**size)).save_pretrained("llama")
    exec(BLOCKS[name], {"llama_directory": "llama"})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_models_compute_in_a_pipeline(folder):
    task, options = ("text-classification", {}) if "bert" in folder.name else ("text-generation", {"max_new_tokens": 2})
    made = pipeline(task, model=str(folder))
    assert made.model.dtype == torch.float32 and made.model.config.mode == "polynomial"
    assert made("a film", **options)[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_of_the_recipes_find_what_they_import(script):
    assert callable(runpy.run_path(script, run_name="imported")["main"])
