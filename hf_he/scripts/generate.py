"""`hf-he generate`: text from a prompt on ciphertexts, the server a process of its own with an encrypted cache and without the secret key."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from hf_he.backends import backend_class
from hf_he.checkpoints import default_decoder, load_tokenizer
from hf_he.client import BOOTSTRAPPING_PARAMETERS
from hf_he.errors import DataError, ParameterError
from hf_he.generation.adapter import lora_of
from hf_he.generation.client import GenerationClient
from hf_he.generation.generate import encrypted_generate
from hf_he.generation.session import Generation
from hf_he.keys import BOOTSTRAPPING_FOLDER, EVALUATION_FILE
from hf_he.local_server import local_server
from hf_he.peft import HELoraConfig
from hf_he.scripts.display import console, count_progress, data_size, print_json, progress_bar, say
from hf_he.scripts.kernels import prepare_kernels


def generate(
    prompt: str,
    max_new_tokens: int,
    model: Path | None,
    backend: str,
    parameters: str | None,
    kernel: str,
    json_output: bool,
    *,
    adapter: Path | None,
    encrypt_adapter: bool,
    select: str,
    refresh: str,
    context: int,
    sampling: dict[str, float],
    seed: int,
) -> bool:
    """Run and print; False when a token differs from the one that polynomial mode picks."""
    directory = model or default_decoder(kernel)
    tokenizer = load_tokenizer(directory)
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    length = inputs["input_ids"].shape[1]
    if not 1 <= length <= context:
        raise DataError(f"the prompt has {length} tokens, 1 to {context} fit: shorten it, or raise --context" if length else "the prompt is empty: give a word")
    parameters = parameters or (BOOTSTRAPPING_PARAMETERS if refresh == "bootstrap" else backend_class(backend).default_parameters)
    if encrypt_adapter and adapter is None:
        raise ParameterError("--encrypt-adapter needs --adapter, the folder of a PEFT adapter")
    limits = {"context": context, "max_tokens": max(context, length + max_new_tokens - 1)}
    plain = None if encrypt_adapter else adapter
    client = GenerationClient.from_pretrained(directory, backend=backend, parameters=parameters, adapter=plain, **limits)
    prepare_kernels(client.backend)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": bool(sampling), **sampling, "pad_token_id": tokenizer.pad_token_id or 0}

    streamer = None if json_output else TextStreamer(tokenizer)
    with tempfile.TemporaryDirectory(prefix="hf-he-generate-") as folder:
        sizes, seconds = _write_keys(client, folder, refresh, lora_of(adapter) if encrypt_adapter else None)
        keys = sizes[EVALUATION_FILE] + sizes.get(BOOTSTRAPPING_FOLDER, 0)
        say(f"keys: {data_size(keys)} of evaluation keys for the server, in {seconds:.1f} s")
        arguments = ["--generate", "--context", str(context), "--max-tokens", str(client.max_tokens)]
        if encrypt_adapter:
            adapter = client.encrypt_adapter(adapter, Path(folder) / "adapter").parent
            client = GenerationClient(directory, client.backend, client.keys, adapter=adapter, **limits)
            say("adapter: encrypted, the server adds its ciphertexts to the model")
        arguments += [] if adapter is None else ["--adapter", str(adapter)]
        torch.manual_seed(seed)
        expected = client.model.generate(**inputs, **settings)[0, length:].tolist()
        torch.manual_seed(seed)
        with local_server(directory, Path(folder) / EVALUATION_FILE, refresh, arguments) as server:
            say(f"server: a process with the model and the evaluation-key file only, at {server.url}")
            client.server = server
            start = time.perf_counter()
            tokens = _run(client, inputs, settings, select, streamer)[0, length:].tolist()
            seconds = time.perf_counter() - start
            cache = client.last.store()
    data = _report(client, client.last, prompt, tokenizer, inputs["input_ids"][0].tolist(), tokens, expected, len(cache))
    if json_output:
        print_json(data)
    else:
        _print(data, client.last, seconds)
    return tokens == expected


def _run(client: GenerationClient, inputs: dict[str, torch.Tensor], settings: dict[str, Any], select: str, streamer: BaseStreamer | None) -> torch.Tensor:
    arguments = {"custom_generate": encrypted_generate, "client": client, "token_streamer": streamer, "select": select}
    if streamer is not None:
        return client.model.generate(**inputs, **settings, **arguments)
    with progress_bar("Generating on ciphertexts") as progress:
        task = progress.task_ids[0]

        class Ticker(BaseStreamer):
            done = -1

            def put(self, value: torch.Tensor) -> None:
                self.done += 1
                progress.update(task, completed=self.done, total=settings["max_new_tokens"], note=f"{self.done} tokens")

            def end(self) -> None:
                pass

        return client.model.generate(**inputs, **settings, **arguments | {"token_streamer": Ticker()})


def _write_keys(client: GenerationClient, folder: str, refresh: str, lora: HELoraConfig | None) -> tuple[dict[str, int], float]:
    """Fresh keys in `folder`; the client keeps its own half only."""
    start = time.perf_counter()
    with progress_bar(f"Generating keys ({client.backend.name})") as progress:
        keys = client.keygen(count_progress(progress), lora=lora)
        sizes = keys.save(folder, count_progress(progress), bootstrapping=refresh == "bootstrap")
    client.use_keys(replace(keys, evaluation=None))
    return sizes, time.perf_counter() - start


def _report(
    client: GenerationClient, generation: Generation, prompt: str, tokenizer: Any, before: list[int], tokens: list[int], expected: list[int], cache: int
) -> dict[str, Any]:
    """The JSON contract of `hf-he generate --json`. Per token: of the tokens after the first, which comes with the prompt; null when there are none.
    What the client refreshes in place of a bootstrap is in `refreshes_per_token`, a round trip each."""
    steps = generation.reports[1:]
    operations: Counter[str] = Counter()
    for report in steps:
        operations.update(report["operations"])
    return {
        "backend": client.backend.name,
        "prompt": prompt,
        "tokens": tokens,
        "text": tokenizer.decode(before + tokens, skip_special_tokens=True),
        "tokens_polynomial": expected,
        "seconds_per_token": _mean([report["seconds"] for report in steps]),
        "bootstraps_per_token": _mean([report["bootstraps"] for report in steps]),
        "refreshes_per_token": _mean([report["refreshes"] for report in steps]),
        "operations_per_token": {name: count / len(steps) for name, count in sorted(operations.items())},
        "cache_bytes": cache,
        "max_logit_error": generation.max_logit_error,
    }


def _print(data: dict[str, Any], generation: Generation, seconds: float) -> None:
    prompt = generation.reports[0]
    table = Table(show_header=False, title="Generation on ciphertexts")
    table.add_column()
    table.add_column(justify="right")
    refreshed = "bootstraps" if prompt["bootstraps"] else "round trips to the client"
    table.add_row("backend", data["backend"])
    table.add_row("security", f"{prompt['security_bits']} bits" + (", were this not the simulator" if data["backend"] == "simulator" else ""))
    table.add_row("tokens", str(len(data["tokens"])))
    table.add_row("prompt", f"{prompt['seconds']:.2f} s, {prompt['refreshes'] + prompt['bootstraps']} {refreshed}")
    if data["seconds_per_token"] is not None:
        table.add_row("each further token", f"{data['seconds_per_token']:.2f} s, {data['bootstraps_per_token'] + data['refreshes_per_token']:.1f} {refreshed}")
        names = ("rotate", "multiply", "multiply_plain", "rescale")
        table.add_row("operations per token", ", ".join(f"{data['operations_per_token'].get(name, 0):,.0f} {name}" for name in names))
    table.add_row("total", f"{seconds:.2f} s")
    table.add_row("encrypted cache", data_size(data["cache_bytes"]))
    table.add_row("sent, received", f"{data_size(generation.sizes['sent'])}, {data_size(generation.sizes['received'])}")
    if data["max_logit_error"] is not None:
        table.add_row("largest logit error", f"{data['max_logit_error']:.1e}")
    console.print(table)
    if data["tokens"] == data["tokens_polynomial"]:
        console.print("the same tokens as in plaintext polynomial mode", style="bold")
    else:
        console.print(f"plaintext polynomial mode picks other tokens: {data['tokens_polynomial']}, not {data['tokens']}", style="red")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
