"""Weights, activations and attention heads divided among ranks: each computes its own share only, and all hold what one process computes."""

import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from laboratory import Lab
from tiny_model import SENTENCES, save_tiny_model

from hf_he.approximation import fit_polynomial, kernel_exponential
from hf_he.backends import Ciphertext, get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.client import Client
from hf_he.errors import HEError, RefreshError
from hf_he.finetuning.parallel import Workers
from hf_he.keys import EVALUATION_FILE
from hf_he.local_server import local_servers
from hf_he.ops import activation, feature_major_attention, linear
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import Packing
from hf_he.refresh import ClientRefresh
from hf_he.server import Server
from hf_he.sharding import Shards

RANKS = 3


class Threads:
    """`RANKS` groups of Workers that exchange bytes between threads."""

    def __init__(self) -> None:
        self.slots: list[bytes] = [b""] * RANKS
        self.barrier = threading.Barrier(RANKS, timeout=60)

    def workers(self, rank: int) -> Workers:
        outer = self

        class Joined(Workers):
            def all_gather(self, data: bytes) -> list[bytes]:
                outer.slots[rank] = data
                outer.barrier.wait()
                found = list(outer.slots)
                outer.barrier.wait()
                return found

        return Joined(rank, RANKS)

    def run(self, function) -> list:
        """function(workers) of every rank: what it returns or raises."""
        found = [None] * RANKS

        def job(rank: int) -> None:
            try:
                found[rank] = function(self.workers(rank))
            except HEError as error:
                found[rank] = error
            except ZeroDivisionError as error:
                found[rank] = error

        threads = [threading.Thread(target=job, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return found


@pytest.fixture(scope="module")
def party():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = CKKSParameters.from_bits(11, 50, 40, 3, 50, 2, insecure=True)
        backend = get_backend("simulator", parameters)
    secret = backend.generate_secret_key()
    return backend, secret, backend.generate_evaluation_keys(secret, range(1, parameters.slots))


@pytest.mark.parametrize("features", [8, 1])
@pytest.mark.parametrize("out", [40, 8, 3])
def test_ranks_hold_their_own_blocks_and_the_whole_result(party, features, out):
    backend, secret, keys = party
    packing = Packing.fit(backend.parameters.slots, features, 16)
    generator = np.random.default_rng(1)
    weight, bias = torch.from_numpy(generator.normal(size=(out, 16)) / 4), torch.from_numpy(generator.normal(size=out))
    blocks = packing.blocks(16)
    state = backend.encrypt(generator.uniform(-1, 1, (blocks, backend.parameters.slots)), secret, 2)

    def layer(workers: Workers | None):
        own = get_backend("simulator", backend.parameters)
        own.load_evaluation_keys(keys)
        context = OperationContext(own, packing)
        context.shards = None if workers is None else Shards(own, workers)
        source = Operand(context, 16, own.deserialize(backend.serialize(state), "ciphertext"))
        result = linear.WaitingLinear(source, weight, bias).ciphertext
        encoded = [plain for *_, plain in context._plaintexts.values() if len(plain.batch_shape) == 2]
        return own.decrypt(result, secret), sum(plain.batch_shape[0] for plain in encoded)

    alone, whole = layer(None)
    found = Threads().run(layer)
    for values, _ in found:
        np.testing.assert_allclose(values, alone, atol=1e-6)
    if features > 1:
        assert sum(count for _, count in found) == whole
        assert max(count for _, count in found) <= -(-whole * -(-packing.blocks(out) // RANKS) // packing.blocks(out))


HEADS, HEAD_DIM, TOKENS = 5, 2, 8


def of_heads(context: OperationContext, states: Ciphertext, levels: AttentionLevels) -> Ciphertext:
    """Attention and an activation of one feature per ciphertext: [HEADS * HEAD_DIM] from as many."""
    features = HEADS * HEAD_DIM
    weights = torch.from_numpy(np.random.default_rng(2).normal(size=(3, features, features)) / 6)
    source = Operand(context, features, states)
    maps = [linear.WaitingLinear(source, weight, None) for weight in weights]
    approximation = kernel_exponential((-4.0, 0.0), 3)
    out = feature_major_attention.encrypted(context, *maps, None, HEADS, HEAD_DIM**-0.5, approximation, levels)
    return activation.evaluated(context, context.ensure_level(out, 4), fit_polynomial("tanh", (-1.0, 1.0), 5))


def test_ranks_take_heads_and_ask_the_client_for_their_own_scores():
    """Five heads on three ranks, so that one is done before the others' last refresh; the client answers as often as one process asks it."""
    lab = Lab(rotations=feature_major_attention.rotations(Packing.fit(1024, 1, TOKENS)), features=1)
    states = lab.backend.encrypt(lab.random(HEADS * HEAD_DIM, lab.packing.slots).numpy() / 4, lab.secret)
    asked = []

    def layer(workers: Workers | None):
        own = get_backend("simulator", lab.backend.parameters)
        own.load_evaluation_keys(lab.backend.evaluation_keys)

        def client(question: bytes) -> bytes:
            if workers is not None and not workers.first:
                return workers.broadcast(b"")
            asked.append(question)
            return lab.refresh(question) if workers is None else workers.broadcast(lab.refresh(question))

        shards = None if workers is None else Shards(own, workers)
        context = OperationContext(own, lab.packing, ClientRefresh(client if shards is None else shards.ask))
        context.shards = shards
        if shards is not None:
            shards.client = client
        out = of_heads(context, own.deserialize(lab.backend.serialize(states), "ciphertext"), AttentionLevels())
        return lab.backend.decrypt(out, lab.secret), own.log.operations()["rotate"]

    alone, rotations = layer(None)
    expected = len(asked)
    found = Threads().run(layer)
    assert len(asked) == 2 * expected > 2 * HEADS
    for values, _ in found:
        np.testing.assert_array_equal(values, found[0][0])
        np.testing.assert_allclose(values, alone, atol=1e-4)
    assert [count * HEADS // rotations for _, count in found] == [1, 2, 2]


def test_a_client_that_gives_up_stops_all_ranks_alike(party):
    """Rank 0 has nothing left to compute, rank 1 asks, rank 2 still computes."""
    backend, secret, _ = party
    ct = backend.encrypt(np.zeros((1, backend.parameters.slots)), secret, 1)

    def work(workers: Workers):
        shards = Shards(backend, workers)

        def client(question: bytes) -> bytes:
            raise RefreshError("gave up")

        def compute(own: range) -> Ciphertext:
            if own.start:
                shards.ask(b"question")
            return ct

        shards.client = client
        with pytest.raises(RefreshError, match="gave up"):
            shards.concatenate(RANKS, compute)
        return shards.concatenate(RANKS, lambda own: ct).batch_shape

    assert Threads().run(work) == [(RANKS,)] * RANKS


HEADS_OF_A_RANK = """
import json, sys
sys.path.insert(0, sys.argv[2])
from test_sharding import TOKENS, of_heads
from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.finetuning.parallel import Workers
from hf_he.ops.context import OperationContext
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import Packing
from hf_he.sharding import Shards
folder = sys.argv[1]
backend = get_backend("native", CKKSParameters.from_dict(json.load(open(f"{folder}/parameters.json")), insecure=True))
backend.load_evaluation_keys(backend.deserialize(open(f"{folder}/keys", "rb").read(), "evaluation_keys"))
context = OperationContext(backend, Packing.fit(backend.parameters.slots, 1, TOKENS))
workers = Workers.from_environment(timeout=120)
context.shards = Shards(backend, workers)
states = backend.deserialize(open(f"{folder}/states", "rb").read(), "ciphertext")
open(f"{folder}/out-{workers.rank}", "wb").write(backend.serialize(of_heads(context, states, AttentionLevels(10, 5))))
"""


def test_two_processes_compute_the_bits_of_one(tmp_path):
    """gloo, native ciphertexts, no refresh: heads, projections and activation."""
    lab = Lab(rotations=feature_major_attention.rotations(Packing.fit(1024, 1, TOKENS)), features=1, levels=11, backend="native")
    states = lab.backend.encrypt(lab.random(HEADS * HEAD_DIM, lab.packing.slots).numpy() / 4, lab.secret)
    (tmp_path / "parameters.json").write_text(json.dumps(lab.backend.parameters.to_dict()))
    (tmp_path / "keys").write_bytes(lab.backend.serialize(lab.backend.evaluation_keys))
    (tmp_path / "states").write_bytes(lab.backend.serialize(states))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", HEADS_OF_A_RANK, str(tmp_path), str(Path(__file__).parent)]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE) for rank in range(2)]
    alone = lab.backend.serialize(of_heads(OperationContext(lab.backend, lab.packing), states, AttentionLevels(10, 5)))
    errors = [process.communicate(timeout=300)[1].decode()[-500:] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert (tmp_path / "out-0").read_bytes() == (tmp_path / "out-1").read_bytes() == alone


def test_a_rank_that_fails_stops_the_others(party):
    backend, secret, _ = party
    ct = backend.encrypt(np.zeros((2, backend.parameters.slots)), secret, 1)

    def work(workers: Workers):
        return Shards(backend, workers).concatenate(RANKS, lambda own: ct if own.start != 1 else 1 / 0)

    errors = Threads().run(work)
    assert isinstance(errors[1], ZeroDivisionError)
    assert all("rank 1 could not compute its share" in str(error) for error in (errors[0], errors[2]))


def test_two_processes_serve_one_model(tmp_path, monkeypatch):
    """gloo, a child process per rank: the logits of one process in both packings, and a client that gives up leaves both ready for the next batch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = save_tiny_model(tmp_path / "model")
    client = Client.from_pretrained(model, backend="simulator")
    keys = client.keygen()
    keys.save(tmp_path / "keys")
    expected = client.infer(Server(model, keys.evaluation), SENTENCES)
    with local_servers(model, tmp_path / "keys" / EVALUATION_FILE, processes=2) as (server,):
        assert server.describe()["key_id"] == keys.key_id
        batch = client.encrypt(client.prepare(SENTENCES)).to_bytes()
        with pytest.raises(HEError):
            server.infer(batch, lambda question: b"no ciphertext")
        result = client.infer(server, SENTENCES)
        one_feature = Client.from_pretrained(model, keys=keys, features=1).infer(server, SENTENCES)
    assert result.agreement == one_feature.agreement == 1.0
    assert one_feature.max_logit_error < 1e-3
    for ours, theirs in zip(result.sentences, expected.sentences, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
