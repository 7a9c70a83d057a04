"""Secret key material: in no text, no copy, no server object, no message and no file but the client's own."""

import ast
import copy
import gc
import io
import json
import logging
import os
import pickle
import pprint
import stat
import traceback
from dataclasses import asdict, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from mutation import seal, table_of
from tiny_model import SENTENCES, save_tiny_model

import hf_he.ckks
from hf_he.backends import EvaluationKeys, get_backend
from hf_he.ckks.parameters import parameter_set
from hf_he.client import Client
from hf_he.errors import HEError, ParameterError, SecretKeyOnServerError, WrongKeyError
from hf_he.keys import Keys, ServerKeys
from hf_he.local_server import local_server
from hf_he.remote import RemoteServer
from hf_he.serialization import pack_residues, unpack
from hf_he.server import Server

WINDOW = 64


@pytest.fixture(scope="module")
def backend():
    return get_backend("native", parameter_set("n13"))


@pytest.fixture(scope="module")
def keys(backend):
    return Keys.generate(backend, {1, 2})


def windows(array):
    """Three runs of WINDOW entries as bytes: 100 bits of a ternary secret and more, so a match is no accident."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return [flat[start : start + WINDOW].tobytes() for start in (0, flat.size // 2, flat.size - WINDOW)]


def forms(secret, context):
    """Every form in which the secret could be written: coefficients in all dtypes and both orders, their residues, and the NTT form, packed or not."""
    coefficients, chain = secret._coefficients, context.chain
    found = []
    for ordered in (coefficients, coefficients[context.order], -coefficients, coefficients + 1):
        found += [window for dtype in ("i1", "i2", "i4", "i8", "f4", "f8") for window in windows(ordered.astype(dtype))]
        found.append(str(ordered[:WINDOW].tolist()).encode())
        found.append(" ".join(str(v) for v in ordered[:WINDOW]).encode())
    for k, modulus in enumerate(chain):
        rows = secret._rows[k]
        rows = np.where(rows > modulus // 2, rows - modulus, rows)
        rows = np.where(rows < -(modulus // 2), rows + modulus, rows)
        for values in (coefficients.astype(float), rows):
            packed = pack_residues(values, modulus)
            width = packed.shape[-1]
            found += [packed.reshape(-1)[start : start + WINDOW * width].tobytes() for start in (0, packed.size // 2 // width * width)]
            found += windows(values) + windows(np.mod(values, modulus).astype("i8"))
        found += windows(secret._rows[k])
    return set(found)


@pytest.fixture(scope="module")
def needles(keys, backend):
    return forms(keys.secret, backend.context)


def leaked(data: bytes, needles) -> bool:
    return any(needle in data for needle in needles)


def test_the_search_finds_what_it_looks_for(keys, backend, needles):
    """The secret-key file itself, NTT rows and packed rows are all recognised; public files are not."""
    assert leaked(backend.serialize(keys.secret, allow_secret=True), needles)
    assert leaked(keys.secret._rows.tobytes(), needles)
    assert leaked(b"x" + pack_residues(keys.secret._coefficients.astype(float), backend.context.chain[1]).tobytes(), needles)
    for public in (keys.public, keys.evaluation.evaluation, backend.encrypt(np.zeros(backend.parameters.slots), keys.secret)):
        assert not leaked(backend.serialize(public), needles)


class TestText:
    def test_every_way_of_printing_shows_the_id_only(self, keys):
        for item in (keys.secret, keys):
            expected = f"{type(item).__name__}(key_id={keys.key_id!r})"
            texts = (repr(item), str(item), f"{item}", f"{item!r}", "%s" % item, "{}".format(item), pprint.pformat(item), ascii(item))  # noqa: UP031, UP032
            assert set(texts) == {expected}
            assert f"{[item]}" == f"[{expected}]"
        for item in (keys.public, keys.evaluation, keys.evaluation.evaluation, keys.secret.key_id):
            assert len(repr(item)) < 2000 and "array" not in repr(item)

    def test_logging(self, keys, needles):
        stream = io.StringIO()
        logger = logging.Logger("trust")
        logger.addHandler(logging.StreamHandler(stream))
        logger.warning("key %s of %r: %s", keys.secret, keys, {"secret": keys.secret})
        try:
            raise ValueError(keys.secret)
        except ValueError:
            logger.exception("failed")
        assert not leaked(stream.getvalue().encode(), needles) and keys.key_id in stream.getvalue()

    def test_exceptions_and_tracebacks(self, backend, keys, needles):
        """Every error that an operation on a secret key can raise, printed with its whole traceback."""
        other = Keys.generate(backend, set())
        simulator = get_backend("simulator", backend.parameters)
        stranger = get_backend("native", parameter_set("n14"))
        ct = backend.encrypt(np.zeros(backend.parameters.slots), keys.secret)
        attempts = (
            lambda: backend.decrypt(ct, other.secret),
            lambda: stranger.decrypt(ct, keys.secret),
            lambda: backend.encrypt(np.full(backend.parameters.slots, np.nan), keys.secret),
            lambda: backend.encrypt(np.zeros(3), keys.secret),
            lambda: backend.serialize(keys.secret),
            lambda: simulator.serialize(keys.secret),
            lambda: stranger.generate_evaluation_keys(keys.secret, [1]),
            lambda: backend.load_evaluation_keys(keys.secret),
            lambda: backend.deserialize(backend.serialize(keys.secret, allow_secret=True), "evaluation_keys"),
            lambda: backend.deserialize(backend.serialize(keys.secret, allow_secret=True)[:-3], "secret_key"),
            lambda: Server("nowhere", keys),
        )
        for attempt in attempts:
            with pytest.raises(HEError) as caught:
                attempt()
            text = "".join(traceback.format_exception(caught.value))
            assert not leaked(text.encode(), needles) and len(str(caught.value)) < 1000

    def test_copies(self, keys):
        attempts = [lambda item, p=p: pickle.dumps(item, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
        attempts += [copy.copy, copy.deepcopy, ForkingPickler.dumps, json.dumps, lambda item: torch.save(item, io.BytesIO())]
        attempts += [lambda item: np.save(io.BytesIO(), np.array([item], dtype=object)), lambda item: pickle.dumps({"nested": [item]})]
        for item in (keys.secret, keys):
            for attempt in attempts:
                with pytest.raises(TypeError):
                    attempt(item)
        with pytest.raises(TypeError):
            asdict(keys)


class TestServerObjects:
    @pytest.mark.parametrize("name", ["native", "simulator"])
    def test_no_form_of_a_secret_key_makes_a_server(self, name, tmp_path):
        backend = get_backend(name, parameter_set("n13"))
        keys = Keys.generate(backend, {1})
        keys.save(tmp_path)
        data = (tmp_path / "secret.key").read_bytes()
        (tmp_path / "evaluation.keys").write_bytes(data)
        evaluation = keys.evaluation.evaluation
        forms = [
            keys.secret,
            keys,
            data,
            bytearray(data),
            memoryview(data),
            tmp_path / "secret.key",
            str(tmp_path / "secret.key"),
            tmp_path / "evaluation.keys",
        ]
        for form in forms:
            with pytest.raises(SecretKeyOnServerError):
                Server("nowhere", form)
        for field in ("payload", "bootstrapping"):
            with pytest.raises(SecretKeyOnServerError):
                ServerKeys(name, backend.parameters, replace(evaluation, **{field: keys.secret}))
            with pytest.raises(SecretKeyOnServerError):
                get_backend(name, backend.parameters).load_evaluation_keys(replace(evaluation, **{field: keys.secret}))
        with pytest.raises(SecretKeyOnServerError):
            ServerKeys(name, backend.parameters, keys.secret)
        with pytest.raises(SecretKeyOnServerError):
            ServerKeys(name, backend.parameters, keys)
        with pytest.raises(SecretKeyOnServerError):
            get_backend(name, backend.parameters).load_evaluation_keys(keys.secret)

    def test_a_secret_key_relabelled_as_evaluation_keys_is_refused(self, backend, keys):
        arrays, metadata = unpack(backend.serialize(keys.secret, allow_secret=True), "secret_key")
        with pytest.raises(HEError):
            ServerKeys.load(seal("evaluation_keys", *table_of(arrays), metadata | {"conjugation": "0"}))
        arrays, metadata = unpack(backend.serialize(keys.evaluation.evaluation), "evaluation_keys")
        with pytest.raises(HEError):
            ServerKeys.load(seal("evaluation_keys", *table_of(arrays | {"coefficients": keys.secret._coefficients}), metadata))

    def test_nothing_reachable_from_a_server_backend_is_secret(self, keys, backend, needles):
        """Every object and array that a backend with evaluation keys read from their bytes leads to, in the process that also held the secret."""
        server = get_backend("native", backend.parameters)
        server.load_evaluation_keys(ServerKeys.load(keys.evaluation.to_bytes()).evaluation)
        backend.decrypt(backend.encrypt(np.ones(backend.parameters.slots), keys.secret), keys.secret)
        seen, waiting = set(), [vars(server)]
        while waiting:
            item = waiting.pop()
            if id(item) in seen or isinstance(item, type) or type(item).__name__ in ("module", "function"):
                continue
            seen.add(id(item))
            assert not isinstance(item, type(keys.secret))
            if isinstance(item, np.ndarray) and item.dtype != object:
                assert not leaked(item.tobytes(), needles)
            waiting += gc.get_referents(item)
        assert len(seen) > 50


class TestFiles:
    def test_modes_do_not_depend_on_the_umask_or_on_what_was_there(self, keys, tmp_path):
        old = os.umask(0)
        try:
            folder = tmp_path / "keys"
            keys.save(folder)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "secret.key").chmod(0o666)
            keys.save(folder)
        finally:
            os.umask(old)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {"secret.key": 0o600, "public.key": 0o644, "evaluation.keys": 0o444}

    def test_only_the_secret_key_file_holds_the_secret(self, keys, tmp_path, needles):
        keys.save(tmp_path)
        holding = {path.name for path in tmp_path.iterdir() if leaked(path.read_bytes(), needles)}
        assert holding == {"secret.key"}

    def test_serialising_takes_a_decision(self, keys, backend):
        with pytest.raises(SecretKeyOnServerError, match="allow_secret=True"):
            backend.serialize(keys.secret)

    def test_evaluation_keys_of_another_pair_in_the_folder(self, keys, backend, tmp_path):
        keys.save(tmp_path)
        (tmp_path / "evaluation.keys").write_bytes(Keys.generate(backend, {1, 2}).evaluation.to_bytes())
        with pytest.raises(WrongKeyError, match="mixes keys"):
            Keys.load(tmp_path, with_evaluation=True)


@pytest.mark.slow
def test_a_whole_inference_between_two_processes(tmp_path, monkeypatch):
    """Native keys, a server process of its own, refreshes: every message in both directions and every file but secret.key is searched."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    model = save_tiny_model(tmp_path / "model")
    client = Client.from_pretrained(model, parameters="n14")
    keys = client.keygen()
    keys.save(tmp_path / "keys")
    needles = forms(keys.secret, client.backend.context)
    messages, request = [], RemoteServer._request

    def recorded(self, method, path, **arguments):
        answer = request(self, method, path, **arguments)
        messages.append(repr((method, path, arguments.get("params"), dict(answer.headers))).encode() + arguments.get("content", b"") + answer.content)
        return answer

    monkeypatch.setattr(RemoteServer, "_request", recorded)
    with local_server(model, tmp_path / "keys" / "evaluation.keys") as server:
        assert client.infer(server, SENTENCES[:1]).agreement == 1.0
    assert len(messages) > 5 and sum(map(len, messages)) > 2**20
    assert not any(leaked(message, needles) for message in messages)
    text = SENTENCES[0].encode()
    assert not any(text in message for message in messages)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files if leaked(path.read_bytes(), needles)} == {"secret.key"}
    assert not any(text in path.read_bytes() for path in files)


class TestRandomness:
    @pytest.mark.parametrize("half", ["secret", "public"])
    def test_equal_messages_have_different_ciphertexts(self, backend, keys, half):
        message = np.ones((2, backend.parameters.slots))
        a, b = (backend.encrypt(message, getattr(keys, half)).payload.values for _ in range(2))
        for x, y in ((a[0], b[0]), (a[0], a[1]), (a[1], b[1])):
            assert (x != y).mean() > 0.999
        assert backend.serialize(backend.encrypt(message, keys.secret)) != backend.serialize(backend.encrypt(message, keys.secret))

    def test_equal_calls_have_different_keys(self, backend):
        first, second = (Keys.generate(backend, {1}) for _ in range(2))
        assert first.key_id != second.key_id and (first.secret._coefficients != second.secret._coefficients).mean() > 0.6
        assert (first.public.a != second.public.a).mean() > 0.999

    def test_seeding_numpy_python_and_torch_changes_nothing(self, backend, keys):
        import random

        outputs = []
        for _ in range(2):
            np.random.seed(0)
            random.seed(0)
            torch.manual_seed(0)
            outputs.append((backend.generate_secret_key()._coefficients.tobytes(), backend.serialize(backend.encrypt(np.ones(4096), keys.public))))
        assert outputs[0][0] != outputs[1][0] and outputs[0][1] != outputs[1][1]

    def test_seeds_of_secret_randomness_are_never_written(self, backend, monkeypatch):
        """Of all operating-system randomness drawn, files hold the seeds of uniform halves only, each used once."""
        drawn, urandom = [], os.urandom

        def recorded(count):
            drawn.append(urandom(count))
            return drawn[-1]

        monkeypatch.setattr(os, "urandom", recorded)
        keys = Keys.generate(backend, {1, 2})
        message = np.zeros((2, backend.parameters.slots))
        items = [keys.public, keys.evaluation.evaluation, backend.encrypt(message, keys.secret), backend.encrypt(message, keys.public)]
        monkeypatch.undo()
        data = b"".join(backend.serialize(item) for item in items)
        draws = [draw[i : i + 32] for draw in drawn for i in range(0, len(draw), 32)]
        assert len(set(draws)) == len(draws)
        public = [draw for draw in draws if draw in data]
        uniform_halves = 1 + 3 + 2
        assert len(public) == uniform_halves and all(data.count(seed) == 1 for seed in public)
        assert len(draws) >= uniform_halves + 1 + 1 + 3 + 1 + 3

    def test_the_engine_reaches_no_other_generator(self):
        """Statically: nothing in hf_he.ckks names numpy's, torch's or Python's generators, clocks a seed, or fixes one."""
        files = sorted(Path(hf_he.ckks.__file__).parent.rglob("*.py"))
        assert len(files) > 15
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                where = f"{path.name}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Import):
                    assert not {alias.name.split(".")[0] for alias in node.names} & {"random", "torch", "secrets", "uuid"}, where
                elif isinstance(node, ast.ImportFrom):
                    assert node.module not in ("random", "torch", "numpy.random", "scipy.stats") and not (node.module or "").startswith("torch."), where
                elif isinstance(node, ast.Attribute):
                    assert node.attr not in ("random", "default_rng", "RandomState", "manual_seed", "randn", "rand", "randint"), where
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Stream" and path.name != "random.py":
                    assert not node.args and not node.keywords, f"{where}: secret randomness comes from a fresh operating-system seed"


def test_parameters_of_another_backend_are_no_way_in(backend, keys):
    """Evaluation keys made for the simulator cannot be loaded into the engine, nor those of the engine under a forged identity."""
    with pytest.raises(ParameterError):
        backend.load_evaluation_keys(EvaluationKeys(None, keys.key_id, frozenset({1})))
