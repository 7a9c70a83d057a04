"""Fixtures of tests of operations and models, and of a client and a server of one small model."""

import pytest
from laboratory import Lab
from tiny_model import SENTENCES, keyed_client, save_tiny_model

from hf_he.local_server import local_server
from hf_he.server import Server


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def make_lab():
    return Lab


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(model):
    return keyed_client(model)


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
    """The same server in a process of its own."""
    with local_server(model, key_folder / "evaluation.keys") as server:
        yield server


@pytest.fixture(scope="module")
def batch(client):
    return client.encrypt(client.prepare(SENTENCES))
