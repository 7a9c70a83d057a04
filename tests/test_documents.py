"""Python blocks of the documents, as pasted, on the simulator; the shipped models, as loaded by whoever passes no dtype; scripts of the recipes."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from tiny_model import SENTENCES, WORDS
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from hf_he import backends
from hf_he.checkpoints import MODEL_CARDS

ROOT = MODEL_CARDS.parent
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
FOLDERS = sorted(path.parent for path in MODEL_CARDS.rglob("config.json"))
BLOCKS = {
    f"{folder.relative_to(ROOT)}, {number}": block
    for folder in (ROOT, *FOLDERS)
    for number, block in enumerate(PYTHON.findall((folder / "README.md").read_text(encoding="utf-8")))
}
SCRIPTS = [path for path in sorted((ROOT / "recipes").rglob("*.py")) if "from hf_he" in path.read_text(encoding="utf-8")]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("name", BLOCKS)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    (tmp_path / "model_cards").symlink_to(MODEL_CARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "simulator")
    if "llama_directory" in BLOCKS[name]:
        LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZE)).save_pretrained("llama")
    exec(BLOCKS[name], {"llama_directory": "llama"})


def test_your_own_model_and_data(tmp_path, monkeypatch, capsys):
    """The page as a whole, on a stock BERT and a stock Llama, random and tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(backends, "DEFAULT_BACKEND", "simulator")
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained("my-bert")
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **SIZE)).save_pretrained("my-bert")
    for name in ("reviews.csv", "private.csv"):
        rows = [f'"{sentence}",{label}' for sentence, label in zip(SENTENCES * 8, (1, 0) * 20, strict=True)]
        Path(name).write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_CARDS / "he-gpt-neox-tiny" / "gaussian_kernel")
    tokenizer.save_pretrained("my-llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=1, **SIZE)).save_pretrained("my-llama")
    Path("letters.txt").write_text("My dear sister, an unexpected delight came to us after two hours of rain. " * 60, encoding="utf-8")
    names = {}
    exec("\n".join(PYTHON.findall((ROOT / "recipes" / "your_own" / "README.md").read_text(encoding="utf-8"))), names)
    assert names["result"].agreement == 1.0 and names["result"].max_logit_error < 1e-3
    assert names["client"].last.max_logit_error < 1e-3
    assert Path("out/run/adapter/adapter_model.safetensors").is_file()
    assert "; 0 values outside an interval" in capsys.readouterr().out


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_models_compute_in_a_pipeline(folder):
    task, options = ("text-classification", {}) if "bert" in folder.name else ("text-generation", {"max_new_tokens": 2})
    made = pipeline(task, model=str(folder))
    assert made.model.dtype == torch.float32 and made.model.config.mode == "polynomial"
    assert made("a film", **options)[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_of_the_recipes_find_what_they_import(script):
    assert callable(runpy.run_path(script, run_name="imported")["main"])
