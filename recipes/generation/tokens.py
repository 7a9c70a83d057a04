"""Encrypted generation on many prompts, token by token against plaintext polynomial mode.

    python recipes/generation/tokens.py                                             20 prompts x 16 tokens in the simulator
    python recipes/generation/tokens.py --backend native --prompts 1 --max-new-tokens 8
    python recipes/generation/tokens.py --kernel power_softmax --json tokens.json

Client and server share this process here, the server with evaluation keys only; `hf-he generate` runs it as a process of its own. With --restart
every generation is stored half-way, and goes on from its bytes on a new server.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from transformers import AutoTokenizer

from hf_he import GenerationClient, GenerationServer
from hf_he.checkpoints import default_decoder

PROMPTS = [
    "The ship sailed", "It was a dark night", "The old man said", "In the morning", "She looked at the sea", "The king and the queen",
    "There was once", "He opened the door", "The wind blew", "A great many people", "They went into the house", "The first of these",
    "My dear friend", "The house stood", "All the world", "At the end of the day", "The people of the city", "When he came back",
    "The little girl", "On the other side",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--kernel", default="gaussian_kernel")
    parser.add_argument("--backend", default="simulator")
    parser.add_argument("--parameters", default="n14")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()

    directory = arguments.model or default_decoder(arguments.kernel)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    client = GenerationClient.from_pretrained(directory, backend=arguments.backend, parameters=arguments.parameters, context=arguments.context)
    keys = client.keygen()

    def new_server() -> GenerationServer:
        return GenerationServer(directory, keys.evaluation, context=arguments.context)

    server, rows = new_server(), []
    for prompt in PROMPTS[: arguments.prompts]:
        ids = tokenizer(prompt)["input_ids"]
        settings = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = client.model.generate(**inputs, **settings)[0, len(ids) :].tolist()
        start, cpu = time.perf_counter(), time.process_time()
        generation = client.begin([ids], server)
        tokens, steps = [int(generation.logits[0].argmax())], []
        while len(tokens) < arguments.max_new_tokens:
            if arguments.restart and len(tokens) == arguments.max_new_tokens // 2:
                stored, server = generation.store(), new_server()
                generation = client.resume(stored, [ids + tokens[:-1]], server)
            tokens.append(int(generation.step(tokens[-1:])[0].argmax()))
            steps.append(generation.reports[-1])
        error = generation.max_logit_error
        rows.append({"prompt": prompt, "tokens": tokens, "tokens_polynomial": expected, "max_logit_error": error, "cache_bytes": len(generation.store())})
        rows[-1]["seconds_per_token"] = sum(step["seconds"] for step in steps) / max(len(steps), 1)
        rows[-1]["refreshes_per_token"] = sum(step["refreshes"] + step["bootstraps"] for step in steps) / max(len(steps), 1)
        rows[-1]["operations_last_token"] = steps[-1]["operations"] if steps else {}
        rows[-1]["seconds"], rows[-1]["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu
        print(f"{tokens == expected!s:5} {error:.1e} {rows[-1]['seconds']:6.1f} s  {tokenizer.decode(ids + tokens)!r}", flush=True)
    same = sum(a == b for row in rows for a, b in zip(row["tokens"], row["tokens_polynomial"], strict=True))
    total = sum(len(row["tokens"]) for row in rows)
    result = {"backend": client.backend.name, "parameters": arguments.parameters, "same": same, "tokens": total, "restarted": arguments.restart, "rows": rows}
    print(f"{same} of {total} tokens as in polynomial mode, largest logit error {max(row['max_logit_error'] for row in rows):.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
