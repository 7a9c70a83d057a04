"""What a training step will need, found without keys or data: rotations, refreshes, operations and time of one step on a counting backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from hf_he.ckks.parameters import CKKSParameters
from hf_he.finetuning.adapter import SPREAD_DEPTH, AdapterLayout
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.step import MicroBatch, TrainingRun, adapted_model
from hf_he.measurement import physical_memory_bytes
from hf_he.packing import Packing
from hf_he.planner import CountingSession, cheapest_packing, packing_widths
from hf_he.refresh import LARGEST_REFRESH


@dataclass(frozen=True)
class Part:
    """Operations by primitive, estimated seconds of one core by scope, and refreshes as (level, ciphertexts)."""

    operations: dict[str, int]
    seconds: dict[str, float]
    refreshes: tuple[tuple[int, int], ...]


PEAK_TO_WEIGHTS = 3.5
"""Memory of a step with one feature per ciphertext, client's and server's, to that of its encrypted weights: 18.5 GB to 5.24 natively at N = 2^14."""


@dataclass(frozen=True)
class StepPlan:
    """One micro-batch (forward and backward), what remains of a step (installing the weights, packing the gradient, the optimiser), and every
    rotation of both.

    `rotations`: step -> highest level of its use. `update` is that of the first step or of later ones, whichever costs more.
    """

    rotations: dict[int, int]
    micro_batch: Part
    update: Part

    def refreshes(self, micro_batches: int) -> int:
        """Messages to the client that a step of so many micro-batches sends for refreshes."""

        def messages(part: Part) -> int:
            return sum(-(-count // LARGEST_REFRESH) for _, count in part.refreshes)

        return micro_batches * messages(self.micro_batch) + messages(self.update)

    @property
    def widest_refresh(self) -> int:
        """Ciphertexts of the largest refresh."""
        return max((count for part in (self.micro_batch, self.update) for _, count in part.refreshes), default=1)

    def seconds(self, micro_batches: int) -> dict[str, float]:
        """Estimated seconds of a step on one core, by scope."""
        scopes = {**self.micro_batch.seconds, **self.update.seconds}
        return {name: micro_batches * self.micro_batch.seconds.get(name, 0.0) + self.update.seconds.get(name, 0.0) for name in scopes}

    def operations(self, micro_batches: int) -> dict[str, int]:
        """Operations of a step, by primitive."""
        names = {**self.micro_batch.operations, **self.update.operations}
        return {name: micro_batches * self.micro_batch.operations.get(name, 0) + self.update.operations.get(name, 0) for name in names}


def plan_step(model: nn.Module, parameters: CKKSParameters, packing: Packing, settings: TrainingSettings) -> StepPlan:
    """The plan of a training step of `model`, which gets the adapter of `settings` (pass a model of your own)."""
    session = CountingSession(parameters, packing)
    run = TrainingRun(session, model, replace(settings, steps=max(settings.steps, 2)))
    fresh = session.backend.fresh(session.top)
    blocks, labels = (replace(fresh, batch_shape=(packing.blocks(count),)) for count in (run.model.config.hidden_size, run.num_labels))
    ask = (lambda logits: labels) if settings.loss_location == "client" else None
    return plan_run(session, run, lambda: run.micro_batch(MicroBatch(blocks, fresh, labels, fresh), ask))


@dataclass(frozen=True)
class StepChoice:
    """The packing that takes the least time for a step, its plan, and why: the seconds of one core for the whole step, by features per ciphertext, and
    how many ciphertexts the model's encrypted weights are, which it holds at `weight_bytes` during the step."""

    packing: Packing
    plan: StepPlan
    seconds: dict[int, float]
    weights: dict[int, int]
    weight_bytes: dict[int, int]
    reason: str


def choose_step_packing(
    make_model: Callable[[], nn.Module], parameters: CKKSParameters, tokens: int, settings: TrainingSettings, ranks: int = 1, memory: int | None = None
) -> StepChoice:
    """`choose_packing` of hf_he.planner for a training step of `settings.sequences` examples, whose micro-batches `ranks` processes share; `make_model`
    gives a new model each time. Without `memory` bytes (this machine's) for a step, PEAK_TO_WEIGHTS times its encrypted weights, one feature per ciphertext
    is not considered."""
    memory = physical_memory_bytes() if memory is None else memory
    packings = [Packing.fit(parameters.slots, width, tokens) for width in packing_widths(make_model().config)]
    weights = {packing.features: AdapterLayout.of(adapted_model(make_model(), settings), packing).total for packing in packings}
    each = 2 * 8 * parameters.ring_degree * (parameters.max_level + 1 - SPREAD_DEPTH)
    bytes_ = {width: count * each for width, count in weights.items()}
    peak = PEAK_TO_WEIGHTS * bytes_.get(1, 0)
    plans, seconds = {}, {}
    for packing in packings:
        if packing.features > 1 or peak <= memory or len(packings) == 1:
            plans[packing] = plan_step(make_model(), parameters, packing, settings)
            seconds[packing] = sum(plans[packing].seconds(-(-settings.sequences // (packing.sequences * ranks))).values())
    packing, reason = cheapest_packing(seconds, settings.sequences)
    if len(plans) < len(packings):
        reason = f"{packing.features} features per ciphertext, because a step with 1 would take {peak / 1e9:.1f} GB of {memory / 1e9:.1f}"
    if ranks > 1:
        reason += f"; {ranks} processes share the packed batches"
    held = "; ".join(f"encrypted weights with {width} a ciphertext: {count:,} ciphertexts, {bytes_[width] / 1e9:.2f} GB" for width, count in weights.items())
    by_width = {known.features: value for known, value in seconds.items()}
    return StepChoice(packing, plans[packing], by_width, weights, bytes_, f"{reason}; {held}")


def plan_run(session: CountingSession, run: TrainingRun, micro_batch: Callable[[], object]) -> StepPlan:
    """The plan of a step of `run` on a counting session, its schedule two steps or longer; `micro_batch` does forward and backward of one."""
    backend, settings = session.backend, run.settings
    fresh = backend.fresh(session.top)
    run.load(replace(fresh, batch_shape=(run.layout.count,)))

    def measured() -> Part:
        part = Part(backend.log.operations(), dict(backend.seconds), tuple(backend.refreshes))
        rotations.update({step: max(level, rotations.get(step, 0)) for step, level in backend.rotation_levels.items()})
        backend.reset()
        return part

    rotations: dict[int, int] = {}
    updates = []
    for step in (1, 2):
        backend.reset()
        run.prepare()
        before = measured()
        micro_batch()
        of_batch = measured()
        gradient = run.gradient(settings.sequences)
        if settings.optimizer_location == "server":
            run.load(*run.update(gradient, step))
        else:
            run.load(replace(fresh, batch_shape=(run.layout.count,)))
        updates.append(_sum(before, measured()))
    return StepPlan(rotations, of_batch, max(updates, key=lambda part: sum(part.seconds.values())))


def _sum(a: Part, b: Part) -> Part:
    return Part(dict(Counter(a.operations) + Counter(b.operations)), dict(Counter(a.seconds) + Counter(b.seconds)), a.refreshes + b.refreshes)
