"""What a training server keeps on disk: the encrypted adapter and optimiser state after a step, whole at every moment.

    folder/checkpoint   the last finished step       folder/previous   the one before it       folder/lock   held by the process that writes them

A checkpoint holds ciphertexts and public settings only. It is written to a temporary file, flushed to the disk, and renamed; a step is
answered after that. A process killed at any moment has therefore lost at most the step in flight.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hf_he.errors import CheckpointError, HEError
from hf_he.finetuning.protocol import RunId, TrainingSettings
from hf_he.protocol import Identity, as_array, as_bytes
from hf_he.serialization import pack, read_file, rename, unpack, write_file

CHECKPOINT_KIND = "finetune_checkpoint"
CURRENT, PREVIOUS, LOCK = "checkpoint", "previous", "lock"
LOCK_SECONDS = 60.0
_STATE = "state."


@dataclass(frozen=True)
class Checkpoint:
    """The run after `step` finished steps: serialised ciphertexts of the dense weights and of every entry of the optimiser's state.

    `answer` is what the client was or will be answered for that step, so that a repeated request costs nothing.
    """

    identity: Identity
    run: RunId
    step: int
    settings: TrainingSettings
    weights: bytes = field(repr=False)
    state: Mapping[str, bytes] = field(repr=False)
    answer: bytes = field(repr=False, default=b"")

    def to_bytes(self) -> bytes:
        arrays = {"weights": as_array(self.weights), "answer": as_array(self.answer), "settings": as_array(self.settings.to_bytes())}
        arrays |= {_STATE + name: as_array(data) for name, data in self.state.items()}
        return pack(CHECKPOINT_KIND, arrays, {**self.identity.to_metadata(), **self.run.to_metadata(), "step": str(self.step)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        arrays, metadata = unpack(data, CHECKPOINT_KIND)
        state = {name.removeprefix(_STATE): as_bytes(arrays, name) for name in arrays if name.startswith(_STATE)}
        settings = TrainingSettings.from_bytes(as_bytes(arrays, "settings"))
        step = RunId.step_of(metadata)
        return cls(
            Identity.from_metadata(metadata), RunId.from_metadata(metadata), step, settings, as_bytes(arrays, "weights"), state, as_bytes(arrays, "answer")
        )


class CheckpointStore:
    """The checkpoint folder of one server process. Raises CheckpointError when another live process holds it."""

    def __init__(self, folder: str | Path, announce: Callable[[str], None] = lambda text: None, lock_seconds: float = LOCK_SECONDS) -> None:
        self.folder = Path(folder)
        self._announce = announce
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"cannot use the checkpoint folder {self.folder} ({error.strerror}): choose a folder this server may write to") from None
        self._acquire(lock_seconds)
        for leftover in self.folder.glob(f".{CURRENT}.*"):
            leftover.unlink(missing_ok=True)

    def save(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError when it cannot be written; what was there is then still there."""
        try:
            write_file(self.folder / CURRENT, checkpoint.to_bytes(), keep=self.folder / PREVIOUS)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} could not be written to {self.folder} ({error.strerror}): "
                "the one before it is intact; make room or mend the disk, then resume"
            ) from None

    def load(self, step: int | None = None) -> Checkpoint | None:
        """The last whole checkpoint, or that of `step`; None in an empty folder. Falls back to the previous one with a message.

        The one it falls back to becomes the current one, so that saving the step after it keeps it as the previous one.
        Raises CheckpointError when there are files and none can be read, or none is of `step`.
        """
        failures = []
        for name in (CURRENT, PREVIOUS):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                checkpoint = Checkpoint.from_bytes(read_file(path, "checkpoint"))
            except HEError as error:
                failures.append(f"{path}: {error}")
                continue
            if step is not None and checkpoint.step != step:
                failures.append(f"{path}: it is of step {checkpoint.step}, other ranks are at {step}")
                continue
            if failures:
                self._announce(f"{failures[0]}; going on from the previous checkpoint, step {checkpoint.step}")
            if name == PREVIOUS:
                rename(path, self.folder / CURRENT)
            return checkpoint
        if failures:
            raise CheckpointError(f"no checkpoint can be read ({'; '.join(failures)}): start again in an empty folder")
        return None

    def close(self) -> None:
        os.close(self._lock)

    def _acquire(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > deadline:
                    os.close(self._lock)
                    raise CheckpointError(f"another process still trains in {self.folder}: wait until it ends, or choose another folder") from None
                time.sleep(0.1)
