"""The client's folder of a training run: what names the run, and what ended it for good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_he.errors import CorruptFileError, RangeError, TrainingError
from hf_he.serialization import read_file, write_file

RUN_FILE, RANGE_FILE = "run.json", "out_of_range"


def read_run(folder: Path) -> dict[str, Any]:
    """What the run in `folder` began with. Raises CorruptFileError for a damaged file, TrainingError when a value of the run left its range."""
    path, failed = folder / RUN_FILE, folder / RANGE_FILE
    if failed.is_file():
        reason = read_file(failed, "reason").decode(errors="replace")
        raise TrainingError(f"a step of this run left a range, so that its adapter means nothing: start again in another output folder ({reason})")
    try:
        data = json.loads(read_file(path, "run"))
        if not isinstance(data["settings"], dict) or len(bytes.fromhex(data["order_key"])) != 32 or len(bytes.fromhex(data["run"])) != 8:
            raise ValueError
        return data
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptFileError(f"{path} is not readable: start the run again in another folder") from None


def write_run(folder: Path, data: dict[str, Any]) -> None:
    write_file(folder / RUN_FILE, json.dumps(data).encode(), secret=True)


@contextmanager
def finished_step(folder: Path) -> Iterator[None]:
    """Around the client's look at a step that the server has on its disk: a RangeError in here also ends every later attempt to resume."""
    try:
        yield
    except RangeError as error:
        write_file(folder / RANGE_FILE, str(error).encode(), secret=True)
        raise
