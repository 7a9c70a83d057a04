"""Checkpoints: atomic, with the one before kept; damage, full disks and two writers are typed errors that lose nothing."""

import errno
import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from hf_he import serialization
from hf_he.errors import CheckpointError, CorruptFileError
from hf_he.finetuning.checkpoint import CURRENT, PREVIOUS, Checkpoint, CheckpointStore
from hf_he.finetuning.protocol import RunId, TrainingSettings
from hf_he.protocol import Identity

CHECKPOINT = Checkpoint(
    Identity("simulator", "0" * 16, "1" * 16, "2" * 16),
    RunId("3" * 16, "4" * 32),
    1,
    TrainingSettings(),
    b"weights",
    {"m": b"first", "v": b"second"},
    b"answer",
)


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path, lock_seconds=0.0)
    yield store
    store.close()


def test_round_trip_and_the_one_before(store):
    assert store.load() is None
    for step in (1, 2, 3):
        store.save(replace(CHECKPOINT, step=step))
    assert store.load() == replace(CHECKPOINT, step=3)
    assert store.load(2) == replace(CHECKPOINT, step=2)
    with pytest.raises(CheckpointError, match="it is of step 2, other ranks are at 1"):
        store.load(1)


def test_a_rank_that_falls_back_again_and_again_keeps_the_step_the_others_are_at(store):
    store.save(CHECKPOINT)
    for _ in range(3):
        store.save(replace(CHECKPOINT, step=2))
        assert store.load(1) == CHECKPOINT


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one_and_says_so(tmp_path, damage):
    said = []
    store = CheckpointStore(tmp_path, said.append)
    store.save(CHECKPOINT)
    store.save(replace(CHECKPOINT, step=2))
    path = tmp_path / CURRENT
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-5], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage])
    assert store.load() == CHECKPOINT
    assert damage == "gone" or ("previous checkpoint, step 1" in said[0] and str(path) in said[0])
    assert (tmp_path / CURRENT).exists() and not (tmp_path / PREVIOUS).exists()
    for name in (CURRENT, PREVIOUS):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        store.load()
    store.close()


@pytest.mark.parametrize("moment", ["write", "fsync", "link", "replace"])
def test_a_full_disk_is_an_error_and_the_previous_checkpoint_stays(store, tmp_path, monkeypatch, moment):
    store.save(CHECKPOINT)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        write = staticmethod(full)

    with monkeypatch.context() as patched:
        patched.setattr(serialization.os, "fdopen" if moment == "write" else moment, Full if moment == "write" else full)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left on device.* the one before it is intact"):
            store.save(replace(CHECKPOINT, step=2))
    assert store.load() == CHECKPOINT
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    store.save(replace(CHECKPOINT, step=2))
    assert store.load().step == 2


def test_a_process_killed_while_writing_leaves_a_whole_checkpoint(tmp_path):
    """kill -9 after every prefix of the steps of a write: what is found afterwards is step 1 or step 2, whole."""
    program = """
import os, sys
from dataclasses import replace
sys.path[:0] = sys.argv[2:]
from test_checkpoint import CHECKPOINT
from hf_he.finetuning.checkpoint import CheckpointStore
store, calls = CheckpointStore(sys.argv[1], lock_seconds=30), 0
store.save(CHECKPOINT)
for left in range(6):
    child = os.fork()
    if child == 0:
        def killing(function):
            def call(*args, **kwargs):
                global left
                if left == 0:
                    os.kill(os.getpid(), 9)
                left -= 1
                return function(*args, **kwargs)
            return call
        for name in ("fsync", "link", "replace", "fdopen"):
            setattr(os, name, killing(getattr(os, name)))
        store.save(replace(CHECKPOINT, step=2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = store.load()
    assert found in (CHECKPOINT, replace(CHECKPOINT, step=2)), found
    print(status, found.step)
    store.save(CHECKPOINT)
"""
    folder = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert outcomes[0] == (9, 1) and outcomes[-1] == (0, 2) and {step for _, step in outcomes} == {1, 2}


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    (tmp_path / f".{CURRENT}.abc").write_bytes(b"half")
    CheckpointStore(tmp_path).close()
    assert not (tmp_path / f".{CURRENT}.abc").exists()


def test_two_processes_cannot_train_in_one_folder(store, tmp_path):
    with pytest.raises(CheckpointError, match="another process still trains"):
        CheckpointStore(tmp_path, lock_seconds=0.0)
    store.close()
    again = CheckpointStore(tmp_path, lock_seconds=0.0)
    again.close()
    store._lock = os.open(tmp_path, os.O_RDONLY)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot use the checkpoint folder"):
        CheckpointStore(tmp_path / "file" / "below")


def test_a_checkpoint_without_its_parts_is_corrupt():
    arrays, metadata = serialization.unpack(CHECKPOINT.to_bytes(), "finetune_checkpoint")
    for name in ("weights", "settings", "answer"):
        with pytest.raises(CorruptFileError):
            Checkpoint.from_bytes(serialization.pack("finetune_checkpoint", {key: value for key, value in arrays.items() if key != name}, metadata))
