"""Secret keys stay with the client, and key files belong together."""

import copy
import pickle

import pytest
from tiny_model import keyed_client

from hf_he.errors import CorruptFileError, ParameterError, SecretKeyOnServerError, WrongKeyError
from hf_he.keys import Keys, ServerKeys
from hf_he.local_server import local_server
from hf_he.server import Server


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

    def test_a_secret_key_that_others_can_read_is_reported(self, key_folder, tmp_path):
        for name in ("secret.key", "public.key"):
            (tmp_path / name).write_bytes((key_folder / name).read_bytes())
        (tmp_path / "secret.key").chmod(0o640)
        with pytest.warns(UserWarning, match="mode 0640.*chmod 600"):
            Keys.load(tmp_path)

    def test_mixed_key_folders_are_refused(self, model, key_folder, tmp_path):
        keyed_client(model).keys.save(tmp_path)
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
