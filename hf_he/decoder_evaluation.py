"""Decoders on ciphertexts beside their polynomial mode: accuracy of the logits, and where the time goes.

The secret key stays with the client half: the session sees the evaluation keys, encrypted hidden states, and, without bootstrapping, ciphertexts
that the client encrypted again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_he.backends import get_backend
from hf_he.backends.log import OperationLog
from hf_he.ckks.parameters import parameter_set
from hf_he.errors import ShapeError
from hf_he.nn import RangeTracker
from hf_he.packing import Packing, pack_embeddings, unpack_state
from hf_he.planner import make_plan
from hf_he.refresh import BootstrapRefresh, ClientRefresh
from hf_he.tensor import EncryptedSession

BREAKDOWN = {
    "plaintext_products": "linear",
    "ciphertext_products": "attention",
    "attention_function": "kernel",
    "norms": "norm",
    "activations": "activation",
    "refreshes": "refresh",
}
"""Parts of the time and the scopes of the operation log they are."""


@dataclass(frozen=True)
class DecoderEvaluation:
    """`prefixes` of `tokens` tokens: mean squared and largest error of the logits of all positions, shares of equal most probable next tokens
    (after the whole prefix; after every position), perplexity of both modes, values outside fitted intervals. `seconds` per batch of
    `batch` prefixes, by part and by primitive, and `refreshes` of a batch."""

    backend: str
    parameters: str
    security_bits: int
    prefixes: int
    tokens: int
    batch: int
    mse: float
    max_logit_error: float
    same_next_token: float
    same_tokens: float
    perplexity: float
    perplexity_polynomial: float
    out_of_range: int
    refreshes: float
    seconds: float
    seconds_by_part: dict[str, float]
    seconds_by_primitive: dict[str, float]
    operations: dict[str, float]

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)


@torch.no_grad()
def evaluate_encrypted(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    backend_name: str = "auto",
    parameters_name: str = "n14",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DecoderEvaluation:
    """Run a decoder in polynomial mode and on ciphertexts over prefixes, token ids [rows, tokens], in batches as large as the packing holds.

    `progress` is called with (rows done, rows). Raises ShapeError for lengths that are no power of two.
    """
    rows, tokens = blocks.shape
    if tokens & (tokens - 1):
        raise ShapeError(
            f"prefixes of {tokens} tokens do not fill a packing: use a power of two, {1 << (tokens.bit_length() - 1)} or {1 << tokens.bit_length()}"
        )
    parameters, hidden = parameter_set(parameters_name), model.config.hidden_size
    backend, packing = get_backend(backend_name, parameters), Packing.fit(parameters.slots, hidden, tokens)
    plan = make_plan(model, parameters, packing)
    secret = backend.generate_secret_key()
    bootstraps = backend.capabilities()["bootstrap"]
    options = {"bootstrapping": True} if bootstraps else {}
    backend.load_evaluation_keys(backend.generate_evaluation_keys(secret, plan.rotations, **options))

    def answer(data: bytes) -> bytes:
        return backend.serialize(backend.encrypt(backend.decrypt(backend.deserialize(data, "ciphertext"), secret), secret))

    session = EncryptedSession(backend, packing, BootstrapRefresh(backend) if bootstraps else ClientRefresh(answer))
    session.place(model, plan.levels)
    expected, found, seconds, log, out_of_range = [], [], 0.0, OperationLog(), 0
    for first in range(0, rows, packing.sequences):
        batch = blocks[first : first + packing.sequences]
        embeddings = model.get_input_embeddings()(batch)
        with RangeTracker(model) as tracker:
            expected.append(model(inputs_embeds=embeddings, use_cache=False).logits)
        out_of_range += tracker.out_of_range
        state = session.hidden_state(backend.encrypt(pack_embeddings(embeddings.numpy(), packing), secret), hidden)
        backend.log.reset()
        start = time.perf_counter()
        logits = model(inputs_embeds=state, use_cache=False).logits.ciphertext
        seconds += time.perf_counter() - start
        log.seconds.update(backend.log.seconds)
        log.scope_seconds.update(backend.log.scope_seconds)
        log.counts.update(backend.log.counts)
        values = unpack_state(backend.decrypt(logits, secret), packing, model.config.vocab_size, len(batch))
        found.append(torch.from_numpy(np.ascontiguousarray(values)))
        progress(min(first + packing.sequences, rows), rows)
    batches = -(-rows // packing.sequences)
    polynomial, encrypted = torch.cat(expected).double(), torch.cat(found)
    error, same = encrypted - polynomial, encrypted.argmax(-1) == polynomial.argmax(-1)
    scopes = log.by_op()
    return DecoderEvaluation(
        backend=backend.name,
        parameters=parameters_name,
        security_bits=parameters.security_bits,
        prefixes=rows,
        tokens=tokens,
        batch=packing.sequences,
        mse=float(error.square().mean()),
        max_logit_error=float(error.abs().max()),
        same_next_token=float(same[:, -1].double().mean()),
        same_tokens=float(same.double().mean()),
        perplexity=_perplexity(encrypted, blocks),
        perplexity_polynomial=_perplexity(polynomial, blocks),
        out_of_range=out_of_range,
        refreshes=session.refresh.count / batches,
        seconds=seconds / batches,
        seconds_by_part={name: scopes.get(scope, 0.0) / batches for name, scope in BREAKDOWN.items()},
        seconds_by_primitive={name: spent / batches for name, spent in log.by_primitive().items()},
        operations={name: count / batches for name, count in log.operations().items()},
    )


def _perplexity(logits: torch.Tensor, blocks: torch.Tensor) -> float:
    return math.exp(min(700.0, float(F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()))))
