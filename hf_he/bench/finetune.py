"""LoRA with the Gaussian kernel against full fine-tuning with softmax attention, in operations and in seconds.

One training step (forward, backward, optimiser) and one inference of each are run on a backend that counts, with the very code that trains under
encryption; each operation is priced at its level with what the native engine takes for it on this machine, measured in the same run.
The baseline is hf_he.bench.full_finetuning: encrypted weight matrices multiplied as by Jiang et al. (CCS 2018), as in Rho et al. (ICLR 2025), with
fewer rotations than there; softmax with an exponential by squaring and Goldschmidt's reciprocal (hf_he.ops.softmax), without the search for
the row maximum; AdamW-HE on every encrypted ciphertext of weights. Pricing is checked on what runs natively: one layer of each kind, and one
product with an encrypted matrix.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_he import HEBertConfig, HEBertForSequenceClassification
from hf_he.backends.native import NativeBackend
from hf_he.bench.full_finetuning import encrypt_encoder, use_softmax
from hf_he.bench.pricing import PricedSession, Prices, Units
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.finetuning.adapter import AdapterLayout, EncryptedAdapter
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.step import MicroBatch, TrainingRun, make_loss, make_optimizer
from hf_he.ops import matrix
from hf_he.packing import Packing, pack_attention_mask, pack_embeddings
from hf_he.planner import make_plan
from hf_he.refresh import ClientRefresh
from hf_he.tensor import EncryptedSession

PAPER = {"finetune_ratio": 6.94, "inference_ratio": 2.33}
"""Rho et al., ICLR 2025: 423.55 s against 61.03 s, and 61.84 s against 26.5 s."""

MATRIX_FEATURES = 32

OPTIMIZER_STEPS = 8
"""Steps over which the optimiser's cost is averaged: not every step refreshes everything."""

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """A model and how it is packed: `features` per ciphertext, `tokens` per sequence."""

    name: str
    parameters: str
    features: int
    tokens: int
    config: dict[str, Any] = field(hash=False)

    @property
    def packing(self) -> Packing:
        return Packing.fit(parameter_set(self.parameters).slots, self.features, self.tokens)


PAPER_SHAPE = Shape(
    "2 x 768, 12 heads, 128 tokens",
    "n16-bootstrap",
    256,
    128,
    {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "gated_ffn": True,
        "hidden_act": "relu",
        "norm_position": "pre",
        "use_bias": False,
        "use_pooler": False,
        "classifier_hidden_sizes": [32, 1024],
    },
)
SHIPPED_SHAPE = Shape("2 x 128, 2 heads, 32 tokens", "n14", 128, 32, {})

ENTRIES = {
    "variance": {"interval": [0.1, 1.0], "degree": 7, "newton_steps": 0},
    "exponent": {"interval": [-16.0, 0.0], "squarings": 5},
    "relu": {"interval": [-4.0, 4.0], "degree": 7},
    "gelu": {"interval": [-4.0, 4.0], "degree": 7},
    "tanh": {"interval": [-2.5, 2.5], "degree": 7},
}
"""Polynomials as deep as those of the shipped model; only depths and degrees matter for the cost."""


def make_model(shape: Shape, layers: int = 2) -> HEBertForSequenceClassification:
    """A random model of the shape in polynomial mode."""
    torch.manual_seed(0)
    config = HEBertConfig(vocab_size=64, max_position_embeddings=shape.tokens, num_hidden_layers=layers, num_labels=2, **shape.config)
    model = HEBertForSequenceClassification(config).eval().requires_grad_(False)
    model.set_approximations({name: entry_for(module) for name, module in model.named_modules() if hasattr(module, "entry_keys")})
    model.set_mode("polynomial")
    return model


def entry_for(module: nn.Module) -> dict[str, Any]:
    """The entry of ENTRIES for a layer that takes a polynomial."""
    if "squarings" in module.entry_keys:
        return ENTRIES["exponent"]
    return ENTRIES["variance"] if "newton_steps" in module.entry_keys else ENTRIES[module.function]


@dataclass
class Work:
    """What was counted of one way to train: units by part of a step ("layers", "optimizer") and of one inference; refreshed ciphertexts."""

    step: dict[str, Units]
    inference: Units
    trained_ciphertexts: int

    def refreshes(self) -> dict[str, float]:
        parts = {**self.step, "inference": self.inference}
        return {part: sum(count for (name, _), count in units.items() if name == "refresh") for part, units in parts.items()}


def count_lora(shape: Shape, rank: int = 2, softmax_attention: bool = False, parameters: CKKSParameters | None = None, features: int | None = None) -> Work:
    """LoRA of this rank on queries, keys and values, and the classifier; Gaussian-kernel attention, or softmax. `parameters` and `features` per
    ciphertext: others than the shape's."""
    parameters = parameters or parameter_set(shape.parameters)
    session = PricedSession(parameters, Packing.fit(parameters.slots, features or shape.features, shape.tokens))
    backend = session.backend
    run = TrainingRun(session, make_model(shape), TrainingSettings(rank=rank))
    if softmax_attention:
        use_softmax(session, run.model)
    fresh = backend.fresh(session.top)
    run.load(replace(fresh, batch_shape=(run.layout.count,)))
    run.prepare()
    backend.take_units()
    with torch.no_grad():
        _forward(session, run.model, fresh)
    inference = backend.take_units()
    layers, optimizer = Counter(), Counter()
    for step in range(1, OPTIMIZER_STEPS + 1):
        run.prepare()
        optimizer += backend.take_units()
        labels = replace(fresh, batch_shape=(session.packing.blocks(run.num_labels),))
        run.micro_batch(MicroBatch(_blocks(session, run.model, fresh), fresh, labels, fresh))
        layers += backend.take_units()
        run.load(*run.update(run.gradient(session.packing.sequences), step))
        optimizer += backend.take_units()
    return Work({"layers": _scaled(layers, 1 / OPTIMIZER_STEPS), "optimizer": _scaled(optimizer, 1 / OPTIMIZER_STEPS)}, inference, run.layout.count)


def count_inference(shape: Shape, parameters: CKKSParameters, packing: Packing) -> Units:
    """A merged adapter, at the planned levels."""
    model = make_model(shape)
    session = PricedSession(parameters, packing)
    session.place(model, make_plan(model, parameters, packing).levels)
    fresh = session.backend.fresh(session.top)
    with torch.no_grad():
        _forward(session, model, fresh)
    return session.backend.take_units()


def count_full(shape: Shape) -> Work:
    """Every encoder matrix and the classifier trained, softmax attention."""
    settings = TrainingSettings()
    session = PricedSession(parameter_set(shape.parameters), shape.packing)
    backend, packing = session.backend, shape.packing
    model, fresh = make_model(shape), backend.fresh(session.top)
    model.classifier.requires_grad_(True)
    layout = AdapterLayout.of(model, packing)
    head = EncryptedAdapter(session, model, layout, replace(fresh, batch_shape=(layout.count,)))

    def encrypted(name: str, linear: nn.Linear) -> Any:
        count = matrix.parts(packing) * packing.blocks(linear.in_features) * packing.blocks(linear.out_features)
        return replace(fresh, batch_shape=(count,))

    matrices = encrypt_encoder(session, model, encrypted)
    head.install()
    backend.take_units()
    with torch.no_grad():
        _forward(session, model, fresh)
    inference = backend.take_units()
    head.install()
    optimizer = backend.take_units()
    _forward(session, model, fresh, session.labels(fresh, fresh, 2, loss=make_loss(settings, 2))).loss.backward()
    gradients = [leaf.grad.ciphertext for leaf in matrices.values()]
    layers = backend.take_units()
    gradient = head.collect(make_optimizer(settings).gradient_gain)
    optimizer += backend.take_units()
    total = layout.count + sum(ct.count for ct in gradients)
    optimizer += _scaled(_updates(session, replace(fresh, level=gradient.level, scale=gradient.scale)), total)
    return Work({"layers": layers, "optimizer": optimizer}, inference, total)


def _updates(session: PricedSession, gradient: Any) -> Units:
    """Of one ciphertext of weights, per step."""
    optimizer, backend, state = make_optimizer(TrainingSettings()), session.backend, {}
    weights = backend.fresh(session.top)
    backend.take_units()
    for step in range(1, OPTIMIZER_STEPS + 1):
        weights = session.ensure_level(weights, min(6, session.top))
        weights, state = optimizer.step(session, weights, gradient, state, 1e-3, step)
    return _scaled(backend.take_units(), 1 / OPTIMIZER_STEPS)


def _blocks(session: PricedSession, model: nn.Module, fresh: Any) -> Any:
    return replace(fresh, batch_shape=(session.packing.blocks(model.config.hidden_size),))


def _forward(session: PricedSession, model: nn.Module, fresh: Any, labels: Any = None) -> Any:
    hidden = session.hidden_state(_blocks(session, model, fresh))
    output = model(embedding_output=hidden, attention_mask=session.attention_mask(fresh), labels=labels)
    _ = output.logits.ciphertext
    return output


def _scaled(units: Units, factor: float) -> Units:
    return Counter({key: count * factor for key, count in units.items()})


@dataclass(frozen=True)
class Validation:
    """What ran natively beside what pricing its operations gives, in seconds."""

    what: str
    measured: float
    priced: float

    @property
    def ratio(self) -> float:
        return self.priced / self.measured


def compare(shape: Shape, prices: Prices, announce: Announce) -> dict[str, Any]:
    """One row of the JSON contract, without the validation. Ratios are those of priced seconds."""
    announce(f"{shape.name}: counting operations")
    ways = {"lora_gaussian": count_lora(shape), "lora_softmax": count_lora(shape, softmax_attention=True), "full_softmax": count_full(shape)}
    priced: dict[str, Any] = {}
    for way, work in ways.items():
        parts = {part: prices.seconds(units, announce) for part, units in {**work.step, "inference": work.inference}.items()}
        totals = {part: sum(by_unit.values()) for part, by_unit in parts.items()}
        priced[way] = {
            "seconds": totals | {"step": totals["layers"] + totals["optimizer"]},
            "by_primitive": parts,
            "refreshed_ciphertexts": work.refreshes(),
            "trained_ciphertexts": work.trained_ciphertexts,
        }

    def ratio(part: str, way: str = "full_softmax") -> float:
        return priced[way]["seconds"][part] / priced["lora_gaussian"]["seconds"][part]

    packing = shape.packing
    return {
        "shape": shape.name,
        "parameters": shape.parameters,
        "packing": packing.to_dict(),
        "finetune_ratio": ratio("step"),
        "finetune_ratio_without_optimizer": ratio("layers"),
        "inference_ratio": ratio("inference"),
        "softmax_finetune_ratio": ratio("step", "lora_softmax"),
        "softmax_inference_ratio": ratio("inference", "lora_softmax"),
        "priced": priced,
        "paper": PAPER,
    }


class Native:
    """Client and server in one process, for timing: refreshes are serialised, decrypted, encrypted and read again."""

    def __init__(self, prices: Prices, packing: Packing, rotations: set[int]) -> None:
        parameters = prices.backend.parameters
        self.backend = NativeBackend(parameters)
        self.secret = self.backend.generate_secret_key()
        self.backend.load_evaluation_keys(self.backend.generate_evaluation_keys(self.secret, rotations))
        self.session = EncryptedSession(self.backend, packing, ClientRefresh(self._refresh))

    def _refresh(self, data: bytes) -> bytes:
        ciphertext = self.backend.deserialize(data, "ciphertext")
        return self.backend.serialize(self.backend.encrypt(self.backend.decrypt(ciphertext, self.secret), self.secret))

    def encrypt(self, values: np.ndarray) -> Any:
        return self.backend.encrypt(values, self.secret)


def validate(shape: Shape, prices: Prices, announce: Announce) -> list[Validation]:
    """One layer with each attention, and one product with an encrypted matrix, natively: refreshes by the client. The matrix is of 32 features,
    because every rotation of a wider one needs a key."""
    found = []
    generator = np.random.default_rng(0)
    packing = shape.packing
    values = pack_embeddings(generator.standard_normal((packing.sequences, packing.tokens, packing.features)), packing)
    ones = pack_attention_mask(np.ones((packing.sequences, packing.tokens)), packing)
    for softmax_attention in (False, True):
        name = f"one layer, {'softmax' if softmax_attention else 'Gaussian kernel'}"
        announce(f"{shape.name}: {name}, natively")

        def layer(session: EncryptedSession, state: Any, mask: Any, softmax_attention: bool = softmax_attention) -> Callable[[], Any]:
            model = make_model(shape, layers=1)
            if softmax_attention:
                use_softmax(session, model)
            module = model.base_model.encoder.layer[0]
            return lambda: module(session.hidden_state(state), session.attention_mask(mask)).ciphertext

        found.append(_validated(name, prices, packing, layer, (values, ones)))
    announce(f"{shape.name}: an encrypted matrix, natively")
    tokens = min(packing.tokens, MATRIX_FEATURES)
    small = Packing.fit(packing.slots, MATRIX_FEATURES, tokens)
    weight = matrix.pack_matrix(generator.standard_normal((MATRIX_FEATURES, MATRIX_FEATURES)), small)
    state = pack_embeddings(generator.standard_normal((small.sequences, tokens, MATRIX_FEATURES)), small)

    def product(session: EncryptedSession, x: Any, w: Any) -> Callable[[], Any]:
        return lambda: matrix.encrypted(session, x, w, 1)

    return [*found, _validated("product with an encrypted matrix", prices, small, product, (state, weight))]


def _validated(what: str, prices: Prices, packing: Packing, prepare: Callable[..., Callable[[], Any]], inputs: tuple[np.ndarray, ...]) -> Validation:
    """Counts what `prepare(session, *ciphertexts)` gives, then times it natively, the median of three runs: plaintexts are encoded in one before."""
    counting = PricedSession(prices.backend.parameters, packing)
    fresh = counting.backend.fresh(counting.top)
    with torch.no_grad():
        prepare(counting, *(replace(fresh, batch_shape=(len(values),)) for values in inputs))()
        rotations = set(counting.backend.rotation_levels)
        units = counting.backend.take_units()
        native = Native(prices, packing, rotations)
        run = prepare(native.session, *(native.encrypt(values) for values in inputs))
        run()
        times = []
        for _ in range(3):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    return Validation(what, statistics.median(times), sum(prices.seconds(units).values()))


def measure(shapes: Sequence[Shape], runs: int, announce: Announce) -> list[dict[str, Any]]:
    """A row of the JSON contract per shape. `measured_layer` is at the shipped shape in every row: no bootstrap, little memory."""
    announce(f"{SHIPPED_SHAPE.name}: keys of {SHIPPED_SHAPE.parameters}")
    known = {SHIPPED_SHAPE.parameters: Prices(parameter_set(SHIPPED_SHAPE.parameters), runs)}
    layers = [asdict(found) | {"ratio": found.ratio} for found in validate(SHIPPED_SHAPE, known[SHIPPED_SHAPE.parameters], announce)]
    rows = []
    for shape in shapes:
        if shape.parameters not in known:
            announce(f"{shape.name}: keys of {shape.parameters}")
            known[shape.parameters] = Prices(parameter_set(shape.parameters), runs)
        rows.append(compare(shape, known[shape.parameters], announce) | {"measured_layer": layers})
    return rows


def table(row: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one shape: CPU seconds of each way to train, and how many times ours."""
    header = ["trained", "attention", "layers", "optimizer", "step", "inference", "step ratio", "inference ratio", "refreshed"]
    ours = row["priced"]["lora_gaussian"]["seconds"]
    lines = []
    for way, found in row["priced"].items():
        seconds, refreshed = found["seconds"], found["refreshed_ciphertexts"]
        cells = [f"{seconds[part]:.3g}" if seconds[part] < 1000 else f"{seconds[part]:.0f}" for part in ("layers", "optimizer", "step", "inference")]
        ratios = [f"{seconds[part] / ours[part]:.2f}" for part in ("step", "inference")]
        lines.append([*way.split("_"), *cells, *ratios, f"{refreshed['layers'] + refreshed['optimizer']:.0f}"])
    paper = row["paper"]
    return header, [*lines, ["paper:", "full", "", "", "", "", str(paper["finetune_ratio"]), str(paper["inference_ratio"]), ""]]
