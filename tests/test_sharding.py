"""Weights divided among ranks: each encodes its own blocks only, and all hold what one process computes."""

import threading
import warnings

import numpy as np
import pytest
import torch
from tiny_model import SENTENCES, save_tiny_model

from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.client import Client
from hf_he.errors import HEError
from hf_he.finetuning.parallel import Workers
from hf_he.keys import EVALUATION_FILE
from hf_he.local_server import local_servers
from hf_he.ops import linear
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.packing import Packing
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
        encoded = [plain for _, plain in context._plaintexts.values() if len(plain.batch_shape) == 2]
        return own.decrypt(result, secret), sum(plain.batch_shape[0] for plain in encoded)

    alone, whole = layer(None)
    found = Threads().run(layer)
    for values, _ in found:
        np.testing.assert_allclose(values, alone, atol=1e-6)
    if features > 1:
        assert sum(count for _, count in found) == whole
        assert max(count for _, count in found) <= -(-whole * -(-packing.blocks(out) // RANKS) // packing.blocks(out))


def test_a_rank_that_fails_stops_the_others(party):
    backend, secret, _ = party
    ct = backend.encrypt(np.zeros((2, backend.parameters.slots)), secret, 1)

    def work(workers: Workers):
        return Shards(backend, workers).concatenate(RANKS, lambda own: ct if own.start != 1 else 1 / 0)

    errors = Threads().run(work)
    assert isinstance(errors[1], ZeroDivisionError)
    assert all("rank 1 could not compute its share" in str(error) for error in (errors[0], errors[2]))


def test_two_processes_serve_one_model(tmp_path, monkeypatch):
    """gloo, a child process per rank: the logits of one process, and a client that gives up leaves both ready for the next batch."""
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
    assert result.agreement == 1.0
    for ours, theirs in zip(result.sentences, expected.sentences, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
