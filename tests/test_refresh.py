"""Ciphertexts without levels: what the client answers and refuses, and bootstrapping in its place."""

import numpy as np
import pytest
from tiny_model import SENTENCES, keyed_client

from hf_he.client import MAX_REFRESHES_PER_BATCH, Client
from hf_he.errors import BackendUnavailableError, ParameterError, RefreshError, WrongKeyError
from hf_he.server import Server


class TestRefresh:
    def test_the_client_answers_with_a_fresh_ciphertext_of_the_same_values(self, client):
        backend = client.backend
        values = np.linspace(-1, 1, backend.parameters.slots)[None]
        tired = backend.encrypt(values, client.keys.secret, level=1)
        fresh = backend.deserialize(client.refresher(1)(backend.serialize(tired)), "ciphertext")
        assert fresh.level == backend.parameters.max_level
        assert np.abs(backend.decrypt(fresh, client.keys.secret) - values).max() < 1e-6

    def test_it_is_bounded_and_answers_for_its_own_key_only(self, model, client):
        backend = client.backend
        question = backend.serialize(backend.encrypt(np.zeros((1, backend.parameters.slots)), client.keys.secret, level=1))
        with pytest.raises(WrongKeyError):
            keyed_client(model).refresher(1)(question)
        refresh = client.refresher(1)
        for _ in range(MAX_REFRESHES_PER_BATCH):
            refresh(question)
        with pytest.raises(RefreshError, match="do not trust it"):
            refresh(question)

    def test_an_error_of_the_client_ends_the_job_and_not_the_server(self, client, remote, batch):
        def broken(data):
            raise RefreshError("the client gives up")

        with pytest.raises(RefreshError, match="gives up"):
            remote.infer(batch.to_bytes(), broken)
        with pytest.raises(RefreshError, match="not a ciphertext"):
            remote.infer(batch.to_bytes(), lambda data: data[:-1])
        assert client.infer(remote, SENTENCES).agreement == 1.0

    def test_with_bootstrapping_keys_the_server_needs_no_client(self, model, tmp_path):
        client = Client.from_pretrained(model, backend="simulator", parameters="n16-bootstrap")
        client.keygen(bootstrapping=True).save(tmp_path)
        server = Server(model, tmp_path / "evaluation.keys", refresh="bootstrap")
        data = client.infer(server, SENTENCES).to_json()
        assert data["refreshes"] == 0 and data["bootstraps"] > 0 and data["operations"]["bootstrap"] == data["bootstraps"]
        assert data["agreement"] == 1.0 and data["max_logit_error"] < 1e-2

    def test_two_batches_share_their_bootstraps(self, model, tmp_path):
        client = Client.from_pretrained(model, backend="simulator", parameters="n16-bootstrap")
        client.keygen(bootstrapping=True).save(tmp_path)
        server = Server(model, tmp_path / "evaluation.keys", refresh="bootstrap")
        alone = client.infer(server, SENTENCES[:1]).report["operations"]["bootstrap"]
        lanes = client.packing.sequences
        result = client.infer(server, (SENTENCES * lanes)[: 2 * lanes + 1])
        runs = [count for _, primitive, _, count in result.report["trace"] if primitive == "bootstrap"]
        assert result.agreement == 1.0 and len(result.report["seconds_by_batch"]) == 3
        assert runs == [2] * alone + [1] * alone

    def test_parameters_that_do_not_bootstrap(self, model, client):
        with pytest.raises(BackendUnavailableError, match="--refresh client"):
            Server(model, client.keys.evaluation, refresh="bootstrap")
        with pytest.raises(BackendUnavailableError, match="--refresh client"):
            Client.from_pretrained(model, backend="simulator").keygen(bootstrapping=True)
        with pytest.raises(ParameterError, match="choose one of client, bootstrap"):
            Server(model, client.keys.evaluation, refresh="magic")
