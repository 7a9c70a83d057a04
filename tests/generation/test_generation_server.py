"""Client and server of encrypted generation: stored caches, repeated and refused messages, a server process without the secret key."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_decoder import save_tiny_decoder

from hf_he import GenerationClient, GenerationServer
from hf_he.errors import (
    CorruptFileError,
    GenerationError,
    ModelMismatchError,
    RangeError,
    RefreshError,
    SecretKeyOnServerError,
    ShapeError,
    UnsupportedEncryptedOperation,
    WrongKeyError,
)
from hf_he.generation.messages import CacheRequest, EncryptedPrompt, EncryptedToken, StoredCache
from hf_he.generation.server import MAX_GENERATIONS
from hf_he.local_server import local_server
from hf_he.ops.decode import CACHE_LEVELS
from hf_he.packing import unpack_state
from hf_he.protocol import EncryptedResult
from hf_he.serialization import pack, unpack

PROMPTS = [[2, 4, 5, 6], [3, 17, 15]]
TOKENS = [[13, 11], [6, 19], [5, 5]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def client(model):
    client = GenerationClient.from_pretrained(model, backend="simulator", context=16)
    client.keygen()
    return client


@pytest.fixture
def server(model, client):
    return GenerationServer(model, client.keys.evaluation, context=16)


def prompt_message(client, lengths=None):
    lanes = client.packing.sequences
    embeddings = client._encrypted(client._embedded(client._filled([[2, 4, 5]], None)))
    return EncryptedPrompt(client.identity, lengths or (3,) * lanes, 1, embeddings)


class TestStoredCaches:
    def test_a_restarted_server_goes_on_with_the_same_logits(self, model, client, server):
        generation = client.begin(PROMPTS, server)
        generation.step(TOKENS[0])
        stored = generation.store()
        expected = [generation.step(tokens) for tokens in TOKENS[1:]]
        restarted = GenerationServer(model, client.keys.evaluation, context=16)
        so_far = [[*prompt, token] for prompt, token in zip(PROMPTS, TOKENS[0], strict=True)]
        resumed = client.resume(stored, so_far, restarted)
        for tokens, logits in zip(TOKENS[1:], expected, strict=True):
            np.testing.assert_allclose(resumed.step(tokens), logits, atol=1e-4)
        assert resumed.max_logit_error < 1e-3

    def test_keys_and_values_are_where_they_belong(self, client, server):
        generation = client.begin(PROMPTS, server)
        generation.step(TOKENS[0])
        stored = StoredCache.from_bytes(generation.store())
        assert stored.lengths[:2] == (5, 4) and stored.tokens == 16
        for level, data, name in zip((CACHE_LEVELS.query, CACHE_LEVELS.value), stored.layers[0], ("keys", "values"), strict=True):
            ciphertext = client.backend.deserialize(data, "ciphertext")
            assert ciphertext.level == level
            held = unpack_state(client.backend.decrypt(ciphertext, client.keys.secret), client.packing, 16, 2)
            for sequence, cache in enumerate(generation.reference._caches):
                expected = getattr(cache.layers[0], name)[0].transpose(0, 1).flatten(1).numpy()
                length = stored.lengths[sequence]
                np.testing.assert_allclose(held[sequence, :length], expected, atol=1e-4)
                np.testing.assert_allclose(held[sequence, length:], 0.0, atol=1e-4)

    def test_forgetting(self, client, server):
        generation = client.begin(PROMPTS, server)
        generation.store(forget=True)
        with pytest.raises(GenerationError, match="holds no generation"):
            generation.step(TOKENS[0])

    def test_damage_and_mismatches(self, model, client, server):
        stored = client.begin(PROMPTS, server).store()
        with pytest.raises(CorruptFileError):
            server.open(stored[:-1])
        arrays, metadata = unpack(stored, "key_value_cache")

        fresh = client.backend.serialize(client.backend.encrypt(np.zeros((1, client.packing.slots)), client.keys.secret))

        def changed(arrays=arrays, **values):
            return pack("key_value_cache", arrays, {**metadata, **values})

        for data, error, text in [
            (changed(cache_format="2"), CorruptFileError, "another format"),
            (changed(lengths="[]"), CorruptFileError, "how long"),
            (changed(lengths="[17" + ", 17" * (client.packing.sequences - 1) + "]", prompts="1"), ShapeError, "17 tokens"),
            (changed(lengths="[3]", prompts="1"), ModelMismatchError, "1 sequences"),
            (changed(tokens="8"), ModelMismatchError, "8 lanes"),
            (changed(tokens="x"), CorruptFileError, "number from 1"),
            (changed(prompts="1"), CorruptFileError, "no copies"),
            (changed(generation="?"), CorruptFileError, "generation"),
            (changed({"layers.0.keys": arrays["layers.0.keys"]}), CorruptFileError, "misses"),
            (changed(arrays | {"layers.0.keys": np.frombuffer(fresh, dtype=np.uint8)}), CorruptFileError, "level"),
            (changed(key_id="0" * 16), WrongKeyError, "key"),
            (changed(model_fingerprint="0" * 16), ModelMismatchError, "model"),
        ]:
            with pytest.raises(error, match=text):
                server.open(data)
        with pytest.raises(GenerationError, match="were given"):
            client.resume(stored, [[2, 3]], server)

    def test_the_least_recently_used_cache_makes_room(self, client, server):
        generations = [client.begin([[2, 3]], server)]
        stored = StoredCache.from_bytes(generations[0].store())
        for index in range(MAX_GENERATIONS):
            server.infer(replace(stored, generation=f"{index:016x}").to_bytes(), None)
        assert len(server._generations) == MAX_GENERATIONS
        with pytest.raises(GenerationError, match="begin again"):
            generations[0].step([4])


class TestMessages:
    def test_a_repeated_token_is_answered_without_computing(self, client, server):
        generation = client.begin(PROMPTS, server)
        message = client.encrypted_token(generation.name, 4, TOKENS[0])
        first = server.infer(message, client.refresher())
        assert server.infer(message, None) == first
        assert server._generations[generation.name].cache.lengths[0] == 5

    def test_a_token_that_failed_leaves_the_cache_as_it_was(self, client, server):
        generation = client.begin(PROMPTS, server)
        expected = client.begin(PROMPTS, server)
        answers = 0

        def fails_late(data):
            nonlocal answers
            answers += 1
            if answers > 6:
                raise RefreshError("gone")
            return client.refresher()(data)

        with pytest.raises(RefreshError):
            server.infer(client.encrypted_token(generation.name, 4, TOKENS[0]), fails_late)
        np.testing.assert_allclose(generation.step(TOKENS[0]), expected.step(TOKENS[0]), atol=1e-4)

    @pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
    def test_a_step_whose_answer_is_lost_is_repeated_with_the_same_tokens(self, client, server, done):
        """Before or after the server appended them: who asks again cannot know."""

        class Lossy:
            fails = False

            def infer(self, data, refresh, progress=None):
                if self.fails:
                    self.fails = False
                    if done:
                        server.infer(data, refresh, progress)
                    raise ConnectionError("gone")
                return server.infer(data, refresh, progress)

        lossy = Lossy()
        generation, expected = client.begin(PROMPTS, lossy), client.begin(PROMPTS, server)
        lossy.fails = True
        with pytest.raises(ConnectionError):
            generation.step(TOKENS[0])
        with pytest.raises(GenerationError, match="the same ones again"):
            generation.step(TOKENS[1])
        for tokens in TOKENS:
            np.testing.assert_allclose(generation.step(tokens), expected.step(tokens), atol=1e-4)
        assert generation.max_logit_error < 1e-3 and generation.lengths == expected.lengths

    def test_a_clipped_value_ends_the_generation(self, client, server, monkeypatch):
        """Its cache is wrong from then on, also where the answer to a repeated token would need no refresh and look fine."""
        generation, check = client.begin(PROMPTS, server), client.refresher

        def narrow():
            refresher = check()
            refresher.bound = 1e-3
            return refresher

        monkeypatch.setattr(client, "refresher", narrow)
        with pytest.raises(RangeError, match="the result is wrong"):
            generation.step(TOKENS[0])
        monkeypatch.undo()
        with pytest.raises(GenerationError, match="begin another one"):
            generation.step(TOKENS[0])

    def test_a_mask_beside_a_cache_is_refused(self, client, server):
        """The lengths of the cache say which tokens count; a mask would not be looked at."""
        generation = client.begin(PROMPTS, server)
        cache, session = server._generations[generation.name].cache, server.session
        ones = client.backend.encrypt(np.ones((1, client.packing.slots)), client.keys.secret)

        def step():
            with session.single_token():
                state = session.hidden_state(ones)
                return server.model(inputs_embeds=state, position_ids=cache.positions(), past_key_values=cache, attention_mask=session.attention_mask(ones))

        with pytest.raises(UnsupportedEncryptedOperation, match="mask over a cache"):
            server._locked(client.refresher(), step)

    def test_out_of_step_full_or_unknown(self, client, server):
        generation = client.begin(PROMPTS, server)
        with pytest.raises(GenerationError, match="out of step"):
            server.infer(client.encrypted_token(generation.name, 9, TOKENS[0]), client.refresher())
        with pytest.raises(GenerationError, match="holds no generation"):
            server.open(client.encrypted_token("0" * 16, 4, TOKENS[0]))
        with pytest.raises(GenerationError, match="holds no generation"):
            server.open(CacheRequest(client.identity, "0" * 16).to_bytes())
        full = client.begin([[2] * 16], server)
        with pytest.raises(GenerationError, match="full"):
            server.infer(client.encrypted_token(full.name, 16, [2, 2]), client.refresher())

    def test_a_prompt_is_used_once(self, client, server):
        message = prompt_message(client)
        server.infer(message.to_bytes(), client.refresher())
        with pytest.raises(GenerationError, match="sent before"):
            server.open(message.to_bytes())

    def test_lengths_are_checked(self, client, server):
        lanes = client.packing.sequences
        for lengths, error in [
            ((17,) * lanes, ModelMismatchError),
            ((3,), ModelMismatchError),
            ((3,) * (lanes - 1) + (2,), CorruptFileError),
            ((0,) * lanes, CorruptFileError),
            ((), CorruptFileError),
        ]:
            message = prompt_message(client)
            with pytest.raises(error):
                server.open(replace(message, lengths=lengths).to_bytes())

    def test_other_kinds_and_keys(self, model, client, server):
        with pytest.raises(CorruptFileError, match="not a message to a generation server"):
            server.open(EncryptedResult(client.identity, 1, 1, "0" * 16, b"", {}).to_bytes())
        with pytest.raises(SecretKeyOnServerError):
            server.open(client.backend.serialize(client.keys.secret, allow_secret=True))
        other = GenerationClient.from_pretrained(model, backend="simulator", context=16)
        other.keygen()
        with pytest.raises(WrongKeyError):
            server.open(prompt_message(other).to_bytes())
        token = client.backend.serialize(client.backend.encrypt(np.zeros((2, client.packing.slots)), client.keys.secret))
        with pytest.raises(CorruptFileError, match="shape"):
            name = client.begin([[2, 3]], server).name
            server.open(EncryptedToken(client.identity, name, 2, token).to_bytes())

    def test_the_client_refuses_another_answer(self, client, server):
        class Swapped:
            def infer(self, data, refresh, progress=None):
                answer = EncryptedResult.from_bytes(server.infer(data, refresh, progress))
                return replace(answer, batch_id="0" * 16).to_bytes()

        with pytest.raises(CorruptFileError, match="another generation"):
            client.begin([[2, 3]], Swapped())

    def test_no_text_and_no_key_in_what_the_server_shows(self, client, server):
        client.begin(PROMPTS, server)
        shown = repr(server.describe()) + repr(vars(server)) + repr(list(server._generations.values()))
        assert "secret" not in shown.lower() and "SimulatorSecretKey" not in shown


@pytest.mark.parametrize("limits", [{"context": 1024}, {"context": 12}, {"context": 16, "max_tokens": 16 * 8 + 1}], ids=str)
def test_contexts_that_do_not_fit(model, client, limits):
    with pytest.raises(ShapeError):
        GenerationServer(model, client.keys.evaluation, **limits)


def test_over_http_and_after_a_restart(model, client, server, tmp_path):
    client.keys.save(tmp_path)
    arguments = ("--generate", "--context", "16")
    here = client.begin(PROMPTS, server)
    with local_server(model, tmp_path / "evaluation.keys", arguments=arguments) as remote:
        assert remote.describe()["context"] == 16
        there = client.begin(PROMPTS, remote)
        np.testing.assert_allclose(here.logits, there.logits, atol=1e-4)
        np.testing.assert_allclose(here.step(TOKENS[0]), there.step(TOKENS[0]), atol=1e-4)
        stored = there.store()
        with pytest.raises(GenerationError):
            remote.infer(client.encrypted_token("0" * 16, 4, TOKENS[0]), client.refresher())
    so_far = [[*prompt, token] for prompt, token in zip(PROMPTS, TOKENS[0], strict=True)]
    with local_server(model, tmp_path / "evaluation.keys", arguments=arguments) as remote:
        resumed = client.resume(stored, so_far, remote)
        np.testing.assert_allclose(here.step(TOKENS[1]), resumed.step(TOKENS[1]), atol=1e-4)
