"""Right messages in the wrong place: other batch, key, model, parameters or backend, on every hop, and a server that abuses refreshes."""

from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient
from tiny_model import SENTENCES, keyed_client, save_tiny_model

from hf_he.client import Client, Refresher
from hf_he.errors import CorruptFileError, HEError, ModelMismatchError, ParameterError, RangeError, RefreshError, WrongKeyError
from hf_he.keys import Keys
from hf_he.protocol import EncryptedResult
from hf_he.refresh import ClientRefresh
from hf_he.server import Server
from hf_he.service import create_app


@pytest.fixture(scope="module")
def batch(client):
    return client.encrypt(client.prepare(SENTENCES[:2]))


@pytest.fixture(scope="module")
def result(client, server, batch):
    return client.run(server, batch)


@pytest.fixture(scope="module")
def strangers(model, tmp_path_factory):
    """Clients that differ in exactly one thing."""
    other_model = save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    client_keys = Client.from_pretrained(model, backend="simulator")
    return {"key": keyed_client(model), "parameters": keyed_client(model, parameters="n15"), "model": keyed_client(other_model), "backend": client_keys}


class Replaying:
    """A server that answers with bytes of its choice."""

    def __init__(self, answer):
        self.answer = answer

    def infer(self, data, refresh, progress=None):
        return self.answer


IDENTITIES = {
    "backend": ({"backend": "native"}, ParameterError),
    "parameters": ({"parameters": "0" * 16}, ParameterError),
    "model": ({"model": "0" * 16}, ModelMismatchError),
    "key": ({"key_id": "0" * 16}, WrongKeyError),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_message_that_names_another_identity_is_refused_on_both_sides(name, client, server, batch, result):
    change, error = IDENTITIES[name]
    identity = replace(batch.identity, **change)
    with pytest.raises(error):
        server.open(replace(batch, identity=identity).to_bytes())
    with pytest.raises(error):
        client.run(server, replace(batch, identity=identity))
    with pytest.raises(error):
        client.decrypt(replace(result, identity=identity), client.prepare(SENTENCES[:2]))


@pytest.mark.parametrize("name", ["key", "parameters", "model"])
def test_results_and_batches_of_another_client(name, strangers, server, batch, result):
    """Each client's own check, not the server's goodwill, keeps other clients' results out."""
    stranger = strangers[name]
    sentences = stranger.prepare(SENTENCES[:2])
    with pytest.raises(HEError) as refused:
        stranger.decrypt(result, sentences)
    with pytest.raises(type(refused.value)):
        stranger.run(server, batch)
    with pytest.raises((WrongKeyError, ParameterError, ModelMismatchError)):
        server.open(stranger.encrypt(sentences).to_bytes())


def test_relabelled_ciphertexts_of_another_key_or_parameter_set_are_found_inside(strangers, client, server, batch, result):
    """The outer identity is forged to fit; the ciphertext inside still names its own."""
    for name, error in (("key", WrongKeyError), ("parameters", (ParameterError, CorruptFileError))):
        theirs = strangers[name].encrypt(strangers[name].prepare(SENTENCES[:2]))
        for field in ("embeddings", "attention_mask"):
            with pytest.raises(error):
                server.open(replace(batch, **{field: getattr(theirs, field)}).to_bytes())
        with pytest.raises(error):
            client.decrypt(replace(result, logits=theirs.embeddings), client.prepare(SENTENCES[:2]))


def test_an_old_result_does_not_answer_a_new_batch(client, result):
    again = client.encrypt(client.prepare(SENTENCES[:2]))
    with pytest.raises(CorruptFileError, match="another batch"):
        client.run(Replaying(result.to_bytes()), again)


def test_a_batch_is_not_its_own_result_and_a_result_no_batch(client, server, batch, result):
    with pytest.raises(CorruptFileError, match="kind"):
        client.run(Replaying(batch.to_bytes()), batch)
    with pytest.raises(CorruptFileError, match="kind"):
        server.open(result.to_bytes())
    with pytest.raises(CorruptFileError):
        server.open(replace(batch, attention_mask=batch.embeddings[:-1]).to_bytes())


def test_results_for_other_numbers_of_batches(client, batch, result):
    for count in (2, 256):
        with pytest.raises(CorruptFileError):
            client.run(Replaying(replace(result, batches=count).to_bytes()), batch)
    with pytest.raises(CorruptFileError):
        client.decrypt(replace(result, batches=2), client.prepare(SENTENCES[:2]))


def test_key_folders_and_servers_of_different_pairs(model, client, strangers, tmp_path):
    client.keys.save(tmp_path)
    theirs = strangers["key"].keys
    for name, data in (("evaluation.keys", theirs.evaluation.to_bytes()), ("public.key", theirs.backend.serialize(theirs.public))):
        right = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WrongKeyError, match="mixes keys"):
            Keys.load(tmp_path, with_evaluation=True)
        (tmp_path / name).write_bytes(right)
    wrong = Server(model, theirs.evaluation)
    with pytest.raises(WrongKeyError):
        client.infer(wrong, SENTENCES[:1])


class TestRefreshAnswers:
    """What a server accepts as the answer to its question."""

    def ask(self, client, answer):
        backend = client.backend
        question = backend.encrypt(np.zeros((1, backend.parameters.slots)), client.keys.secret, level=1)
        return ClientRefresh(lambda data: answer(backend, data)).refresh(backend, question, 3)

    def test_other_keys_parameters_shapes_and_levels(self, client, strangers):
        zeros = np.zeros((1, client.backend.parameters.slots))
        theirs, wide = strangers["key"], strangers["parameters"]
        wrong = {
            "key": lambda backend, data: backend.serialize(backend.encrypt(zeros, theirs.keys.secret)),
            "parameters": lambda backend, data: wide.backend.serialize(wide.backend.encrypt(np.zeros((1, wide.backend.parameters.slots)), wide.keys.secret)),
            "shape": lambda backend, data: backend.serialize(backend.encrypt(np.repeat(zeros, 2, 0), client.keys.secret)),
            "level": lambda backend, data: backend.serialize(backend.encrypt(zeros, client.keys.secret, level=2)),
            "the question itself": lambda backend, data: data,
            "nothing": lambda backend, data: b"",
        }
        for name, answer in wrong.items():
            with pytest.raises(RefreshError):
                self.ask(client, answer)
                pytest.fail(name)

    def test_answers_belong_to_one_job_and_one_question(self, server, batch, client):
        with TestClient(create_app(server)) as http:
            first = http.post("/jobs", content=batch.to_bytes()).json()["id"]
            second = http.post("/jobs", content=batch.to_bytes()).json()["id"]
            for _ in range(100):
                event = http.get(f"/jobs/{first}/next?wait=0.2")
                if event.headers["X-HF-HE-Event"] == "refresh":
                    break
            answer = client.refresher(1)(event.content)
            assert http.post(f"/jobs/{second}/refresh?sequence=1", content=answer).json()["error"] == "RefreshError"
            for sequence in (-1, 0, 2):
                assert http.post(f"/jobs/{first}/refresh?sequence={sequence}", content=answer).status_code == 422
            assert http.post(f"/jobs/{first}/refresh?sequence=1", content=answer).is_success
            assert first != second and len(first) == 32
            for job in (first, second):
                http.delete(f"/jobs/{job}")


class TestRefreshRequests:
    """What a client answers, and that its answer tells nothing about what it decrypted."""

    def question(self, client, values, **options):
        backend = client.backend
        return backend.serialize(backend.encrypt(np.broadcast_to(values, (1, backend.parameters.slots)), client.keys.secret, **options))

    @pytest.mark.parametrize("name", ["simulator", "native"])
    def test_values_out_of_bounds_are_answered_like_any_other_and_reported_at_the_end(self, name, model, client):
        if name == "native":
            client = Client.from_pretrained(model, backend="native")
            client.use_keys(Keys.generate(client.backend, set()))
        refresher = client.refresher(1)
        sizes = []
        for value in (0.5, refresher.bound / 2, refresher.bound * 2, 1e9, -1e12):
            answer = refresher(self.question(client, value))
            fresh = client.backend.deserialize(answer, "ciphertext")
            assert fresh.level == client.backend.parameters.max_level
            np.testing.assert_allclose(client.backend.decrypt(fresh, client.keys.secret), np.clip(value, -refresher.bound, refresher.bound), rtol=1e-6)
            sizes.append(len(answer))
        assert len(set(sizes)) == 1 and refresher.clipped == 3
        with pytest.raises(RangeError, match="3 refreshed ciphertexts"):
            refresher.check()

    def test_random_residues_of_a_hostile_server_are_answered(self, model):
        """A ciphertext nobody encrypted decrypts to values as large as the modulus; the answer has the shape of every other."""
        client = Client.from_pretrained(model, backend="native")
        client.use_keys(Keys.generate(client.backend, set()))
        backend, refresher = client.backend, client.refresher(1)
        for level in (0, 1, 7):
            honest = backend.encrypt(np.zeros((1, backend.parameters.slots)), client.keys.secret, level=level)
            halves = np.random.default_rng(level).permuted(honest.payload.values, axis=-1)
            forged = replace(honest, payload=replace(honest.payload, values=halves, seeds=None))
            fresh = backend.deserialize(refresher(backend.serialize(forged)), "ciphertext")
            assert np.abs(backend.decrypt(fresh, client.keys.secret)).max() <= refresher.bound * 1.001

    def test_requests_are_bounded_in_number_and_width(self, client):
        backend = client.backend
        refresher = Refresher(backend, client.keys, requests=2, widest=3)
        wide = backend.serialize(backend.encrypt(np.zeros((2, 2, backend.parameters.slots)), client.keys.secret, level=1))
        with pytest.raises(RefreshError, match="at most 3"):
            refresher(wide)
        refresher(self.question(client, 0.0, level=1))
        with pytest.raises(RefreshError, match="do not trust it"):
            refresher(self.question(client, 0.0, level=1))

    def test_a_server_that_drives_values_out_of_bounds_is_noticed_when_it_is_done(self, client, server, batch):
        class Amplifying:
            def infer(self, data, refresh, progress=None):
                answer = server.infer(data, refresh)
                backend = client.backend
                refresh(backend.serialize(backend.encrypt(np.full((1, backend.parameters.slots), 1e6), client.keys.secret)))
                return answer

        assert isinstance(client.run(server, batch), EncryptedResult)
        with pytest.raises(RangeError, match="do not trust the server"):
            client.run(Amplifying(), batch)
