"""A tiny model, a run of it, and servers in this process."""

from contextlib import contextmanager

import pytest
from tiny_model import save_tiny_model
from tiny_run import DATA, OPTIONS

from hf_he.finetuning.arguments import EncryptedTrainingArguments
from hf_he.finetuning.server import FinetuneServer
from hf_he.finetuning.trainer import EncryptedTrainer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def new_trainer(tiny, tmp_path):
    """A trainer of the tiny model; the same arguments and folder make one that can resume."""

    def build(folder="run", callbacks=(), servers=None, announce=lambda text: None, data=DATA, **options):
        args = EncryptedTrainingArguments(str(tmp_path / folder), **{**OPTIONS, **options})
        return EncryptedTrainer(tiny, args, data, data, callbacks=callbacks, servers=servers, announce=announce)

    return build


@pytest.fixture
def in_process(tiny, tmp_path):
    """A training server without a process of its own, on the keys and in the folder of a prepared run."""

    @contextmanager
    def serve(folder="run", **options):
        server = FinetuneServer(tiny, tmp_path / folder / "client" / "keys" / "evaluation.keys", tmp_path / folder / "server", **options)
        try:
            yield server
        finally:
            server.close()

    return serve


@pytest.fixture
def run_in_process(new_trainer, in_process):
    """Prepare, serve in this process, train to the end."""

    def run(folder="run", callbacks=(), data=DATA, **options):
        new_trainer(folder, data=data, **options).prepare()
        with in_process(folder) as server:
            trainer = new_trainer(folder, callbacks, [server], data=data, **options)
            trainer.train(resume_from_checkpoint=True)
        return trainer

    return run
