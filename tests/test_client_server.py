"""Client and server on the simulator: the whole path in one process and over HTTP, and everything that must be refused."""

import copy
import http.client
import json
import pickle
import shutil
import threading
from dataclasses import replace

import httpx
import numpy as np
import pytest
from tiny_model import SENTENCES, save_tiny_model

from hf_he import errors
from hf_he.backends import get_backend
from hf_he.checkpoints import model_fingerprint
from hf_he.ckks.parameters import parameter_set
from hf_he.client import MAX_REFRESHES_PER_BATCH, Client
from hf_he.errors import (
    BackendUnavailableError,
    CorruptFileError,
    DataError,
    HEError,
    ModelMismatchError,
    ParameterError,
    RangeError,
    RefreshError,
    SecretKeyOnServerError,
    WrongKeyError,
)
from hf_he.keys import Keys, ServerKeys
from hf_he.local_server import local_server
from hf_he.protocol import EncryptedBatch, EncryptedResult, Identity, error_from_json, error_to_json
from hf_he.remote import connect
from hf_he.results import InferenceResult, Sentence
from hf_he.server import Server

OUT_OF_RANGE = "of with bad was dull good no not"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(model):
    client = Client.from_pretrained(model, backend="simulator")
    client.keygen()
    return client


@pytest.fixture(scope="module")
def server(model, client):
    return Server(model, client.keys.evaluation)


@pytest.fixture(scope="module")
def key_folder(client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    client.keys.save(folder)
    return folder


@pytest.fixture(scope="module")
def remote(model, key_folder):
    with local_server(model, key_folder / "evaluation.keys") as server:
        yield server


@pytest.fixture(scope="module")
def batch(client):
    return client.encrypt(client.prepare(SENTENCES))


def other_client(model, **options):
    client = Client.from_pretrained(model, backend="simulator", **options)
    client.keygen()
    return client


class TestInference:
    def test_encrypted_predictions_are_those_of_polynomial_mode(self, client, server):
        result = client.infer(server, SENTENCES, labels=[1, 0, 1, 1, 1])
        assert result.agreement == 1.0
        assert result.max_logit_error < 1e-3
        assert result.labels == [client.label_names[s.plaintext_prediction] for s in result.sentences]
        assert result.accuracy == np.mean([s.plaintext_prediction == s.label for s in result.sentences])

    def test_sentences_fill_several_ciphertexts(self, client, server):
        lanes = client.packing.sequences
        texts = [SENTENCES[i % len(SENTENCES)] for i in range(lanes + 3)]
        sentences = client.prepare(texts)
        batch = client.encrypt(sentences)
        assert batch.batches == 2
        decrypted = client.decrypt(client.run(server, batch), sentences)
        assert max(s.max_logit_error for s in decrypted) < 1e-3

    def test_large_inputs_go_in_several_messages(self, client, server, monkeypatch):
        monkeypatch.setattr("hf_he.client._CIPHERTEXTS_PER_MESSAGE", 2)
        lanes = client.packing.sequences
        texts = [SENTENCES[i % len(SENTENCES)] for i in range(2 * lanes)]
        texts.insert(lanes, OUT_OF_RANGE)
        seen = []
        result = client.infer(server, texts, progress=seen.append)
        assert [s.text for s in result.sentences] == texts and result.labels[lanes] is None
        assert result.agreement == 1.0 and len(result.report["seconds_by_batch"]) == 2
        assert [(event["batch"], event["batches"]) for event in seen] == [(1, 2), (2, 2)]

    def test_over_http_the_result_and_the_trace_are_the_same(self, client, server, remote, batch):
        local, distant = client.run(server, batch), client.run(remote, batch)
        without_encoding = [[entry for entry in result.report["trace"] if entry[1] != "encode"] for result in (local, distant)]
        assert without_encoding[0] == without_encoding[1]
        sentences = client.prepare(SENTENCES)
        assert max(s.max_logit_error for s in client.decrypt(distant, sentences)) < 1e-3

    def test_native_ciphertexts_give_the_same_trace_level_for_level_and_the_same_predictions(self, model, client):
        native = Client.from_pretrained(model, backend="native")
        result = native.infer(Server(model, native.keygen().evaluation), SENTENCES)
        simulated = client.infer(Server(model, client.keys.evaluation), SENTENCES)
        assert result.report["trace"] == simulated.report["trace"]
        assert result.agreement == 1.0 and result.max_logit_error < 1e-3

    def test_progress_names_batch_and_operation(self, client, server, batch):
        seen = []
        client.run(server, batch, progress=seen.append)
        assert seen[0] == {"state": "running", "batch": 1, "batches": 1, "operations": 0, "operation": "other"}

    def test_json_contract(self, client, server):
        data = client.infer(server, SENTENCES).to_json()
        assert {
            "backend", "security_bits", "sentences", "agreement", "max_logit_error", "accuracy", "seconds", "operations", "refreshes",
            "bootstraps", "peak_memory_gb", "bytes",
        } <= data.keys()  # fmt: skip
        assert {"keygen", "encrypt", "server", "decrypt", "total", "by_op", "by_primitive"} <= data["seconds"].keys()
        assert data["bytes"].keys() == {"evaluation_keys", "ciphertext_in", "ciphertext_out"}
        assert data["accuracy"] is None and data["security_bits"] == 128 and data["bootstraps"] == 0 and data["refreshes"] > 0
        assert {"linear", "attention", "norm", "activation", "refresh"} <= data["seconds"]["by_op"].keys()
        assert {"rotate", "multiply", "rescale"} <= data["operations"].keys()


class TestSentences:
    def test_a_sentence_out_of_range_is_refused_by_layer_and_the_others_go_on(self, client, server):
        result = client.infer(server, [SENTENCES[0], OUT_OF_RANGE, SENTENCES[1]])
        assert "bert.encoder.layer.0.output.LayerNorm" in result.sentences[1].refused
        assert result.labels[1] is None and None not in (result.labels[0], result.labels[2])
        assert result.to_json()["refused"] == 1 and result.max_logit_error < 1e-3

    def test_nothing_left_to_encrypt(self, client):
        with pytest.raises(RangeError, match=r"LayerNorm: variance .* outside the fitted interval"):
            client.encrypt(client.prepare([OUT_OF_RANGE]))
        with pytest.raises(DataError, match="empty"):
            client.encrypt([])

    def test_long_sentences_are_cut_and_marked(self, client):
        short, long = client.prepare([SENTENCES[0], " ".join(["film"] * 40)])
        assert (short.truncated, long.truncated, long.tokens) == (False, True, 42)

    def test_notes_round_trip(self, client):
        sentence = client.prepare([SENTENCES[0]], [1])[0].with_logits([0.25, -1])
        assert Sentence.from_json(sentence.to_json()) == sentence
        with pytest.raises(CorruptFileError):
            Sentence.from_json({"text": "x"})


class TestSecretKeys:
    def test_a_server_cannot_be_built_with_a_secret_key(self, model, client, key_folder):
        secret_bytes = (key_folder / "secret.key").read_bytes()
        for handed in (client.keys.secret, client.keys, secret_bytes, key_folder / "secret.key"):
            with pytest.raises(SecretKeyOnServerError, match="secret"):
                Server(model, handed)

    def test_a_secret_key_under_another_name_is_refused_by_the_server_process(self, model, key_folder, tmp_path):
        (tmp_path / "evaluation.keys").write_bytes((key_folder / "secret.key").read_bytes())
        with pytest.raises(SecretKeyOnServerError), local_server(model, tmp_path / "evaluation.keys"):
            pass

    def test_a_secret_key_sent_as_a_batch_is_refused(self, server, key_folder):
        with pytest.raises(SecretKeyOnServerError, match="consider that key lost"):
            server.open((key_folder / "secret.key").read_bytes())

    def test_keys_show_and_copy_nothing(self, client):
        assert client.keys.key_id in repr(client.keys) and len(repr(client.keys)) < 50
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                duplicate(client.keys)

    def test_key_files(self, key_folder):
        assert (key_folder / "secret.key").stat().st_mode & 0o777 == 0o600
        keys = Keys.load(key_folder, with_evaluation=True)
        assert keys.evaluation.key_id == keys.key_id

    def test_mixed_key_folders_are_refused(self, model, key_folder, tmp_path):
        other_client(model).keys.save(tmp_path)
        (tmp_path / "public.key").write_bytes((key_folder / "public.key").read_bytes())
        with pytest.raises(WrongKeyError, match="mixes keys"):
            Keys.load(tmp_path)

    def test_evaluation_keys_are_not_a_secret_key_file(self, key_folder, tmp_path):
        (tmp_path / "secret.key").write_bytes((key_folder / "evaluation.keys").read_bytes())
        with pytest.raises(CorruptFileError, match="no secret key"):
            Keys.load(tmp_path)
        with pytest.raises(CorruptFileError, match="cannot read the secret-key file"):
            Keys.load(tmp_path / "none")
        with pytest.raises(ParameterError):
            ServerKeys.load(7)


class TestMismatches:
    """Every message names the fix, and the server answers the next client afterwards."""

    def test_another_model(self, client, server, tmp_path):
        other = save_tiny_model(tmp_path / "other", seed=1)
        stranger = Client.from_pretrained(other, keys=client.keys)
        with pytest.raises(ModelMismatchError, match="encrypt again with the folder of the model that is served"):
            stranger.run(server, stranger.encrypt(stranger.prepare(["a film"])))

    def test_another_key(self, model, server):
        stranger = other_client(model)
        with pytest.raises(WrongKeyError, match="of one `hf-he keygen`"):
            stranger.infer(server, SENTENCES[:1])

    def test_a_ciphertext_of_another_key_under_a_forged_name(self, model, client, server, batch):
        stranger = other_client(model)
        theirs = stranger.encrypt(stranger.prepare(SENTENCES))
        with pytest.raises(WrongKeyError):
            server.open(replace(batch, embeddings=theirs.embeddings).to_bytes())

    def test_other_parameters(self, model, server):
        stranger = other_client(model, parameters="n15")
        with pytest.raises(ParameterError, match="encrypt again with the keys the server was started with"):
            stranger.infer(server, SENTENCES[:1])

    def test_another_backend(self, server, batch):
        with pytest.raises(ParameterError, match="use one backend for both"):
            server.open(replace(batch, identity=replace(batch.identity, backend="native")).to_bytes())

    def test_wrong_shapes_and_levels(self, client, server, batch):
        backend = client.backend
        wrong_shape = backend.serialize(backend.encrypt(np.zeros((2, backend.parameters.slots)), client.keys.public))
        low = backend.encrypt(np.zeros((1, 1, backend.parameters.slots)), client.keys.public, level=3)
        for embeddings in (wrong_shape, backend.serialize(low)):
            with pytest.raises(CorruptFileError, match="encrypt again"):
                server.open(replace(batch, embeddings=embeddings).to_bytes())

    def test_the_answer_to_another_batch(self, client, server, batch):
        class Confused:
            def infer(self, data, refresh, progress=None):
                return server.infer(replace(batch, batch_id="0" * 16).to_bytes(), refresh)

        with pytest.raises(CorruptFileError, match="another batch"):
            client.run(Confused(), batch)

    def test_results_are_checked_before_decryption(self, model, client, server, batch, tmp_path):
        result = client.run(server, batch)
        sentences = client.prepare(SENTENCES)
        with pytest.raises(WrongKeyError):
            other_client(model).decrypt(result, sentences)
        with pytest.raises(ModelMismatchError):
            Client.from_pretrained(save_tiny_model(tmp_path / "other", seed=1), keys=client.keys).decrypt(result, sentences)
        with pytest.raises(CorruptFileError, match="answers another input"):
            client.decrypt(replace(result, batches=2), sentences)

    def test_a_client_without_keys_says_how_to_get_them(self, model):
        with pytest.raises(WrongKeyError, match="keygen"):
            Client.from_pretrained(model, backend="simulator").encrypt([Sentence("a film", None, 4, False)])

    def test_keys_for_other_parameters(self, model, client):
        with pytest.raises(ParameterError, match="other parameters"):
            Client(model, get_backend("simulator", parameter_set("n15")), client.keys)

    def test_no_model_in_the_folder(self, tmp_path):
        with pytest.raises(DataError, match="holds no model"):
            Client.from_pretrained(tmp_path, backend="simulator")

    def test_fingerprint_follows_weights_and_configuration(self, model, tmp_path):
        copied = shutil.copytree(model, tmp_path / "copy")
        config = json.loads((copied / "config.json").read_text())
        for field, same in (("transformers_version", True), ("hidden_act", False)):
            (copied / "config.json").write_text(json.dumps(config | {field: "other"}))
            assert (model_fingerprint(copied) == model_fingerprint(model)) is same
        shutil.copy(model / "config.json", copied)
        weights = bytearray((copied / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (copied / "model.safetensors").write_bytes(weights)
        assert model_fingerprint(copied) != model_fingerprint(model)


class TestDamage:
    @pytest.mark.parametrize("kind", ["batch", "result", "evaluation", "secret", "public"])
    def test_truncated_and_flipped_bytes_are_typed_errors(self, kind, model, client, server, batch, key_folder, tmp_path):
        data, read = {
            "batch": lambda: (batch.to_bytes(), server.open),
            "result": lambda: (client.run(server, batch).to_bytes(), EncryptedResult.from_bytes),
            "evaluation": lambda: ((key_folder / "evaluation.keys").read_bytes(), ServerKeys.load),
            "secret": lambda: ((key_folder / "secret.key").read_bytes(), lambda data: load_with(data, "secret.key")),
            "public": lambda: ((key_folder / "public.key").read_bytes(), lambda data: load_with(data, "public.key")),
        }[kind]()

        def load_with(data, name):
            for file in ("secret.key", "public.key"):
                (tmp_path / file).write_bytes(data if file == name else (key_folder / file).read_bytes())
            return Keys.load(tmp_path)

        read(data)
        for length in (0, 7, 100, len(data) // 2, len(data) - 1):
            with pytest.raises(CorruptFileError):
                read(data[:length])
        for position in np.linspace(0, len(data) - 1, 25).astype(int):
            damaged = bytearray(data)
            damaged[position] ^= 4
            with pytest.raises(CorruptFileError):
                read(bytes(damaged))

    def test_garbled_metadata(self, batch, client):
        for field in ({"batches": 0}, {"batch_id": "x" * 16}):
            with pytest.raises(CorruptFileError):
                EncryptedBatch.from_bytes(replace(batch, **field).to_bytes())
        with pytest.raises(CorruptFileError, match="does not name its model_fingerprint"):
            Identity.from_metadata({"backend": "native", "parameter_fingerprint": "0" * 16})


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
            other_client(model).refresher(1)(question)
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


class TestHTTP:
    def test_bad_bytes_are_answered_by_class_and_the_server_goes_on(self, client, remote, batch, key_folder):
        data = batch.to_bytes()
        cases = [
            (b"", 400, "CorruptFileError"),
            (b"hello", 400, "CorruptFileError"),
            (data[:-1], 400, "CorruptFileError"),
            ((key_folder / "secret.key").read_bytes(), 403, "SecretKeyOnServerError"),
            (replace(batch, identity=replace(batch.identity, model="0" * 16)).to_bytes(), 409, "ModelMismatchError"),
            (replace(batch, identity=replace(batch.identity, key_id="0" * 16)).to_bytes(), 409, "WrongKeyError"),
            (replace(batch, identity=replace(batch.identity, parameters="0" * 16)).to_bytes(), 422, "ParameterError"),
        ]
        for body, status, name in cases:
            response = httpx.post(f"{remote.url}/jobs", content=body)
            assert (response.status_code, response.json()["error"]) == (status, name)
        assert client.infer(remote, SENTENCES[:1]).agreement == 1.0

    def test_oversized_messages_are_refused_before_they_are_read(self, remote):
        connection = http.client.HTTPConnection(remote.url.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/jobs")
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()

    def test_unknown_jobs(self, remote):
        assert httpx.get(f"{remote.url}/jobs/none/next").status_code == 404
        assert httpx.post(f"{remote.url}/jobs/none/refresh?sequence=1", content=b"").status_code == 404
        assert httpx.delete(f"{remote.url}/jobs/none").status_code == 204

    def test_two_clients_at_once_are_served_in_turn(self, client, remote):
        results = []
        threads = [threading.Thread(target=lambda: results.append(client.infer(connect(remote.url), SENTENCES))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result.agreement for result in results] == [1.0, 1.0]

    def test_info_identifies_what_is_served(self, client, remote):
        info = remote.describe()
        assert (info["model_fingerprint"], info["key_id"]) == (client.model_fingerprint, client.keys.key_id)

    def test_nobody_there(self):
        with pytest.raises(HEError, match="start it with `hf-he serve`"):
            connect("http://127.0.0.1:9")

    def test_errors_keep_their_class_and_internal_ones_keep_their_text_to_themselves(self):
        for name in ("CorruptFileError", "WrongKeyError", "MissingKeyError", "RangeError", "HEError"):
            error = error_from_json(error_to_json(getattr(errors, name)("what to do")))
            assert type(error).__name__ == name and str(error) == "what to do"
        assert "secret detail" not in str(error_from_json(error_to_json(ValueError("secret detail"))))
        for foreign in (None, [], {"error": 1, "message": "x"}, {"error": "os", "message": "x"}, {"error": "SystemExit", "message": "x"}):
            assert type(error_from_json(foreign)) is HEError


def test_results_without_labels_or_answers():
    empty = InferenceResult([Sentence("x", 1, 3, False, "refused")], {})
    assert (empty.agreement, empty.accuracy, empty.max_logit_error) == (None, None, None)
