"""EncryptedTrainer on the simulator: equal to its plaintext twin, transformers' conventions, resuming, and what is refused."""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_model import SENTENCES, save_tiny_model
from tiny_run import DATA, OPTIONS
from transformers import TrainerCallback

from hf_he.checkpoints import load_classifier
from hf_he.client import Client
from hf_he.data import TextDataset
from hf_he.errors import CheckpointError, DataError, ModelMismatchError, ParameterError, RangeError, RefreshError, TrainingError
from hf_he.evaluation import encode_texts
from hf_he.finetuning.arguments import EncryptedTrainingArguments
from hf_he.finetuning.checkpoint import CURRENT
from hf_he.finetuning.client import Answers
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.report import relative_error, report_of, twin_run
from hf_he.finetuning.server import FinetuneServer
from hf_he.finetuning.trainer import EncryptedTrainer

JSON_KEYS = {
    "backend", "steps", "losses", "losses_polynomial", "adapter_relative_error", "seconds_per_step", "by_op", "operations", "bootstraps_per_step",
    "peak_memory_gb", "score_before", "score_after",
}  # fmt: skip


def twin_of(trainer, steps=None):
    training = trainer.training
    steps = trainer.state.global_step if steps is None else steps
    return twin_run(trainer.model_folder, training.client.tokenizer, trainer.train_dataset, training.settings, trainer.step_rows, steps, trainer.args.seed)


def error_of(trainer):
    return relative_error(trainer.training.layout.values(trainer.model), twin_of(trainer).adapter)


class Seen(TrainerCallback):
    def __init__(self):
        self.events, self.logs = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def test_a_run_is_its_plaintext_twin_and_gives_back_a_plain_adapter(run_in_process, tiny):
    seen = Seen()
    trainer = run_in_process(callbacks=[seen])
    data, details = report_of(trainer)
    assert data.keys() == JSON_KEYS and json.dumps(data)
    np.testing.assert_allclose(data["losses"], data["losses_polynomial"], atol=1e-5)
    assert data["adapter_relative_error"] < 1e-4 and details.update_error < 1e-2
    assert data["steps"] == 2 and {"linear", "attention", "norm", "loss", "optimizer", "refresh"} <= data["by_op"].keys()
    assert details.refreshes_per_step <= details.planned_refreshes and data["operations"]["rotate"] > 0 == data["bootstraps_per_step"]

    assert seen.events == ["begin", 1, 2, "end"] and [entry["loss"] for entry in seen.logs] == data["losses"]
    assert {"loss", "learning_rate", "epoch", "step"} <= trainer.state.log_history[0].keys() and trainer.state.max_steps == 2

    folder = trainer.save_model()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    plain = PeftModel.from_pretrained(load_classifier(tiny).double(), folder)
    tokens = encode_texts(trainer.training.client.tokenizer, trainer.train_dataset)
    with torch.no_grad():
        expected = trainer.model(**tokens).logits
        torch.testing.assert_close(plain(**tokens).logits, expected)
        assert (load_classifier(tiny).double()(**tokens).logits - expected).abs().max() > 1e-3


def test_a_step_of_a_model_of_several_feature_blocks(tmp_path):
    model = save_tiny_model(tmp_path / "model", hidden_size=96, num_attention_heads=6, initializer_range=0.15)
    args = EncryptedTrainingArguments(str(tmp_path / "run"), **OPTIONS | {"max_steps": 1})
    EncryptedTrainer(model, args, DATA).prepare()
    with closing(FinetuneServer(model, tmp_path / "run" / "client" / "keys" / "evaluation.keys", tmp_path / "run" / "server")) as server:
        trainer = EncryptedTrainer(model, args, DATA, servers=[server])
        trainer.train(resume_from_checkpoint=True)
    assert trainer.training.packing.features == 32 and error_of(trainer) < 1e-4


def test_bootstrapping_needs_no_client(new_trainer, in_process):
    """Gradients are scaled up for the bootstraps' error, and the weights are refreshed in two iterations: after two steps the adapter's change
    is the twin's within 1e-2 (2e-2 of the whole adapter is asked for)."""
    options = {"refresh": "bootstrap", "per_device_train_batch_size": 5}
    new_trainer(**options).prepare()
    with in_process(refresh="bootstrap") as server:
        trainer = new_trainer(servers=[server], **options)
        trainer.train(resume_from_checkpoint=True)
    scale = trainer.training.settings.loss_scale
    assert scale > 1.0 and np.log2(scale) % 1.0 == 0.0
    logs, twin = [entry for entry in trainer.state.log_history if "loss" in entry], twin_of(trainer)
    assert all(entry["bootstraps"] > 10 and entry["refreshes"] == 0 for entry in logs)
    np.testing.assert_allclose([entry["loss"] for entry in logs], twin.losses, atol=2e-3)
    assert relative_error(trainer.training.layout.values(trainer.model), twin.adapter, twin.initial) < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"loss_location": "client", "optim": "sgd", "momentum": 0.5},
        {"optimizer_location": "client", "public_padding_mask": True},
        {"weight_decay": 0.1, "lora_rank": 1},
    ],
    ids=["loss-on-client", "optimizer-on-client", "weight-decay"],
)
def test_where_things_are_computed_does_not_change_the_result(run_in_process, options):
    trainer = run_in_process(**options)
    # the client's softmax is exact, the server's a polynomial
    assert error_of(trainer) < (1e-4 if options.get("loss_location") != "client" else 2e-2)
    assert [entry["bootstraps"] for entry in trainer.state.log_history] == [0, 0]


def test_a_run_resumes_with_both_sides_new(new_trainer, in_process):
    new_trainer(max_steps=3).prepare()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    for step in (1, 2, 3):
        with in_process() as server:
            assert server.describe()["training"]["step"] == (step - 1 if step > 1 else -1)
            trainer = new_trainer(servers=[server], callbacks=[Stop()], max_steps=3)
            trainer.train(resume_from_checkpoint=True)
            assert trainer.state.global_step == step and [entry["step"] for entry in trainer.state.log_history] == list(range(1, step + 1))
    assert error_of(trainer) < 1e-4
    np.testing.assert_allclose([entry["loss"] for entry in trainer.state.log_history], twin_of(trainer).losses, atol=1e-5)


def test_steps_are_idempotent_and_in_turn(new_trainer, in_process):
    starter = new_trainer()
    starter.prepare()
    training = starter.training
    texts, labels = SENTENCES, [1, 0, 1, 0, 1]
    with in_process() as server:
        (part,) = training.encrypt_step(1, texts, labels)
        with pytest.raises(TrainingError, match="no run has begun"):
            server.infer(part.data, training.answers(1, part.rows, labels))
        for _ in range(2):
            step, _ = training.read_adapter(server.infer(training.setup(), training.answers(0, [], [])))
            assert step == 0
        first = server.infer(part.data, training.answers(1, part.rows, labels))
        (again,) = training.encrypt_step(1, texts, labels)
        assert server.infer(again.data, training.answers(1, part.rows, labels)) == first
        (third,) = training.encrypt_step(3, texts, labels)
        with pytest.raises(TrainingError, match="step 3 was sent, step 1 is the last one finished"):
            server.infer(third.data, training.answers(3, third.rows, labels))
        with pytest.raises(TrainingError, match="holds run"):
            server.infer(training.setup(), training.answers(0, [], []))
    with in_process() as server:
        assert server.infer(again.data, training.answers(1, part.rows, labels)) == first


def test_a_failed_step_leaves_the_run_as_it_was(new_trainer, in_process):
    starter = new_trainer()
    starter.prepare()
    training, labels = starter.training, [1, 0, 1, 0, 1]
    with in_process() as server:
        server.infer(training.setup(), training.answers(0, [], []))
        (part,) = training.encrypt_step(1, SENTENCES, labels)
        answers, calls = training.answers(1, part.rows, labels), []

        def failing(data):
            calls.append(data)
            if len(calls) == 8:
                raise RefreshError("the client went away")
            return answers(data)

        with pytest.raises(RefreshError, match="went away"):
            server.infer(part.data, failing)
        first = server.infer(part.data, training.answers(1, part.rows, labels))
        logits, _ = training.read_result(first, 1, part.rows)
        tokens = encode_texts(training.client.tokenizer, TextDataset("mr", "train", tuple(SENTENCES), None, tuple(labels)))
        np.testing.assert_allclose(logits, training.model(**tokens).logits.detach().numpy(), atol=1e-4)
        _, adapter = training.read_adapter(server.infer(training.request(), failing))
    data = TextDataset("mr", "train", tuple(SENTENCES), None, tuple(labels))
    twin = twin_run(starter.model_folder, training.client.tokenizer, data, training.settings, lambda number: [0, 1, 2, 3, 4], 1, 0)
    assert relative_error(adapter, twin.adapter) < 1e-4


def test_a_run_with_a_value_out_of_range_cannot_be_resumed(new_trainer, in_process, monkeypatch):
    def clipped(self):
        raise RangeError("layer 0: a refreshed value was clipped")

    new_trainer().prepare()
    with in_process() as server:
        monkeypatch.setattr(Answers, "check", clipped)
        with pytest.raises(RangeError, match="clipped"):
            new_trainer(servers=[server]).train(resume_from_checkpoint=True)
        monkeypatch.undo()
        assert server.describe()["training"]["step"] == 1
        with pytest.raises(TrainingError, match=r"start again in another output folder \(layer 0: a refreshed value was clipped"):
            new_trainer(servers=[server]).train(resume_from_checkpoint=True)


def test_a_server_that_fell_back_repeats_the_step(new_trainer, in_process, run_in_process, tmp_path):
    run_in_process(max_steps=2)
    path = tmp_path / "run" / "server" / CURRENT
    path.write_bytes(path.read_bytes()[:-1])
    said = []
    with in_process(announce=said.append) as server:
        trainer = new_trainer(servers=[server], announce=said.append)
        trainer.train(resume_from_checkpoint=True)
    assert any("previous checkpoint, step 1" in line for line in said) and any("repeating step 2" in line for line in said)
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2] and error_of(trainer) < 1e-4


def test_the_trained_adapter_answers_encrypted_sentences(run_in_process, in_process, tmp_path):
    trainer = run_in_process()
    client = Client.from_pretrained(trainer.model_folder, keys=tmp_path / "run" / "client" / "keys")
    with in_process() as server:
        result = client.infer(server, SENTENCES)
    tokens = encode_texts(client.tokenizer, TextDataset("mr", "dev", tuple(SENTENCES), None, (0,) * 5))
    with torch.no_grad():
        expected = trainer.model(**tokens).logits.numpy()
    np.testing.assert_allclose([sentence.logits for sentence in result.sentences], expected, atol=1e-3)


class TestRefusals:
    def test_other_arguments_data_or_folders(self, new_trainer, in_process):
        new_trainer().prepare()
        with pytest.raises(CheckpointError, match="holds a run already"):
            new_trainer().prepare()
        with pytest.raises(CheckpointError, match="no run to resume"):
            new_trainer("other").train(resume_from_checkpoint=True)
        with pytest.raises(TrainingError, match=r"learning_rate is 1.0 now and was 0.004"):
            new_trainer(learning_rate=1.0).train(resume_from_checkpoint=True)
        with in_process() as server:
            new_trainer(servers=[server], max_steps=2).train(resume_from_checkpoint=True)
            changed = TextDataset("mr", "train", tuple(reversed(SENTENCES * 3)), None, tuple([1, 0, 1, 0, 1] * 3))
            with pytest.raises(TrainingError, match="data or their order changed"):
                new_trainer(servers=[server], data=changed).train(resume_from_checkpoint=True)

    def test_a_server_of_another_run(self, new_trainer, in_process):
        new_trainer("one").prepare()
        new_trainer("two").prepare()
        with in_process("one") as server:
            new_trainer("one", servers=[server]).train(resume_from_checkpoint=True)
            with pytest.raises(TrainingError, match="resume that run"):
                new_trainer("two", servers=[server]).train(resume_from_checkpoint=True)

    def test_data_without_columns_or_rows(self, new_trainer):
        with pytest.raises(DataError, match="needs the columns text"):
            new_trainer(data={"review": ["a"]})
        with pytest.raises(DataError, match="nothing to train on"):
            new_trainer(data=None).train()

    @pytest.mark.parametrize("label", [-1, 2, 0.5, float("nan"), "neutral", None])
    def test_labels_that_are_no_classes(self, new_trainer, label):
        data = TextDataset("mr", "train", tuple(SENTENCES), None, (1, 0, 1, 0, label))
        with pytest.raises(DataError, match="none of the model's classes 0 to 1"):
            new_trainer(data=data).prepare()

    def test_sentence_pairs(self, new_trainer):
        data = TextDataset("rte", "train", tuple(SENTENCES), tuple(SENTENCES), (1, 0, 1, 0, 1))
        with pytest.raises(DataError, match="rte has pairs"):
            new_trainer(data=data).prepare()

    def test_modules_that_the_model_lacks(self, new_trainer):
        with pytest.raises(ModelMismatchError, match="no modules nonsense"):
            new_trainer(target_modules=("nonsense",)).prepare()

    def test_keys_of_a_run_are_private(self, new_trainer, tmp_path):
        new_trainer().prepare()
        own = tmp_path / "run" / "client"
        assert own.stat().st_mode & 0o777 == 0o700 and (own / "run.json").stat().st_mode & 0o777 == 0o600
        settings = TrainingSettings.from_bytes(json.dumps(json.loads((own / "run.json").read_text())["settings"]).encode())
        assert settings.sequences == 10


@pytest.mark.parametrize("labels", [[1.0, 0.0, 1.0, 0.0, 1.0], ["positive", "negative", "positive", "negative", "positive"]], ids=["floats", "names"])
def test_labels_of_other_types_are_the_same_classes(run_in_process, labels):
    data = {"text": SENTENCES * 3, "label": labels * 3}
    losses = [[entry["loss"] for entry in run_in_process(f"run{number}", data=data).state.log_history] for number, data in enumerate((DATA, data))]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-6)


@pytest.mark.parametrize("labels", [(4, 0, 1, 2, 3), (0.5, 1, -2.0, 3.0, 4.0)], ids=["ints", "floats"])
def test_a_single_output_learns_numbers(new_trainer, tmp_path, labels):
    args = EncryptedTrainingArguments(str(tmp_path / "run"), **OPTIONS | {"target_modules": ("value",)})
    data = {"text": SENTENCES, "label": list(labels)}
    model = save_tiny_model(tmp_path / "model", id2label={0: "score"}, label2id={"score": 0})
    trainer = EncryptedTrainer(model, args, data, data)
    trainer.prepare()
    assert trainer.train_dataset.labels == labels and trainer.evaluate().keys() >= {"eval_pearson"}


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_datasets_dataset_works(new_trainer, in_process, form):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"sentence": SENTENCES * 3, "label": [1, 0, 1, 0, 1] * 3}).with_format(form)
    trainer = new_trainer(data=rows)
    assert trainer.train_dataset.first == tuple(SENTENCES * 3) and trainer.train_dataset.labels[:2] == (1, 0)
    assert type(trainer.train_dataset.labels[0]) is int


class TestOneFeaturePerCiphertext:
    @pytest.mark.parametrize(
        "options",
        [{}, {"loss_location": "client", "optimizer_location": "client", "public_padding_mask": True}],
        ids=["on-server", "on-client"],
    )
    def test_a_run_is_its_plaintext_twin(self, run_in_process, in_process, tmp_path, options):
        trainer = run_in_process(features=1, **options)
        assert trainer.training.packing.features == 1 and trainer.training.layout.total == sum(map(np.prod, trainer.training.layout.shapes.values()))
        assert error_of(trainer) < (1e-4 if not options else 2e-2)
        assert trainer.report["operations"]["linear_combination"] > 0
        with in_process() as server:
            assert server.describe()["features_per_ciphertext"] == [1]
            client = Client.from_pretrained(trainer.model_folder, keys=tmp_path / "run" / "client" / "keys")
            result = client.infer(server, SENTENCES)
        tokens = encode_texts(client.tokenizer, TextDataset("mr", "dev", tuple(SENTENCES), None, (0,) * 5))
        with torch.no_grad():
            expected = trainer.model(**tokens).logits.numpy()
        np.testing.assert_allclose([sentence.logits for sentence in result.sentences], expected, atol=1e-3)

    def test_it_resumes_with_both_sides_new(self, new_trainer, in_process):
        new_trainer(features=1).prepare()

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = True

        for step, features in ((1, 1), (2, None)):
            with in_process() as server:
                trainer = new_trainer(servers=[server], callbacks=[Stop()], features=features)
                trainer.train(resume_from_checkpoint=True)
                assert (trainer.state.global_step, trainer.training.packing.features) == (step, 1)
        assert error_of(trainer) < 1e-4
        with pytest.raises(TrainingError, match="features is 32 now and was 1"):
            new_trainer(features=32).train(resume_from_checkpoint=True)

    def test_the_planner_chooses_and_says_why(self, new_trainer):
        for size, features in ((10, 32), (256, 1)):
            said = []
            trainer = new_trainer(f"run-{size}", announce=said.append, per_device_train_batch_size=size, calibration_steps=1)
            trainer.prepare()
            assert trainer.training.packing.features == features == trainer.training.settings.features
            assert any(line.startswith("packing: ") and f"{size} sequences: with 32 a ciphertext" in line for line in said)

    def test_other_packings_are_refused(self, new_trainer, in_process):
        with pytest.raises(ParameterError, match="32 or 1 features"):
            new_trainer(features=16).prepare()
        new_trainer().prepare()
        trainer = new_trainer()
        trainer._open(resume=True)
        training = trainer.training
        training.settings = replace(training.settings, features=16)
        with in_process() as server:
            with pytest.raises(ParameterError, match="packed with 32 or 1 features per ciphertext, not 16"):
                server.infer(training.setup(), training.answers(0, [], []))
            assert server.describe()["training"] == {"step": -1} and server.packing.features == 32
