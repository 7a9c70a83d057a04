"""Fine-tune the shipped decoder on ciphertexts of a private text, then generate on ciphertexts with the adapter, which nobody but the client can read.

    python recipes/generation/chain.py                                    simulator, 8 steps
    python recipes/generation/chain.py --kernel power_softmax
    python recipes/generation/chain.py --backend native --steps 4 --json chain.json

This process is the client. The server is a process of its own, `hf-he serve` with the model and the evaluation-key file: first it trains LoRA on queries,
keys and values (--generate --finetune), then another one generates with the adapter's ciphertexts as training left them (--generate --adapter). A
plaintext twin in polynomial mode takes the same steps and generates too. Run again with the same --output-dir, training goes on after the last finished step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging

from hf_he import GenerationClient, encrypted_generate
from hf_he.checkpoints import default_decoder
from hf_he.finetuning.language import EncryptedTextTrainer
from hf_he.keys import EVALUATION_FILE
from hf_he.local_server import local_server

TEXT = "My dear sister, the garden is in bloom again, and the old pear tree by the wall has more flowers than I ever saw. Come and see it before the rain."
LEARNING_RATES = {"gaussian_kernel": 1.0, "normalized_gaussian_kernel": 0.5, "power_softmax": 0.25}
"""At which 8 steps of SGD on this text stay in the fitted ranges. The power softmax raises changes of its scores to the fourth power: 0.5 leaves them."""

warnings.simplefilter("ignore", FutureWarning)
logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="gaussian_kernel")
    parser.add_argument("--backend", default="simulator")
    parser.add_argument("--parameters", default="n14")
    parser.add_argument("--text", type=Path, default=None, help="a text file; default: a few lines of a letter")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=None, help="default: by kernel, what stays in the fitted ranges")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--prompt", default="My dear sister,")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--output-dir", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hf-he-chain-") as folder:
        result = run(arguments, arguments.output_dir or Path(folder) / "run")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if result["tokens"] == result["tokens_polynomial"] else 1)


def run(arguments: argparse.Namespace, folder: Path) -> dict:
    directory = default_decoder(arguments.kernel)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else TEXT
    rate = arguments.learning_rate or LEARNING_RATES[arguments.kernel]
    options = {"steps": arguments.steps, "learning_rate": rate, "context": arguments.context, "announce": announce}
    trainer = EncryptedTextTrainer(directory, text, folder, backend=arguments.backend, parameters=arguments.parameters, **options)
    report = trainer.train()
    losses = f"{report['losses'][0]:.5f} to {report['losses'][-1]:.5f} on ciphertexts, to {report['losses_polynomial'][-1]:.5f} in the clear"
    print(f"loss before each update: {losses}; adapter within {report['adapter_relative_error']:.1e} of the twin's", flush=True)

    adapter = folder / "encrypted_adapter"
    user = GenerationClient(directory, trainer.client.backend, trainer.client.keys, adapter=adapter, context=arguments.context)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    settings = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "pad_token_id": 0}
    served = ["--generate", "--context", str(arguments.context), "--adapter", str(adapter)]
    with local_server(directory, folder / "client" / "keys" / EVALUATION_FILE, arguments=served) as server:
        announce(f"server: another process, with the adapter's ciphertexts, at {server.url}")
        user.server, start = server, time.perf_counter()
        found = user.model.generate(**inputs, **settings, custom_generate=encrypted_generate, client=user)[0]
        seconds = time.perf_counter() - start
    expected, before = (model.generate(**inputs, **settings)[0] for model in (trainer.twin.model, trainer.client.model))
    print(f"before:    {tokenizer.decode(before)!r}\nafter:     {tokenizer.decode(expected)!r}\nencrypted: {tokenizer.decode(found)!r}")
    print(f"tokens as the twin's: {found.tolist() == expected.tolist()}, largest logit error {user.last.max_logit_error:.1e}, {seconds:.1f} s", flush=True)
    tokens, steps = inputs["input_ids"].shape[1], user.last.reports[1:]
    return report | {
        "kernel": arguments.kernel,
        "prompt": arguments.prompt,
        "tokens": found[tokens:].tolist(),
        "tokens_polynomial": expected[tokens:].tolist(),
        "tokens_before": before[tokens:].tolist(),
        "max_logit_error": user.last.max_logit_error,
        "seconds_per_token": sum(step["seconds"] for step in steps) / max(len(steps), 1),
        "round_trips_per_token": sum(step["refreshes"] for step in steps) / max(len(steps), 1),
    }


def announce(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
