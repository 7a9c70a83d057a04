"""Client and server on the simulator: the whole path in one process and over HTTP, and everything that must be refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from tiny_model import SENTENCES, keyed_client, save_tiny_model

from hf_he.backends import get_backend
from hf_he.checkpoints import model_fingerprint
from hf_he.ckks.parameters import parameter_set
from hf_he.client import Client
from hf_he.errors import (
    CorruptFileError,
    DataError,
    ModelMismatchError,
    ParameterError,
    RangeError,
    WrongKeyError,
)
from hf_he.keys import Keys, ServerKeys
from hf_he.protocol import EncryptedBatch, EncryptedResult, Identity
from hf_he.results import InferenceResult, Sentence
from hf_he.server import Server

OUT_OF_RANGE = "of with bad was dull good no not"


class TestInference:
    def test_encrypted_predictions_are_those_of_polynomial_mode(self, client, server):
        result = client.infer(server, SENTENCES, labels=[1, 0, 1, 1, 1])
        assert result.agreement == 1.0
        assert result.max_logit_error < 3e-6
        assert result.labels == [client.label_names[s.plaintext_prediction] for s in result.sentences]
        assert result.accuracy == np.mean([s.plaintext_prediction == s.label for s in result.sentences])

    @pytest.mark.parametrize(("heads", "features"), [(6, 32), (4, 1)])
    def test_a_hidden_size_that_is_no_power_of_two(self, tmp_path, heads, features):
        """Blocks of whole heads; heads that are no power of two wide have one feature per ciphertext."""
        client = keyed_client(save_tiny_model(tmp_path, hidden_size=96, num_attention_heads=heads))
        result = client.infer(Server(tmp_path, client.keys.evaluation), SENTENCES)
        assert client.packing.features == features and result.agreement == 1.0 and result.max_logit_error < 3e-6

    def test_a_regression_answers_with_its_logit(self, tmp_path):
        client = keyed_client(save_tiny_model(tmp_path, id2label={0: "score"}, label2id={"score": 0}))
        result = client.infer(Server(tmp_path, client.keys.evaluation), SENTENCES)
        assert np.shape(result.logits) == (len(SENTENCES), 1) and np.ptp(result.logits) > 1e-3
        np.testing.assert_allclose(result.logits, [sentence.plaintext_logits for sentence in result.sentences], atol=3e-6)

    def test_sentences_fill_several_ciphertexts(self, client, server):
        lanes = client.packing.sequences
        texts = [SENTENCES[i % len(SENTENCES)] for i in range(lanes + 3)]
        sentences = client.prepare(texts)
        batch = client.encrypt(sentences)
        assert batch.batches == 2
        decrypted = client.decrypt(client.run(server, batch), sentences)
        assert max(s.max_logit_error for s in decrypted) < 3e-6

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
        assert max(s.max_logit_error for s in client.decrypt(distant, sentences)) < 3e-6

    def test_native_ciphertexts_give_the_same_trace_level_for_level_and_the_same_predictions(self, model, client):
        native = Client.from_pretrained(model, backend="native")
        result = native.infer(Server(model, native.keygen().evaluation), SENTENCES)
        simulated = client.infer(Server(model, client.keys.evaluation), SENTENCES)
        assert result.report["trace"] == simulated.report["trace"]
        assert result.agreement == 1.0 and result.max_logit_error < 3e-6

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
        assert result.to_json()["refused"] == 1 and result.max_logit_error < 3e-6

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


class TestMismatches:
    """Every message names the fix, and the server answers the next client afterwards."""

    def test_another_model(self, client, server, tmp_path):
        other = save_tiny_model(tmp_path / "other", seed=1)
        stranger = Client.from_pretrained(other, keys=client.keys)
        with pytest.raises(ModelMismatchError, match="encrypt again with the folder of the model that is served"):
            stranger.run(server, stranger.encrypt(stranger.prepare(["a film"])))

    def test_another_key(self, model, server):
        stranger = keyed_client(model)
        with pytest.raises(WrongKeyError, match="of one `hf-he keygen`"):
            stranger.infer(server, SENTENCES[:1])

    def test_a_ciphertext_of_another_key_under_a_forged_name(self, model, client, server, batch):
        stranger = keyed_client(model)
        theirs = stranger.encrypt(stranger.prepare(SENTENCES))
        with pytest.raises(WrongKeyError):
            server.open(replace(batch, embeddings=theirs.embeddings).to_bytes())

    def test_other_parameters(self, model, server):
        stranger = keyed_client(model, parameters="n15")
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
            keyed_client(model).decrypt(result, sentences)
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


def test_results_without_labels_or_answers():
    empty = InferenceResult([Sentence("x", 1, 3, False, "refused")], {})
    assert (empty.agreement, empty.accuracy, empty.max_logit_error) == (None, None, None) and empty.logits == [None]
