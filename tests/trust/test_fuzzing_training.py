"""Messages and checkpoints of encrypted training under seeded mutations: only typed errors, and the run goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mutation import NUMBERS, Outcomes, damaged, generator, json_value, sealed
from tiny_model import SENTENCES, save_tiny_model

from hf_he.client import Client
from hf_he.errors import RangeError, SecretKeyOnServerError
from hf_he.finetuning.checkpoint import Checkpoint
from hf_he.finetuning.client import TrainingClient
from hf_he.finetuning.protocol import (
    LOSS,
    AdapterRequest,
    EncryptedAdapterMessage,
    Question,
    RunId,
    StepResult,
    TrainingSettings,
    TrainingSetup,
    TrainingStep,
)
from hf_he.finetuning.server import FinetuneServer

LABELS = [1, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    client = Client.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")), backend="simulator", parameters="n14")
    settings = TrainingSettings(target_modules=("value",), rank=1, steps=3, sequences=5, loss_location="client", optimizer_location="client")
    training = TrainingClient(client, settings, RunId("a" * 16, "b" * 32))
    training.keygen()
    return training


@pytest.fixture(scope="module")
def server(training, tmp_path_factory):
    server = FinetuneServer(training.client.directory, training.client.keys.evaluation, tmp_path_factory.mktemp("server"))
    server.infer(training.setup(), training.answers(0, [], []))
    yield server
    server.close()


@pytest.fixture(scope="module")
def step(training):
    return training.encrypt_step(1, SENTENCES, LABELS)[0]


@pytest.fixture(scope="module")
def questions(training, server, step):
    """What a real step asks, by kind."""
    asked, answers = [], training.answers(1, step.rows, LABELS)

    def note(data):
        asked.append(data)
        return answers(data)

    result = server.infer(step.data, note)
    return {"result": result, "questions": [data for data in asked if b"training_question" in data[:600]]}


def mutated(data, kind, rng):
    return damaged(data, rng) if rng.random() < 0.4 else sealed(data, kind, rng)


def test_messages(training, server, step, questions):
    messages = {
        "training_setup": (TrainingSetup, training.setup()),
        "training_step": (TrainingStep, step.data),
        "training_result": (StepResult, questions["result"]),
        "adapter_request": (AdapterRequest, training.request()),
        "encrypted_adapter": (EncryptedAdapterMessage, server.infer(training.request(), training.answers(0, [], []))),
        "training_question": (Question, questions["questions"][0]),
    }
    for kind, (message, data) in messages.items():
        rng, outcomes = generator(kind), Outcomes()
        for _ in range(150):
            how, bad = mutated(data, kind, rng)
            with outcomes.expect(f"{kind} {how}"):
                assert message.from_bytes(bad).to_bytes()
        assert outcomes["CorruptFileError"] > outcomes["inputs"] / 3, (kind, outcomes)


def test_settings(training):
    rng, outcomes = generator("settings"), Outcomes()
    good = json.loads(training.settings.to_bytes())
    for _ in range(1500):
        values = json_value(good, rng) if rng.random() < 0.7 else good | {rng.choice(sorted(good)): rng.choice(NUMBERS)}
        with outcomes.expect(f"settings {str(values)[:200]}"):
            found = TrainingSettings.from_bytes(json.dumps(values).encode())
            assert TrainingSettings.from_bytes(found.to_bytes()) == found
    assert outcomes["accepted"] and outcomes["CorruptFileError"] and outcomes["ParameterError"]


def test_the_server_refuses_and_goes_on(training, server, step, questions):
    rng, outcomes = generator("training server"), Outcomes()
    before = server.describe()["training"]
    message = TrainingStep.from_bytes(step.data)
    fields = ("embeddings", "labels", "sequence_weights", "attention_mask")
    for _ in range(300):
        if rng.random() < 0.5:
            how, bad = mutated(step.data, "training_step", rng)
        else:
            field = rng.choice(fields)
            how, inner = mutated(getattr(message, field), "ciphertext", rng)
            bad = replace(message, **{field: inner}).to_bytes()
        with outcomes.expect(f"step {how}"):
            server.open(bad)
    for kind, data in (("training_setup", training.setup()), ("adapter_request", training.request())):
        for _ in range(60):
            how, bad = mutated(data, kind, rng)
            with outcomes.expect(f"{kind} {how}"):
                server.open(bad)
    for other in (b"", b"x", questions["result"], questions["questions"][0]):
        with outcomes.expect("another message", must_fail=True):
            server.open(other)
    assert server.describe()["training"] == before and outcomes["accepted"] < outcomes["inputs"] / 2


def test_hostile_answers_to_questions(training, server):
    """A client that answers a step with rubbish gets a typed error; the run stays at its step."""
    rng, outcomes = generator("answers"), Outcomes()
    (second,) = training.encrypt_step(2, SENTENCES, LABELS)
    for _ in range(12):
        honest, spoiled = training.answers(2, second.rows, LABELS), []

        def answer(data, honest=honest, spoiled=spoiled):
            fresh = honest(data)
            if spoiled or rng.random() > 0.2:
                return fresh
            spoiled.append(True)
            return mutated(fresh, "ciphertext", rng)[1]

        before = server.describe()["training"]["step"]
        with outcomes.expect("a spoiled answer"):
            server.infer(second.data, answer)
            continue
        assert server.describe()["training"]["step"] == before


def test_hostile_questions(training, step, questions):
    """Whatever a server asks in a step, the client answers with a ciphertext of its own or a typed error, a bounded number of times."""
    rng, outcomes = generator("questions"), Outcomes()
    for data in questions["questions"]:
        for _ in range(40):
            how, bad = mutated(data, "training_question", rng)
            if rng.random() < 0.5:
                question = Question.from_bytes(data)
                how, inner = mutated(question.ciphertext, "ciphertext", rng)
                bad = replace(question, ciphertext=inner).to_bytes()
            with outcomes.expect(f"question {how}"):
                answer = training.backend.deserialize(training.answers(1, step.rows, LABELS)(bad), "ciphertext")
                assert answer.key_id == training.client.keys.key_id and answer.level == training.backend.parameters.max_level
    assert outcomes["inputs"] > outcomes["accepted"]


def test_results_and_adapters_are_checked_before_they_are_believed(training, server, step, questions):
    rng, outcomes = generator("results"), Outcomes()
    result = StepResult.from_bytes(questions["result"])
    adapter = EncryptedAdapterMessage.from_bytes(server.infer(training.request(), training.answers(0, [], [])))
    for _ in range(150):
        how, inner = mutated(result.logits, "ciphertext", rng)
        with outcomes.expect(f"logits {how}"):
            logits, _ = training.read_result(replace(result, logits=inner).to_bytes(), 1, step.rows)
            assert np.isfinite(logits).all()
        how, inner = mutated(adapter.weights, "ciphertext", rng)
        with outcomes.expect(f"adapter {how}"):
            _, state = training.read_adapter(replace(adapter, weights=inner).to_bytes())
            assert all(values.isfinite().all() for values in state.values())


def test_logits_of_any_size_are_answered_by_one_path_and_reported_at_the_end(training, server, step):
    """As refresh requests are, whatever the server encrypts."""
    backend, secret, sizes = training.backend, training.client.keys.secret, set()
    for value in (0.01, 1e9):
        answers = training.answers(1, step.rows, LABELS)
        chosen = backend.serialize(backend.encrypt(np.full((training.loss_blocks, backend.parameters.slots), value), secret))
        answer = answers(Question(LOSS, 1, 0, chosen).to_bytes())
        assert np.abs(backend.decrypt(backend.deserialize(answer, "ciphertext"), secret)).max() < 1.1
        sizes.add(len(answer))
    assert len(sizes) == 1
    with pytest.raises(RangeError, match="do not trust the server"):
        answers.check()


def test_no_secret_key_reaches_a_training_server(training, server, tmp_path):
    for handed in (training.client.keys, training.client.keys.secret, training.backend.serialize(training.client.keys.secret, allow_secret=True)):
        with pytest.raises(SecretKeyOnServerError):
            FinetuneServer(training.client.directory, handed, tmp_path)
    with pytest.raises(SecretKeyOnServerError, match="consider that key lost"):
        server.open(training.backend.serialize(training.client.keys.secret, allow_secret=True))


def test_checkpoints(server):
    rng, outcomes = generator("checkpoints"), Outcomes()
    data = server._checkpoint.to_bytes()
    for _ in range(300):
        how, bad = mutated(data, "finetune_checkpoint", rng)
        with outcomes.expect(f"checkpoint {how}"):
            Checkpoint.from_bytes(bad)
    assert outcomes["CorruptFileError"] > outcomes["inputs"] / 3
