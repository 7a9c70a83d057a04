"""One encrypted inference on a backend and a device, timed: the model that ships, and one of the shape of Rho et al. (ICLR 2025).

What runs is what a server runs, in this process together with the client: refreshes are bootstraps where the parameters and the backend have them,
otherwise decryption and encryption here, without a network. A first batch, which encodes the weights, is not timed. `priced` counts the operations
instead and prices them with the native engine's times on one core (hf_he.backends.counting): a projection, not a measurement.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from hf_he import __version__
from hf_he.backends import backend_class, get_backend
from hf_he.backends.desilo import installed_version
from hf_he.bench.finetune import ENTRIES, PAPER_SHAPE, SHIPPED_SHAPE, Shape, make_model
from hf_he.checkpoints import default_model, load_classifier
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.data import load_dataset
from hf_he.errors import DataError
from hf_he.handlers.attention import mask_power
from hf_he.level_search import CountingSession
from hf_he.measurement import begin_peak_period, peak_memory_bytes
from hf_he.nn import LayerRange, RangeTracker
from hf_he.ops.placement import Levels
from hf_he.packing import Packing, pack_attention_mask, pack_embeddings
from hf_he.planner import make_plan
from hf_he.refresh import BootstrapRefresh, ClientRefresh
from hf_he.tensor import EncryptedSession, EncryptedTensor

PAPER = {"inference_s": 26.5, "finetune_s": 61.03, "hardware": "one RTX 4090"}
"""Rho et al., ICLR 2025: one sample."""

SHAPES = {"shipped": SHIPPED_SHAPE, "paper": PAPER_SHAPE}
LIBRARIES = {"native": ("numba", "numpy"), "simulator": ("numpy",), "fhelium": ("fhelium", "torch")}
MARGIN = 1.2
"""Intervals of a random model are this much wider than the values of its inputs."""

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """A model, embeddings [batch, T, F] within its ranges, their mask [batch, T], and how they are packed."""

    name: str
    model: nn.Module
    embeddings: np.ndarray
    mask: np.ndarray
    parameters: CKKSParameters
    packing: Packing

    @property
    def packed_batches(self) -> int:
        return -(-len(self.embeddings) // self.packing.sequences)


def workload(name: str, batch: int | None = None, features: int | None = None, parameters: str | None = None, backend: str = "native") -> Workload:
    """A shape by name, on `batch` sentences (default: as many as one packed batch holds), by default with parameters of the shape that `backend` has.

    Raises DataError for an unknown shape or batch.
    """
    if name not in SHAPES:
        raise DataError(f"--shape does not know {name}: choose from {', '.join(SHAPES)}")
    shape = SHAPES[name]
    chosen = parameter_set(parameters or (backend_class(backend).default_parameters if shape is SHIPPED_SHAPE else shape.parameters))
    packing = Packing.fit(chosen.slots, features or shape.features, shape.tokens)
    batch = packing.sequences if batch is None else batch
    if batch < 1:
        raise DataError(f"--batch must be at least 1, got {batch}")
    model, embeddings, mask = _shipped(batch) if name == "shipped" else _random(shape, batch)
    return Workload(name, model, embeddings.detach().double().numpy(), mask.double().numpy(), chosen, packing)


def _shipped(batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The checkpoint, and sentences of MR."""
    model, texts = load_classifier(default_model()), load_dataset("mr", "test").first
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    texts = [texts[i % len(texts)] for i in range(batch)]
    tokens = tokenizer(texts, padding="max_length", max_length=SHIPPED_SHAPE.tokens, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model, model.bert.embeddings(input_ids=tokens["input_ids"]), tokens["attention_mask"]


def _random(shape: Shape, batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Random weights and tokens; intervals around the values that these take, exactly and with the polynomials that follow from those."""
    model = make_model(shape)
    model.set_mode("exact")
    ids = torch.randint(0, model.config.vocab_size, (batch, shape.tokens))
    mask = torch.ones(batch, shape.tokens, dtype=torch.int64)
    tracker = RangeTracker(model)
    with torch.no_grad():
        embeddings = model.bert.embeddings(input_ids=ids)
        for _ in range(2):
            with tracker:
                model(embedding_output=embeddings, attention_mask=mask)
            model.set_approximations({name: _entry(model.get_submodule(name), seen) for name, seen in tracker.ranges.items()})
            model.set_mode("polynomial")
    return model, embeddings, mask


def _entry(module: nn.Module, seen: LayerRange) -> dict[str, Any]:
    """An entry of ENTRIES, its interval around what was seen."""
    kind = seen.statistic if seen.statistic in ENTRIES else module.function
    low, high = seen.minimum, seen.maximum
    if kind == "variance":
        interval = [low / MARGIN, high * MARGIN]
    elif kind == "exponent":
        interval = [min(MARGIN * low, -1.0), 0.0]
    else:
        bound = MARGIN * max(-low, high)
        interval = [-bound, bound]
    return ENTRIES[kind] | {"interval": interval}


def priced(work: Workload) -> dict[str, Any]:
    """A projection for one core: what the native engine's primitives take, times their counts."""
    session, _ = _counted(work)
    backend, batches = session.backend, work.packed_batches
    seconds = {name: batches * value for name, value in backend.seconds.items()}
    bootstraps = batches * sum(count for _, count in backend.refreshes) if work.parameters.bootstrap_moduli else 0
    return _row(work, "native", "cpu", sum(seconds.values()), seconds, bootstraps, None, None) | {"priced": True}


def measure(work: Workload, backend_name: str, device: str, announce: Announce) -> dict[str, Any]:
    """The workload, one packed batch after another. On a card, seconds by operation are of one more batch, with a wait for the card after each primitive."""
    card = Card(device)
    backend = get_backend(backend_name, work.parameters, device)
    counting, levels = _counted(work)
    bootstrapping = backend.capabilities()["bootstrap"]
    announce("keys")
    secret = backend.generate_secret_key()
    backend.load_evaluation_keys(backend.generate_evaluation_keys(secret, counting.backend.rotation_levels, bootstrapping=bootstrapping))

    def answer(data: bytes) -> bytes:
        return backend.serialize(backend.encrypt(backend.decrypt(backend.deserialize(data, "ciphertext"), secret), secret))

    session = EncryptedSession(backend, work.packing, BootstrapRefresh(backend) if bootstrapping else ClientRefresh(answer))
    session.place(work.model, levels)

    def run(index: int) -> float:
        rows = slice(index * work.packing.sequences, (index + 1) * work.packing.sequences)
        state = backend.encrypt(pack_embeddings(work.embeddings[rows], work.packing), secret)
        mask = backend.encrypt(pack_attention_mask(work.mask[rows], work.packing, mask_power(work.model)), secret)
        card.synchronise()
        start = time.perf_counter()
        _forward(session, work, state, mask)
        card.synchronise()
        return time.perf_counter() - start

    announce("a batch that is not timed: weights are encoded, kernels compiled")
    card.begin_peak_period()
    run(0)
    backend.log.reset()
    begin_peak_period()
    seconds = 0.0
    for index in range(work.packed_batches):
        announce(f"batch {index + 1} of {work.packed_batches}")
        seconds += run(index)
    log = backend.log
    bootstraps, memory, gpu = log.operations().get("bootstrap", 0), peak_memory_bytes() / 1e9, card.peak_gb()
    if card.there:
        announce("a batch for the seconds by operation")
        log.reset()
        log.synchronise = card.synchronise
        run(0)
    by_op = {name: value * (work.packed_batches if card.there else 1) for name, value in log.by_op().items()}
    return _row(work, backend.name, device, seconds, by_op, bootstraps, memory, gpu)


def _counted(work: Workload) -> tuple[CountingSession, dict[str, Levels]]:
    """A session on which one packed batch was counted, and the planned levels."""
    levels = make_plan(work.model, work.parameters, work.packing).levels
    session = CountingSession(work.parameters, work.packing)
    session.place(work.model, levels)
    fresh = session.backend.fresh(session.top)
    state = replace(fresh, batch_shape=(work.packing.blocks(work.model.config.hidden_size),))
    _forward(session, work, state, fresh)
    return session, levels


def _forward(session: EncryptedSession, work: Workload, state: Any, mask: Any) -> EncryptedTensor:
    with torch.no_grad():
        hidden = session.hidden_state(state, work.model.config.hidden_size)
        logits = work.model(embedding_output=hidden, attention_mask=session.attention_mask(mask)).logits
        _ = logits.ciphertext
    return logits


def _row(
    work: Workload, backend: str, device: str, seconds: float, by_op: dict[str, float], bootstraps: int, memory: float | None, gpu: float | None
) -> dict[str, Any]:
    """The JSON contract. `seconds_batch` is of all `batch` sentences; `bootstraps` counts ciphertexts; memory is this process's, client included."""
    batch = len(work.embeddings)
    return {
        "backend": backend,
        "device": device,
        "versions": versions(backend, device),
        "shape": {"name": work.name, "model": SHAPES[work.name].name, "tokens": work.packing.tokens, "ring_degree": work.parameters.ring_degree},
        "features_per_ciphertext": work.packing.features,
        "batch": batch,
        "seconds_batch": seconds,
        "seconds_sample": seconds / batch,
        "by_op": by_op,
        "bootstraps": bootstraps,
        "peak_memory_gb": memory,
        "peak_gpu_gb": gpu,
        "security_bits": work.parameters.security_bits,
        "paper": PAPER,
    }


def versions(backend: str, device: str) -> dict[str, str | None]:
    """Of Python, this package, the backend's libraries and the accelerator."""
    found: dict[str, str | None] = {"hf_he": __version__, "python": platform.python_version()}
    for name in LIBRARIES.get(backend, ()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if backend == "desilo":
        found["desilofhe"] = installed_version()
    if device != "cpu":
        found |= {"cuda": torch.version.cuda, "accelerator": torch.cuda.get_device_name(device) if torch.cuda.is_available() else None}
    return found


class Card:
    """The CUDA device of a measurement; on a CPU nothing to wait for and no memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.there = device != "cpu" and torch.cuda.is_available()
        self._taken_before = self._taken() if self.there else 0

    def _taken(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def synchronise(self) -> None:
        if self.there:
            torch.cuda.synchronize(self.device)

    def begin_peak_period(self) -> None:
        if self.there:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float | None:
        """What torch reserved at most since `begin_peak_period`, or what the card holds now beyond what it held before the backend was made, if that is
        more: libraries beside torch keep their own memory."""
        if not self.there:
            return None
        return max(torch.cuda.max_memory_reserved(self.device), self._taken() - self._taken_before) / 1e9


def table(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each line shown."""
    kind = "priced by operation counts for one core: a projection" if row.get("priced") else "measured"
    paper, by_op = row["paper"], ", ".join(f"{name} {value:.2f}" for name, value in sorted(row["by_op"].items(), key=lambda item: -item[1]))
    memory = "not measured" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.2f} GB"
    return [
        ("backend", f"{row['backend']} on {row['device']}, {kind}"),
        ("shape", f"{row['shape']['model']}, N = {row['shape']['ring_degree']}, {row['security_bits']} bits"),
        ("features per ciphertext", str(row["features_per_ciphertext"])),
        ("seconds", f"{row['seconds_batch']:.2f} for {row['batch']} sentences, {row['seconds_sample']:.3f} each"),
        ("seconds by operation", by_op),
        ("bootstrapped ciphertexts", str(row["bootstraps"])),
        ("memory", memory if row["peak_gpu_gb"] is None else f"{memory}, {row['peak_gpu_gb']:.2f} GB on the card"),
        ("paper", f"{paper['inference_s']} s an inference, {paper['finetune_s']} s a fine-tuning sample, {paper['hardware']}"),
    ]
