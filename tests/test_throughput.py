"""One feature per ciphertext between client and server: the planner's choice, two processes, bounded messages, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from laboratory import Lab
from tiny_model import SENTENCES

from hf_he.client import Client
from hf_he.errors import CorruptFileError, DataError, ParameterError
from hf_he.keys import ServerKeys
from hf_he.local_server import local_server
from hf_he.protocol import EncryptedBatch, EncryptedResult
from hf_he.refresh import LARGEST_REFRESH, ClientRefresh
from hf_he.server import Server

FEATURES = 32
LANES = 256
"""Sequences of 32 tokens in 8,192 slots."""


@pytest.fixture(scope="module")
def wide(model, client):
    return Client.from_pretrained(model, keys=client.keys, features=1)


@pytest.fixture(scope="module")
def batch(wide):
    return wide.encrypt(wide.prepare(SENTENCES))


def test_two_processes_and_the_planner(model, client, tmp_path, monkeypatch):
    """The same keys serve both packings; as few sentences as pay are packed one feature per ciphertext."""
    monkeypatch.setattr("hf_he.remote.PIECE_BYTES", 2**17)
    client.keys.save(tmp_path)
    count = next(n for n in range(1, LANES + 1) if client.choose(n).packing.features == 1)
    texts = [SENTENCES[i % len(SENTENCES)] for i in range(count)]
    seen = []
    with local_server(model, tmp_path / "evaluation.keys") as remote:
        assert remote.describe()["features_per_ciphertext"] == [FEATURES, 1]
        result = client.infer(remote, texts, progress=seen.append)
    assert result.agreement == 1.0 and result.max_logit_error < 1e-3 and len(result.answered) == count
    assert len(result.report["seconds_by_batch"]) == 1 and "linear_combination" in result.report["operations"]
    sent = [event["bytes"] for event in seen if event["state"] == "sending"]
    assert len(sent) > 1 and sent == list(range(0, seen[0]["of_bytes"], 2**17))


def test_the_choice_depends_on_the_batch_the_server_and_the_user(client, wide):
    few, many = client.choose(2), client.choose(LANES)
    assert (few.packing.features, many.packing.features) == (FEATURES, 1) and f"{LANES} sequences" in many.reason
    assert client.choose(LANES, offered=[FEATURES]).packing.features == FEATURES
    assert wide.choose(2).packing.features == 1 and "asked for" in wide.choose(2).reason
    with pytest.raises(ParameterError, match="32 or 1 features"):
        Client.from_pretrained(client.directory, backend="simulator", features=16)


def test_results_of_either_packing_are_the_same(client, wide, server, batch):
    assert batch.features == 1 and EncryptedBatch.from_bytes(batch.to_bytes()).features == 1
    sentences = wide.prepare(SENTENCES)
    result = client.run(server, batch)
    assert EncryptedResult.from_bytes(result.to_bytes()).features == result.features == 1
    narrow = client.infer(server, SENTENCES)
    for one, other in zip(client.decrypt(result, sentences), narrow.sentences, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-3)


def test_keys_that_lack_a_rotation_are_not_used_for_it(model, client, wide, batch):
    evaluation = client.keys.evaluation
    steps = evaluation.evaluation.rotations
    plan = wide.choose(2).plan
    without = replace(evaluation.evaluation, rotations=steps - {next(iter(plan.rotations))})
    low = replace(evaluation.evaluation, levels=dict.fromkeys(steps, 0))
    for damaged in (without, low):
        server = Server(model, ServerKeys(evaluation.backend, evaluation.parameters, damaged))
        assert server.describe()["features_per_ciphertext"] == [FEATURES]
        with pytest.raises(ParameterError, match="take 32: encrypt with"):
            server.open(batch.to_bytes())


def test_what_does_not_fit_its_packing_is_refused(client, server, batch):
    with pytest.raises(CorruptFileError, match=r"shape \(1, 1\), got \(1, 32\)"):
        server.open(replace(batch, features=FEATURES).to_bytes())
    with pytest.raises(ParameterError, match="take 32 or 1"):
        server.open(replace(batch, features=16).to_bytes())
    with pytest.raises(ParameterError, match="a message holds 15: split it"):
        server.open(replace(batch, batches=16).to_bytes())
    for text in ("", "0", "-1", "1" * 7, "one"):
        with pytest.raises(CorruptFileError, match="how many features"):
            EncryptedBatch.from_bytes(replace(batch, features=text).to_bytes())
    result = client.run(server, batch)
    with pytest.raises(CorruptFileError, match="16 features"):
        client.decrypt(replace(result, features=16), client.prepare(SENTENCES))

    class Confused:
        def infer(self, data, refresh, progress=None):
            return replace(result, features=FEATURES, batch_id=batch.batch_id).to_bytes()

    with pytest.raises(CorruptFileError, match="another batch"):
        client.run(Confused(), batch)


def test_a_message_is_bounded(wide, monkeypatch):
    monkeypatch.setattr("hf_he.protocol.MAX_CIPHERTEXTS", FEATURES + 1)
    sentence = wide.prepare(SENTENCES[:1])[0]
    with pytest.raises(DataError, match=rf"{LANES + 1} sentences are more than one message holds \({LANES}\)"):
        wide.encrypt([sentence] * (LANES + 1))


def test_refreshes_of_many_ciphertexts_go_in_several_messages():
    lab = Lab(rotations=())
    sizes = []

    def answer(data: bytes) -> bytes:
        sizes.append(lab.backend.deserialize(data, "ciphertext").count)
        return lab.refresh(data)

    values = lab.random(2, LARGEST_REFRESH + 1, lab.packing.slots)
    tired = lab.backend.encrypt(values.numpy(), lab.secret, 0)
    fresh = ClientRefresh(answer).refresh(lab.backend, tired, 5)
    assert sizes == [LARGEST_REFRESH, LARGEST_REFRESH, 2] and fresh.batch_shape == tired.batch_shape and fresh.level >= 5
    torch.testing.assert_close(torch.from_numpy(lab.backend.decrypt(fresh, lab.secret)), values, atol=1e-5, rtol=0)
