"""The server picks the tokens: no embedding after the prompt, the same tokens as greedy generation."""

import pytest
from test_generation import Rig

from hf_he.errors import GenerationError, ParameterError
from hf_he.generation.messages import StoredCache


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    return Rig(tmp_path_factory.mktemp("decoder"))


def test_greedy_tokens(rig):
    expected = rig.generate(encrypted=False)
    assert rig.generate(select="server").tolist() == expected.tolist()
    assert rig.client.last.sizes["sent"] < 2 * len(rig.client.encrypted_token("0" * 16, 4, [2]))


def test_stored_and_resumed(rig):
    client, expected = rig.client, rig.generate(encrypted=False)[0].tolist()
    generation = client.begin([expected[:4]], select="server")
    stored = generation.store(forget=True)
    assert StoredCache.from_bytes(stored).choice is not None
    tokens = [generation.chosen]
    resumed = client.resume(stored, [expected[:4]])
    while len(tokens) < 4:
        resumed.step(tokens[-1:])
        tokens.append(resumed.chosen)
    assert tokens == expected[4:]


def test_what_it_does_not_do(rig):
    for options in ({"do_sample": True}, {"repetition_penalty": 1.5}, {"texts": ["the sea", "a ship"]}):
        with pytest.raises(ParameterError, match="leave sampling"):
            rig.generate(select="server", **options)
    with pytest.raises(ParameterError, match="one of client, server"):
        rig.client.begin([[2]], select="oracle")
    with pytest.raises(ParameterError, match="one prompt at a time"):
        rig.client.begin([[2], [3]], select="server")
    generation = rig.client.begin([[2, 3]], select="server")
    with pytest.raises(GenerationError, match="the server picks"):
        rig.client.server.open(rig.client.encrypted_token(generation.name, 2, [3]))
