"""The commands that work on files: keygen, encrypt, infer, decrypt, serve.

What a batch's sentences were stays with the client: `encrypt` writes it to `batches/ID.json` (mode 0600) in the key folder, and `infer --json`
and `decrypt` find it there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_he.backends import backend_class
from hf_he.checkpoints import default_decoder, default_model
from hf_he.ckks.parameters import parameter_set
from hf_he.client import BOOTSTRAPPING_PARAMETERS, Client
from hf_he.errors import CorruptFileError, DataError, HEError, ParameterError
from hf_he.keys import BOOTSTRAPPING_FOLDER, EVALUATION_FILE, SECRET_FILE
from hf_he.local_server import local_server
from hf_he.protocol import SEQUENCE_LENGTH, EncryptedBatch, EncryptedResult, error_to_json
from hf_he.remote import connect
from hf_he.results import InferenceResult, Sentence
from hf_he.scripts.display import (
    console,
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
from hf_he.scripts.kernels import prepare_kernels
from hf_he.serialization import check_writable, named, read_file, write_file

IDLE_SECONDS = 30 * 86400.0
"""How long the ranks of a sharded server wait for the next batch."""


def keygen(model: Path | None, out: Path, backend: str, parameters: str | None, bootstrapping: bool, generation: dict[str, Any] | None = None) -> None:
    """Write secret.key, public.key and evaluation.keys into `out`; `generation`: the options of a GenerationClient, for a decoder."""
    parameters = parameters or (BOOTSTRAPPING_PARAMETERS if bootstrapping else backend_class(backend).default_parameters)
    parameter_set(parameters)
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_writable(out / SECRET_FILE)
    if (out / SECRET_FILE).exists():
        raise ParameterError(f"{out} holds a secret key already, and what was encrypted under it would be lost: choose another --out, or move it away")
    if generation is None:
        client = Client.from_pretrained(model or default_model(), backend=backend, parameters=parameters)
    else:
        from hf_he.generation.client import GenerationClient

        client = GenerationClient.from_pretrained(model or default_decoder(), backend=backend, parameters=parameters, **generation)
    prepare_kernels(client.backend)
    start = time.perf_counter()
    with progress_bar("Generating keys") as progress:
        keys = client.keygen(count_progress(progress))
        sizes = keys.save(out, count_progress(progress), bootstrapping=bootstrapping)
    seconds, bits = time.perf_counter() - start, keys.backend.parameters.security_bits
    console.print(f"key {keys.key_id} for the {keys.backend.name} backend, {bits}-bit security, {seconds:.1f} s")
    for name, size in sizes.items():
        for_server = name in (EVALUATION_FILE, BOOTSTRAPPING_FOLDER)
        note = "give it to the server" if for_server else "keep it private" if name == SECRET_FILE else "anyone may encrypt with it"
        console.print(f"  {out / name}  {data_size(size)}  ({note})")


def encrypt(text: Path, model: Path | None, keys: Path, out: Path, features: int | None = None) -> None:
    """Encrypt a text file, one sentence per line."""
    client = Client.from_pretrained(model or default_model(), keys=keys, features=features)
    check_writable(out)
    sentences = client.prepare(read_sentences(text))
    print_notices(sentences, SEQUENCE_LENGTH)
    start = time.perf_counter()
    batch = client.encrypt(sentences)
    data = batch.to_bytes()
    write_file(out, data)
    notes = Notes(sentences, {"encrypt": time.perf_counter() - start}, {"ciphertext_in": len(data)})
    notes.save(keys, batch.batch_id)
    accepted = sum(sentence.refused is None for sentence in sentences)
    say(f"packing: {client.choose(accepted).reason}")
    console.print(f"{accepted} sentences in {batch.batches} ciphertext batches: {out} ({data_size(out.stat().st_size)})")


def infer(
    encrypted: Path, model: Path | None, keys: Path, out: Path | None, server: str | None, refresh: str, json_output: bool, flooding: float = 0.0
) -> None:
    """Run an encrypted file on a server, answering its refresh requests with the secret key in `keys`; `flooding` as in Client.decrypt, with JSON only."""
    if flooding and not json_output:
        raise ParameterError("only --json shows logits here: add --json, or give --flooding to `hf-he decrypt`")
    client = Client.from_pretrained(model or default_model(), keys=keys)
    data, target = read_file(encrypted, "encrypted-batch"), out or encrypted.with_suffix(".result")
    check_writable(target)
    with named(encrypted):
        batch = EncryptedBatch.from_bytes(data)
    with ExitStack() as stack:
        if server is None:
            say("Starting a server process")
            remote = stack.enter_context(local_server(client.directory, keys / EVALUATION_FILE, refresh))
        else:
            remote = stack.enter_context(connect(server))
        progress = stack.enter_context(progress_bar("Running the model on ciphertexts"))
        result = client.run(remote, batch, data, server_progress(progress))
    write_file(target, result.to_bytes())
    report = result.report
    if not json_output:
        console.print(f"{result.batches} batches in {report['seconds']:.1f} s, {report['refreshes']} refreshes: {target}; read it with `hf-he decrypt`")
        return
    print_json(_decrypt(client, keys, result, flooding).to_json())


def decrypt(result: Path, model: Path | None, keys: Path, json_output: bool, flooding: float = 0.0) -> None:
    """Decrypt a result file and show its predictions; `flooding` as in Client.decrypt."""
    client = Client.from_pretrained(model or default_model(), keys=keys)
    data = read_file(result, "encrypted-result")
    with named(result):
        answer = EncryptedResult.from_bytes(data)
    found = _decrypt(client, keys, answer, flooding)
    data = found.to_json()
    if json_output:
        print_json(data)
        return
    print_sentences(found)
    print_measurements(data)
    print_summary(data)


def serve(
    model: Path | None,
    evaluation_keys: Path,
    backend: str,
    refresh: str,
    host: str,
    port: int,
    finetune: Path | None,
    announce: bool,
    generation: dict[str, Any] | None = None,
) -> None:
    """Serve a model until interrupted; with `finetune`, train it on encrypted examples and keep the checkpoints there; with `generation`, the options of
    a GenerationServer, a decoder.

    `announce` is how a parent process starts it: JSON on stdout, and an end when stdin closes. Under torchrun training ranks are servers of their own, on
    the next ports, and the first one names all of them; the ranks of a classifier share its weights (hf_he.sharding), and the first one serves.
    """
    from hf_he.finetuning.parallel import Workers
    from hf_he.keys import ServerKeys
    from hf_he.server import Server
    from hf_he.service import serve as run

    def ready(url: str) -> None:
        urls = [url] if finetune is None else [part.decode() for part in workers.all_gather(url.encode())]
        if announce:
            if workers.first:
                print(json.dumps({"urls": urls}), flush=True)
            threading.Thread(target=_stop_with_parent, daemon=True).start()
        else:
            what = "serving" if finetune is None else "training"
            console.print(f"{what} {server.identity.model} for key {server.identity.key_id} at {url} ({server.backend.name} backend); Ctrl-C stops")
            if host not in ("127.0.0.1", "localhost"):
                notice(
                    f"{host} is reachable from other machines, without encryption of the transport or a log-in: put a proxy with both in front (SECURITY.md)"
                )

    try:
        if finetune is not None:
            workers = Workers.from_environment()
        else:
            workers = Workers.from_environment(IDLE_SECONDS) if generation is None else Workers()
        keys = ServerKeys.load(evaluation_keys, "the server", bootstrapping=refresh == "bootstrap")
        if backend != "auto" and backend_class(backend).name != keys.backend:
            raise HEError(f"these keys are for the {keys.backend} backend, not {backend}: leave --backend out, or generate keys for it")
        if finetune is not None and generation is not None:
            from hf_he.finetuning.language_server import LanguageFinetuneServer

            if generation["adapter"] is not None:
                raise ParameterError("training begins with a fresh adapter: leave --adapter out")
            server = LanguageFinetuneServer(model or default_decoder(), keys, finetune, refresh=refresh, context=generation["context"], announce=notice)
        elif generation is not None:
            from hf_he.generation.server import GenerationServer

            server = GenerationServer(model or default_decoder(), keys, refresh=refresh, **generation)
        elif finetune is None and workers.size > 1:
            from hf_he.sharding import ShardedServer

            server = ShardedServer(model or default_model(), keys, workers=workers, refresh=refresh)
        elif finetune is None:
            server = Server(model or default_model(), keys, refresh=refresh)
        else:
            from hf_he.finetuning.server import FinetuneServer

            server = FinetuneServer(model or default_model(), keys, finetune, refresh=refresh, announce=notice, workers=workers)
    except HEError as error:
        if not announce:
            raise
        print(json.dumps(error_to_json(error)), flush=True)
        sys.exit(1)
    if finetune is None and not workers.first:
        server.follow()
        return
    run(server, host, port + workers.rank if port else 0, ready)


def read_sentences(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: convert it, one sentence per line") from None
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise DataError(f"{path} holds no sentences: write one per line")
    return sentences


@dataclass(frozen=True)
class Notes:
    """What the client keeps about an encrypted batch: its sentences, and what encrypting them took."""

    sentences: list[Sentence]
    seconds: dict[str, float]
    sizes: dict[str, int]

    def save(self, keys: Path, batch_id: str) -> None:
        path = _notes_path(keys, batch_id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        data = {"sentences": [sentence.to_json() for sentence in self.sentences], "seconds": self.seconds, "bytes": self.sizes}
        write_file(path, json.dumps(data).encode(), secret=True)

    @classmethod
    def load(cls, keys: Path, batch_id: str) -> Notes:
        path = _notes_path(keys, batch_id)
        try:
            data = json.loads(path.read_bytes())
            return cls([Sentence.from_json(entry) for entry in data["sentences"]], data["seconds"], data["bytes"])
        except OSError:
            raise DataError(f"{path} is missing, so the sentences of this batch are unknown: pass the --keys folder it was encrypted with") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CorruptFileError(f"{path} is not readable: encrypt the sentences again") from None


def _decrypt(client: Client, keys: Path, result: EncryptedResult, flooding: float) -> InferenceResult:
    result.identity.check(client.identity, "encrypted result")
    notes = Notes.load(keys, result.batch_id)
    start = time.perf_counter()
    sentences = client.decrypt(result, notes.sentences, flooding)
    seconds = notes.seconds | {"decrypt": time.perf_counter() - start}
    sizes = notes.sizes | {"ciphertext_out": len(result.logits)}
    evaluation = keys / EVALUATION_FILE
    if evaluation.is_file():
        sizes["evaluation_keys"] = evaluation.stat().st_size
    return InferenceResult(sentences, result.report, client.label_names, seconds, sizes)


def _notes_path(keys: Path, batch_id: str) -> Path:
    return keys / "batches" / f"{batch_id}.json"


def _stop_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
