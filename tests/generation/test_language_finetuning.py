"""A decoder fine-tuned on encrypted text, and generation with the adapter as it is: client and server, in one process and in several."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_decoder import save_tiny_decoder
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_he import GenerationClient, GenerationServer, encrypted_generate
from hf_he.cli import app
from hf_he.errors import CheckpointError, CorruptFileError, DataError, ModelMismatchError, ParameterError, RangeError, RefreshError, TrainingError
from hf_he.finetuning.client_folder import RUN_FILE
from hf_he.finetuning.language import LOSSES_FILE, EncryptedTextTrainer, text_windows
from hf_he.finetuning.language_protocol import LanguageStep
from hf_he.finetuning.language_server import LanguageFinetuneServer
from hf_he.finetuning.language_step import next_token_loss
from hf_he.finetuning.protocol import LOSS, Question
from hf_he.generation.model import load_decoder
from hf_he.keys import Keys
from hf_he.serialization import write_file

CONTEXT = 8
TEXT = "the old ship sailed to the cold sea and the wind rose by night on a long dark day far to home and the ship sank"
OPTIONS = {"steps": 2, "learning_rate": 0.5, "batch_size": 2, "context": CONTEXT, "backend": "simulator"}


@pytest.fixture(scope="module", params=["gaussian", "power"])
def decoder(request, tmp_path_factory):
    return save_tiny_decoder(tmp_path_factory.mktemp(request.param) / "model", kernel=request.param)


@pytest.fixture
def trainer(decoder, tmp_path):
    """Trainers of one run, the server in this process."""
    servers = []

    def build(**changes):
        options = OPTIONS | changes
        prepared = EncryptedTextTrainer(decoder, TEXT, tmp_path / "run", **options)
        for server in servers:
            server.close()
        servers[:] = [LanguageFinetuneServer(decoder, prepared.prepare(), tmp_path / "run" / "server", context=CONTEXT)]
        prepared._server = servers[0]
        return prepared

    yield build
    for server in servers:
        server.close()


def test_the_adapter_and_the_losses_are_the_twins(trainer):
    found = trainer()
    report = found.train()
    np.testing.assert_allclose(report["losses"], report["losses_polynomial"], atol=1e-4)
    assert report["update_relative_error"] < 1e-3 and report["steps"] == 2
    assert np.ptp(report["losses"]) > 1e-4 or report["losses"][0] != report["losses"][1]
    assert report["refreshes_per_step"] > 0 and json.dumps(report)


def test_generation_with_the_adapter_as_training_left_it(trainer, decoder, tmp_path):
    found = trainer(optimizer="adamw", learning_rate=0.02)
    report = found.train()
    assert report["update_relative_error"] < 1e-2
    assert_generates_as(found.twin.model, decoder, found.client, tmp_path / "run")


def assert_generates_as(tuned, decoder, client, run):
    """With the encrypted adapter of a finished run, the tokens are those of the plaintext model `tuned`."""
    adapter, keys = run / "encrypted_adapter", run / "client" / "keys"
    user = GenerationClient(decoder, client.backend, Keys.load(keys), adapter=adapter, context=CONTEXT)
    user.server = GenerationServer(decoder, keys / "evaluation.keys", adapter=adapter, context=CONTEXT)
    inputs = AutoTokenizer.from_pretrained(decoder)("the old ship", return_tensors="pt")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = user.model.generate(**inputs, **settings, custom_generate=encrypted_generate, client=user)
    assert tokens.tolist() == tuned.generate(**inputs, **settings).tolist()
    assert user.last.max_logit_error < 1e-3


def test_a_llama_with_grouped_keys_from_the_command_line(tmp_path):
    decoder, run = save_tiny_decoder(tmp_path / "model", architecture="llama"), tmp_path / "run"
    (tmp_path / "text").write_text(TEXT)
    command = ["finetune", "--encrypted", "--task", "lm", "--text", tmp_path / "text", "--model", decoder, "--backend", "simulator", "--output-dir", run]
    command += ["--max-steps", 1, "--batch-size", 2, "--context", CONTEXT, "--learning-rate", 0.05, "--json"]
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert json.loads(result.stdout)["update_relative_error"] < 1e-3
    tuned = PeftModel.from_pretrained(load_decoder(decoder).double(), run / "adapter").eval()
    assert tuned.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj"}
    assert_generates_as(tuned, decoder, GenerationClient.from_pretrained(decoder, backend="simulator", context=CONTEXT), run)
    with pytest.raises(ModelMismatchError, match="no modules keys to adapt: its linear layers are q_proj, k_proj, v_proj, o_proj, gate_proj"):
        CliRunner().invoke(app, list(map(str, [*command, "--output-dir", tmp_path / "other", "--target-modules", "q_proj, keys"])), catch_exceptions=False)


def test_resuming_goes_on_after_the_last_finished_step(trainer):
    first = trainer()
    first._batch, taken = (lambda step: stop(step, type(first)._batch(first, step))), []

    def stop(step, batch):
        taken.append(step)
        if step == 2:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer()
    assert len(second.losses) == 1
    report = second.train()
    assert report["update_relative_error"] < 1e-3 and len(report["losses"]) == 2


def test_a_step_that_only_the_server_remembers_has_its_true_loss(trainer, monkeypatch):
    """The client dies between the server's checkpoint and its own file of losses; the server answers the repeated step without a question."""
    first = trainer()

    def full_disk(path, data, **options):
        if path.name == LOSSES_FILE and len(json.loads(data)) == 2:
            raise OSError("no space left")
        write_file(path, data, **options)

    monkeypatch.setattr("hf_he.finetuning.language.write_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        first.train()
    monkeypatch.undo()
    second = trainer()
    assert len(second.losses) == 1 and second._server.describe()["training"]["step"] == 2
    report = second.train()
    np.testing.assert_allclose(report["losses"], report["losses_polynomial"], atol=1e-4)


class TestResuming:
    @pytest.mark.parametrize(
        "changes", [{"learning_rate": 0.25}, {"rank": 1}, {"momentum": 0.5}, {"optimizer": "adamw"}, {"batch_size": 1}, {"steps": 3}], ids=str
    )
    def test_other_arguments_are_refused(self, trainer, changes):
        trainer()
        name = next(iter(changes)).replace("batch_size", "sequences")
        with pytest.raises(TrainingError, match=f"{name} is .* now and was .*: resume with the arguments it began with"):
            trainer(**changes)

    def test_a_finished_run_does_not_grow(self, trainer):
        trainer().train()
        assert len(trainer().train()["losses"]) == 2
        with pytest.raises(TrainingError, match="has finished its 2 steps: begin one of 20 in another output folder"):
            trainer(steps=20)

    def test_a_value_out_of_range_ends_the_run(self, trainer, monkeypatch):
        def clipped(self):
            raise RangeError("layer 0: a refreshed value was clipped")

        monkeypatch.setattr("hf_he.finetuning.language_client.TextAnswers.check", clipped)
        with pytest.raises(RangeError, match="clipped"):
            trainer().train()
        monkeypatch.undo()
        with pytest.raises(TrainingError, match="start again in another output folder"):
            trainer()

    def test_another_seed_is_another_order(self, trainer):
        trainer().train()
        with pytest.raises(TrainingError, match="data or their order changed"):
            trainer(seed=1).train()

    def test_a_server_without_its_folder_is_no_new_run(self, trainer, tmp_path):
        trainer().train()
        shutil.rmtree(tmp_path / "run" / "server")
        with pytest.raises(CheckpointError, match="folder is empty, this client is at step 2: give the server the folder of this run"):
            trainer().train()

    def test_a_server_one_step_behind_repeats_it_and_further_behind_is_refused(self, trainer):
        found, lines = trainer(), []
        found.train()
        found._announce, found.losses = lines.append, [*found.losses, 1.0]
        assert len(found.train()["losses"]) == 2 and lines == ["the server fell back to step 2: repeating step 3"]
        found.losses = [*found.losses, 1.0, 1.0]
        with pytest.raises(CheckpointError, match="server is at step 2, this client at 4"):
            found.train()

    @pytest.mark.parametrize("damage", [b"{", b"[[]]", b'{"run": 1}', b"\xff"], ids=str)
    def test_damaged_files_are_named(self, trainer, tmp_path, damage):
        trainer().train()
        for name in (LOSSES_FILE, RUN_FILE):
            (tmp_path / "run" / "client" / name).write_bytes(damage)
            with pytest.raises(CorruptFileError, match=f"{name} is not readable: start the run again in another folder"):
                trainer()


def test_the_decrypted_adapter_is_the_clients_alone(trainer, tmp_path):
    trainer().train()
    for folder in (".", "client", "adapter"):
        assert (tmp_path / "run" / folder).stat().st_mode & 0o077 == 0


def test_what_does_not_fit_is_refused(trainer, decoder, tmp_path):
    found = trainer()
    with pytest.raises(TrainingError, match="context of 8"):
        EncryptedTextTrainer(decoder, TEXT, tmp_path / "run", **(OPTIONS | {"context": 16}))
    for size in (0, 2.5):
        with pytest.raises(ParameterError, match="batch_size"):
            EncryptedTextTrainer(decoder, TEXT, tmp_path / "other", **(OPTIONS | {"batch_size": size}))
    training, server = found.training, found._server
    windows, lengths = found._batch(1)
    with pytest.raises(TrainingError, match="no run has begun"):
        server.open(training.encrypt_windows(1, windows, lengths))
    found.train()
    with pytest.raises(TrainingError, match="step 4"):
        server.open(training.encrypt_windows(4, windows, lengths))
    message = LanguageStep.from_bytes(training.encrypt_windows(3, windows, lengths))
    with pytest.raises(TrainingError, match="batch size"):
        server.open(replace(message, sequences=60000).to_bytes())
    with pytest.raises(CorruptFileError):
        server.open(replace(message, batches=2).to_bytes())
    with pytest.raises(DataError, match="predicts"):
        training.encrypt_windows(3, windows[:1], torch.tensor([1]))
    with pytest.raises(CheckpointError, match="different runs"):
        other = trainer()
        other.losses = []
        other.train()


def test_questions_out_of_place_are_not_answered(trainer):
    found = trainer()
    training, (windows, lengths) = found.training, found._batch(1)
    hidden = training.backend.encrypt(np.zeros((training.loss_blocks, training.packing.slots)), found.client.keys.secret)
    answers = training.text_answers(1, windows, lengths)
    for question in (Question(LOSS, 2, 0, training.backend.serialize(hidden)), Question(LOSS, 1, 5, training.backend.serialize(hidden))):
        with pytest.raises(RefreshError, match="not this client's part"):
            answers(question.to_bytes())
    once = Question(LOSS, 1, 0, training.backend.serialize(hidden)).to_bytes()
    answers(once)
    with pytest.raises(RefreshError, match="twice"):
        answers(once)


def test_lanes_without_a_window_have_no_gradient(trainer):
    found = trainer()
    training, (windows, lengths) = found.training, found._batch(1)
    values = np.random.default_rng(0).normal(size=(training.loss_blocks, training.packing.slots))
    gradient = training.text_answers(1, windows, lengths)._loss(values, 0).reshape(training.packing.tokens, training.packing.sequences, -1)
    assert np.abs(gradient[:, : len(windows)]).max() > 0 and not gradient[:, len(windows) :].any() and not gradient[-1].any()


def test_heads_and_unknown_modules_get_no_adapter(decoder, tmp_path):
    for targets, match in ((("lm_head",), "head of a decoder"), (("nonsense",), "no modules nonsense")):
        with pytest.raises(ModelMismatchError, match=match):
            EncryptedTextTrainer(decoder, TEXT, tmp_path / "run", **OPTIONS, target_modules=targets)


def test_windows_and_their_loss():
    windows, lengths = text_windows(range(10, 31), 8)
    assert windows.shape == (3, 8) and lengths.tolist() == [8, 8, 5] and windows[2].tolist() == [26, 27, 28, 29, 30, 10, 11, 12]
    logits = torch.randn(3, 8, 40, dtype=torch.float64)
    summed, tokens = next_token_loss(logits, windows, lengths)
    expected = -sum(logits[n, t].log_softmax(-1)[windows[n, t + 1]] for n in range(3) for t in range(int(lengths[n]) - 1))
    assert tokens == 18 and torch.isclose(summed, expected)
    assert text_windows([1, 2, 3], 8)[1].tolist() == [3] and text_windows(range(9), 8)[1].tolist() == [8]
    with pytest.raises(DataError, match="less than two"):
        text_windows([5], 8)


def test_texts_beyond_the_fitted_ranges_are_refused(decoder, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise RangeError("layer 0: too large")

    monkeypatch.setattr("hf_he.models.he_gpt_neox.modeling_he_gpt_neox.HEGPTNeoXForCausalLM.forward", refuse)
    with pytest.raises(RangeError, match="every window"):
        EncryptedTextTrainer(decoder, TEXT, tmp_path / "run", **OPTIONS)


def test_rates_that_leave_the_fitted_ranges_are_refused_before_any_key(decoder, tmp_path):
    with pytest.raises(RangeError, match="lower the learning rate, now 100"):
        EncryptedTextTrainer(decoder, TEXT, tmp_path / "run", **(OPTIONS | {"steps": 6, "learning_rate": 100.0})).train()
    assert not (tmp_path / "run").exists()


def test_a_server_process_without_the_secret_key(tmp_path):
    lines, decoder = [], save_tiny_decoder(tmp_path / "model")
    report = EncryptedTextTrainer(decoder, TEXT, tmp_path / "run", **(OPTIONS | {"steps": 1}), announce=lines.append).train()
    assert report["update_relative_error"] < 1e-3 and any("a process with" in line for line in lines)
    assert not list((tmp_path / "run" / "server").rglob("*secret*"))
