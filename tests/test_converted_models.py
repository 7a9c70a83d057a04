"""What `hf-he convert --calibrate` writes runs under encryption and trains there, with every kernel that has a polynomial form."""

import pytest
import torch
from tiny_model import SENTENCES, WORDS
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertTokenizer, GPTNeoXConfig, LlamaConfig
from typer.testing import CliRunner

from hf_he import Client, EncryptedTrainer, EncryptedTrainingArguments, FinetuneServer, Server
from hf_he.cli import app
from hf_he.data import TextDataset
from hf_he.errors import UnsupportedModelError


@pytest.mark.parametrize("kernel", ["gaussian_kernel", "normalized_gaussian_kernel", "power_softmax"])
def test_converted_and_calibrated_it_runs_and_trains_encrypted(kernel, tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    size = {"vocab_size": len(vocabulary), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**size, max_position_embeddings=32, initializer_range=0.1)).save_pretrained(tmp_path / "stock")
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(tmp_path / "stock")
    (tmp_path / "text").write_text("\n".join(SENTENCES), encoding="utf-8")
    model, arguments = tmp_path / "model", ("convert", tmp_path / "stock", "--attention-kernel", kernel, "--calibrate", tmp_path / "text")
    made = CliRunner().invoke(app, [*map(str, arguments), "--out", str(model)], catch_exceptions=False)
    assert made.exit_code == 0 and "polynomial mode" in made.output
    assert AutoConfig.from_pretrained(model).power_softmax_length_agnostic is (kernel != "gaussian_kernel")

    client = Client.from_pretrained(model, backend="simulator")
    result = client.infer(Server(model, client.keygen().evaluation), SENTENCES)
    assert result.agreement == 1.0 and result.max_logit_error < 1e-3

    args = EncryptedTrainingArguments(str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, backend="simulator", disable_tqdm=True)
    data = TextDataset("mr", "train", tuple(SENTENCES[:4]), None, (1, 0, 1, 0))
    keys = EncryptedTrainer(model, args, data).prepare()
    server = FinetuneServer(model, keys, tmp_path / "run" / "server")
    try:
        trainer = EncryptedTrainer(model, args, data, servers=[server])
        trainer.train(resume_from_checkpoint=True)
    finally:
        server.close()
    with torch.no_grad():
        encoded = client.tokenizer(SENTENCES[:4], padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        expected = client.model(**encoded, labels=torch.tensor(data.labels)).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("decoder, converter", [(GPTNeoXConfig, "convert_gpt_neox"), (LlamaConfig, "convert_llama")])
def test_decoders_are_sent_to_their_converter(decoder, converter, tmp_path):
    decoder().save_pretrained(tmp_path / "stock")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "stock"), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UnsupportedModelError)
    assert f"hf_he.{converter} as in recipes/your_own/README.md" in str(result.exception) and not (tmp_path / "out").exists()
