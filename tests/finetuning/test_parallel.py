"""Two real processes: the same sum in the same bits on both, failures that reach everyone, and the adapter of one process."""

import json
import os
import socket
import subprocess
import sys
import warnings
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import error_of

from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import CheckpointError, HEError
from hf_he.finetuning.checkpoint import CURRENT, Checkpoint
from hf_he.finetuning.parallel import Workers, share
from hf_he.remote import connect

REDUCE = """
import json, sys
from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import HEError
from hf_he.finetuning.parallel import Workers
folder, name = sys.argv[1:]
backend = get_backend(name, CKKSParameters.from_dict(json.load(open(f"{folder}/parameters.json")), insecure=True))
workers = Workers.from_environment(timeout=60)
part = backend.deserialize(open(f"{folder}/part-{workers.rank}", "rb").read(), "ciphertext")
open(f"{folder}/sum-{workers.rank}", "wb").write(backend.serialize(workers.all_reduce(backend, part)))
assert workers.broadcast(b"from rank %d" % workers.rank) == b"from rank 0"
try:
    workers.all_reduce(backend, None if workers.rank == 1 else part)
except HEError as error:
    open(f"{folder}/error-{workers.rank}", "w").write(str(error))
"""


@pytest.mark.parametrize("name", ["simulator", "native"])
def test_all_ranks_hold_the_same_bits_of_the_sum(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = CKKSParameters.from_bits(11, 50, 40, 2, special_bits=50, special_count=1, insecure=True)
    backend = get_backend(name, parameters)
    secret = backend.generate_secret_key()
    values = np.random.default_rng(0).normal(size=(2, 3, parameters.slots))
    for rank, part in enumerate(values):
        (tmp_path / f"part-{rank}").write_bytes(backend.serialize(backend.encrypt(part, secret, 1)))
    (tmp_path / "parameters.json").write_text(json.dumps(parameters.to_dict()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", REDUCE, str(tmp_path), name]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE) for rank in range(2)]
    assert [(process.wait(120), process.stderr.read().decode()[-500:])[0] for process in ranks] == [0, 0]
    sums = [(tmp_path / f"sum-{rank}").read_bytes() for rank in range(2)]
    assert sums[0] == sums[1]
    np.testing.assert_allclose(backend.decrypt(backend.deserialize(sums[0], "ciphertext"), secret), values.sum(0), atol=1e-5)
    for rank in range(2):
        assert "rank 1 could not compute its share" in (tmp_path / f"error-{rank}").read_text()


@given(items=st.integers(0, 50), size=st.integers(1, 9))
def test_shares_are_fair_and_complete(items, size):
    parts = [share(items, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_alone_sends_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    workers = Workers.from_environment()
    assert (workers.first, workers.size, workers.broadcast(b"x"), workers.all_gather(b"y")) == (True, 1, b"x", [b"y"])


def test_ranks_that_cannot_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(HEError, match="could not find each other"):
        Workers.from_environment(timeout=1)


def test_a_rank_without_its_checkpoint(run_in_process, in_process):
    """Rank 1 of 2 has none while rank 0 is at step 1."""
    run_in_process(max_steps=1)

    class Other(Workers):
        def all_gather(self, data):
            return [data, b"-1"]

    with pytest.raises(CheckpointError, match="with as many processes as the run began with"), in_process(workers=Other(0, 2)):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("features", [None, 1])
def test_two_server_processes_train_the_adapter_of_one(new_trainer, features):
    """Against the plaintext twin, which one process equals too (test_trainer); the second run resumes both ranks."""
    first = new_trainer(processes=2, max_steps=2, features=features)
    first.train()
    assert error_of(first) < 1e-4 and len(first.reports) == 4
    again = new_trainer(processes=2, max_steps=2, features=features)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and error_of(again) < 1e-4


@pytest.mark.slow
def test_accelerate_launch(new_trainer, tiny, tmp_path):
    """The command of the recipe: two ranks, whose adapters are the same bits and the plaintext twin's to CKKS precision."""
    keys = new_trainer().prepare()
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launcher, "-m", "hf_he", "serve", "--finetune", str(tmp_path / "ranks"), "--evaluation-keys", str(keys)]
    with (tmp_path / "log").open("wb") as log:
        ranks = subprocess.Popen([*command, "--model", str(tiny), "--port", "0", "--announce"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    try:
        line = ranks.stdout.readline()
        assert line, (tmp_path / "log").read_text()[-1000:]
        with ExitStack() as stack:
            servers = [stack.enter_context(connect(url)) for url in json.loads(line)["urls"]]
            trainer = new_trainer(servers=servers)
            trainer.train(resume_from_checkpoint=True)
        assert len(servers) == 2 and error_of(trainer) < 1e-4
        first, second = (Checkpoint.from_bytes((tmp_path / "ranks" / rank / CURRENT).read_bytes()) for rank in ("", "rank-1"))
        assert first.step == second.step == 2 and first.weights == second.weights and first.state == second.state
    finally:
        ranks.stdin.close()
        ranks.terminate()
        ranks.wait(60)
        ranks.stdout.close()
