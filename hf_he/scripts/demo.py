"""`hf-he demo`: real sentences, real ciphertexts, a server process that never holds the secret key, and a comparison with plaintext."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.text import Text

from hf_he.backends import HEBackend, backend_class, default_device
from hf_he.checkpoints import default_model
from hf_he.ckks.parameters import parameter_set
from hf_he.client import BOOTSTRAPPING_PARAMETERS, Client
from hf_he.data import load_dataset
from hf_he.errors import DataError
from hf_he.keys import BOOTSTRAPPING_FOLDER, EVALUATION_FILE
from hf_he.local_server import local_server
from hf_he.measurement import begin_peak_period
from hf_he.protocol import SEQUENCE_LENGTH
from hf_he.results import InferenceResult
from hf_he.scripts.display import (
    count_progress,
    data_size,
    notice,
    print_json,
    print_measurements,
    print_notices,
    print_sentences,
    print_summary,
    progress_bar,
    say,
    server_progress,
)
from hf_he.scripts.files import read_sentences
from hf_he.scripts.kernels import prepare_kernels
from hf_he.serialization import check_writable, write_file

REQUIRED_AGREEMENT = 0.99
BOOTSTRAPPING_GB = 13.4
"""What the native demo took with bootstrapping, both processes and mapped keys (recipes/inference)."""


def default_number(backend: str) -> int:
    """How many sentences a demo takes: all on a GPU, and on a CPU what the backend does in minutes; says so where that is fewer."""
    cls = backend_class(backend)
    if cls.demo_sentences < HEBackend.demo_sentences and cls.placed_on(default_device()) == "cpu":
        say(f"reduced size: {cls.demo_sentences} sentences, because {cls.name} takes minutes for them on a CPU (--num-sentences N for more)")
        return cls.demo_sentences
    return HEBackend.demo_sentences


def choose_sentences(number: int, seed: int, text: Path | None) -> tuple[list[str], list[int] | None]:
    """`number` rows of the MR test half drawn by `seed`, with labels; or the first `number` lines of `text`, without."""
    if text is not None:
        return read_sentences(text)[:number], None
    dataset = load_dataset("mr", "test")
    if not 1 <= number <= len(dataset):
        raise DataError(f"--num-sentences must be from 1 to {len(dataset)}, the rows of the MR test half")
    rows = random.Random(seed).sample(range(len(dataset)), number)
    return [dataset.first[row] for row in rows], [dataset.labels[row] for row in rows]


def run_demo(
    model: Path,
    backend: str,
    parameters: str,
    texts: list[str],
    labels: list[int] | None,
    refresh: str,
    trace: Path | None = None,
    features: int | None = None,
) -> InferenceResult:
    """keygen, encrypt, server process, infer, decrypt; key files live in a temporary folder that is removed."""
    start = time.perf_counter()
    client = Client.from_pretrained(model, backend=backend, parameters=parameters, features=features)
    sentences = client.prepare(texts, labels)
    print_notices(sentences, SEQUENCE_LENGTH)
    say(f"packing: {client.choose(len(sentences)).reason}")
    seconds = {"compile": prepare_kernels(client.backend)}
    with tempfile.TemporaryDirectory(prefix="hf-he-demo-") as folder:
        began = time.perf_counter()
        with progress_bar(f"Generating keys ({client.backend.name})") as progress:
            keys = client.keygen(count_progress(progress))
            client.use_keys(replace(keys, evaluation=None))
            sizes = keys.save(folder, count_progress(progress), bootstrapping=refresh == "bootstrap")
            del keys
        seconds["keygen"] = time.perf_counter() - began
        setup_peak = begin_peak_period()
        server_keys = sizes[EVALUATION_FILE] + sizes.get(BOOTSTRAPPING_FOLDER, 0)
        say(f"keys: {data_size(server_keys)} of evaluation keys for the server, in {seconds['keygen']:.1f} s")

        began = time.perf_counter()
        with local_server(model, Path(folder) / EVALUATION_FILE, refresh) as server:
            seconds["server_start"] = time.perf_counter() - began
            say(f"server: a process with the model and the evaluation-key file only, at {server.url}")
            with progress_bar("Running the model on ciphertexts") as progress:
                result = client.classify(server, sentences, server_progress(progress))
    seconds["total"] = time.perf_counter() - start
    if trace is not None:
        write_file(trace, "".join(f"{scope} {name} {level} {count}\n" for scope, name, level, count in result.report["trace"]).encode())
    sizes = {**result.sizes, "evaluation_keys": server_keys}
    return replace(result, seconds={**result.seconds, **seconds}, sizes=sizes, setup_peak=setup_peak)


def choose_policy(backend: str, parameters: str | None, refresh: str | None) -> tuple[str, str]:
    """Parameter set and refresh policy: the backend's default, which is bootstrapping natively, unless parameters are chosen that cannot."""
    cls = backend_class(backend)
    if refresh is None:
        able = cls.bootstraps and parameter_set(parameters or BOOTSTRAPPING_PARAMETERS).bootstrap_moduli
        refresh = cls.default_refresh if able else "client"
    return parameters or (BOOTSTRAPPING_PARAMETERS if refresh == "bootstrap" else cls.default_parameters), refresh


def demo(
    model: Path | None,
    backend: str,
    parameters: str | None,
    num_sentences: int | None,
    seed: int,
    text: Path | None,
    refresh: str | None,
    json_output: bool,
    trace: Path | None,
    features: int | None = None,
) -> bool:
    """Run and print the demo; False when encrypted and plaintext predictions agree on less than 99 %."""
    texts, labels = choose_sentences(num_sentences or default_number(backend), seed, text)
    parameters, refresh = choose_policy(backend, parameters, refresh)
    if trace is not None:
        check_writable(trace)
    _check_memory(backend, refresh)
    result = run_demo(model or default_model(), backend, parameters, texts, labels, refresh, trace, features)
    data: dict[str, Any] = result.to_json()
    if json_output:
        print_json(data)
    else:
        print_sentences(result)
        print_measurements(data)
        print_summary(data)
    agrees = data["agreement"] is not None and data["agreement"] >= REQUIRED_AGREEMENT
    if not agrees:
        say(Text(f"encrypted and plaintext predictions agree on less than {REQUIRED_AGREEMENT:.0%} of the sentences", "red"))
    return agrees


def _check_memory(backend: str, refresh: str) -> None:
    available = psutil.virtual_memory().available / 1e9
    if refresh == "bootstrap" and backend_class(backend).name == "native" and available < BOOTSTRAPPING_GB:
        notice(f"{available:.1f} GB of memory are available, this takes up to {BOOTSTRAPPING_GB}: with --refresh client 3 GB are enough")
