"""`hf-he serve` as a child process of this one: how the demo, `hf-he infer` without --server and `hf-he finetune` get their server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from hf_he.backends import default_device
from hf_he.errors import HEError
from hf_he.protocol import error_from_json
from hf_he.remote import RemoteServer, connect

STOP_SECONDS = 10.0


@contextmanager
def local_server(model: str | Path, evaluation_keys: str | Path, refresh: str = "client", arguments: Sequence[str] = ()) -> Iterator[RemoteServer]:
    """A server process with `model` and an evaluation-key file only, on a free port of 127.0.0.1; it ends with the block. `arguments`: more of
    `hf-he serve`.

    An error while starting (corrupt keys, unknown model, ...) is raised here as its own class.
    """
    with local_servers(model, evaluation_keys, refresh, arguments=arguments) as (server,):
        yield server


@contextmanager
def local_servers(
    model: str | Path,
    evaluation_keys: str | Path,
    refresh: str = "client",
    finetune: str | Path | None = None,
    processes: int = 1,
    arguments: Sequence[str] = (),
) -> Iterator[list[RemoteServer]]:
    """As `local_server`; with `finetune`, training servers that keep their checkpoints in that folder, `processes` of them under torchrun."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command += ["hf_he", "serve", "--model", str(model), "--evaluation-keys", str(evaluation_keys), "--refresh", refresh, "--port", "0", "--announce"]
    command += [] if default_device() is None else ["--device", default_device()]
    command += [*arguments] if finetune is None else ["--finetune", str(finetune), *arguments]
    with tempfile.TemporaryFile() as log, ExitStack() as stack:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            servers = [stack.enter_context(connect(url)) for url in _read_urls(process, log)]
            try:
                yield servers
            except HEError as error:
                if process.poll() is not None:
                    raise HEError(f"the server process ended with code {process.returncode}: {_last_line(log)}") from error
                raise
        finally:
            process.stdin.close()
            _stop(process)
            process.stdout.close()


def _read_urls(process: subprocess.Popen, log: IO[bytes]) -> list[str]:
    line = process.stdout.readline()
    try:
        announced = json.loads(line)
    except ValueError:
        _stop(process)
        raise HEError(f"the server process did not start: {_last_line(log)}") from None
    if "error" in announced:
        raise error_from_json(announced)
    return announced["urls"]


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    return (log.read().decode(errors="replace").strip().splitlines() or ["it wrote nothing"])[-1]


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
    process.wait()
