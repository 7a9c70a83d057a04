"""At which level each operation of a model runs and where it is refreshed: a shortest path, found without keys or data.

Each stage of a post-norm HEBert (attention with its residual sum, LayerNorm, feed-forward with its residual sum, LayerNorm, ..., classifier) or of a
decoder (hf_he.decoder_levels) is run at every choice of its levels on a backend that only counts (hf_he.level_search). A choice needs some level
of the hidden state and leaves another; refreshing the state between two stages costs one ciphertext, refreshing inside a stage what it refreshes.
The cheapest path from the fresh input to the logits over (stage, level) is the plan. Other architectures run at the defaults of hf_he.ops,
demand by demand.

    plan = make_plan(model, parameters, packing)
    session.place(model, plan.levels)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_he.ckks.bootstrapping.keys import rotation_limbs
from hf_he.ckks.bootstrapping.plan import BootstrapPlan
from hf_he.ckks.parameters import CKKSParameters
from hf_he.ckks.vector import packed_width
from hf_he.decoder_levels import DecoderSearch
from hf_he.errors import ShapeError
from hf_he.level_search import CountingSession, Stage, cheapest, encoder_stages, run
from hf_he.ops import DECODERS
from hf_he.ops.placement import Levels
from hf_he.packing import Packing
from hf_he.tensor import EncryptedTensor

__all__ = ["CountingSession", "PackingChoice", "Plan", "cheapest_packing", "choose_packing", "key_sizes", "make_plan", "make_plans", "packing_widths"]

WORTH = 1.5
"""How many times faster one feature per ciphertext must be, since it takes more memory and larger messages."""


@dataclass(frozen=True)
class Plan:
    """What the encrypted forward of one packed batch does.

    `levels`: by submodule name, for `EncryptedSession.place`. `rotations`: step -> highest level of its use. `relinearization`: highest level
    of a product. `refreshes`: (level, ciphertexts) in order. `operations`: counts by primitive. `seconds`: estimate for one core, by scope.
    """

    levels: dict[str, Levels]
    rotations: dict[int, int]
    relinearization: int
    refreshes: tuple[tuple[int, int], ...]
    operations: dict[str, int]
    seconds: dict[str, float]


def make_plan(model: nn.Module, parameters: CKKSParameters, packing: Packing) -> Plan:
    """The plan of a HEBert sequence classifier or a decoder (all positions, no padding mask) in polynomial mode."""
    session = CountingSession(parameters, packing, model.config.hidden_size)
    backend = session.backend
    with torch.no_grad():
        levels = cheapest(_stages(model, session), session)
        session.place(model, levels)
        backend.reset()
        run(lambda: _forward(model, session))
    return Plan(levels, backend.rotation_levels, backend.relinearization_level, tuple(backend.refreshes), backend.log.operations(), dict(backend.seconds))


@dataclass(frozen=True)
class PackingChoice:
    """The packing that takes the least time for a batch, its plan, and why: the seconds of one core for the whole batch, by features per ciphertext."""

    packing: Packing
    plan: Plan
    seconds: dict[int, float]
    reason: str


def packing_widths(config: Any) -> tuple[int, ...]:
    """Features per ciphertext that a model can be packed with, the usual one first: the hidden size (of an encoder whose is no power of two, its largest
    divisor that is, where blocks of so many hold whole heads), and one, for batches of hundreds.

    Raises ShapeError where neither is possible.
    """
    if config.model_type in DECODERS:
        return (config.hidden_size,)
    widest, heads = config.hidden_size & -config.hidden_size, config.num_attention_heads
    widths = (widest,) if heads % (config.hidden_size // widest) == 0 else ()
    widths += (1,) if config.attention_kernel == "gaussian_kernel" and widths != (1,) else ()
    if not widths:
        raise ShapeError(
            f"{heads} heads cannot be shared out among ciphertexts of {widest} of {config.hidden_size} features: choose heads of a power of two of features"
        )
    return widths


def make_plans(model: nn.Module, parameters: CKKSParameters, tokens: int) -> dict[Packing, Plan]:
    """The plan of each packing of sequences of `tokens` tokens that the model has."""
    packings = [Packing.fit(parameters.slots, width, tokens) for width in packing_widths(model.config)]
    return {packing: make_plan(model, parameters, packing) for packing in packings}


def choose_packing(plans: Mapping[Packing, Plan], batch: int) -> PackingChoice:
    """Which of the packings of `make_plans` takes the least time for `batch` sequences. A packed batch costs the same whether it is full or not, which
    decides; one feature per ciphertext must be WORTH times faster."""
    seconds = {packing: -(-batch // packing.sequences) * sum(plan.seconds.values()) for packing, plan in plans.items()}
    packing, reason = cheapest_packing(seconds, batch)
    return PackingChoice(packing, plans[packing], {known.features: value for known, value in seconds.items()}, reason)


def cheapest_packing(seconds: Mapping[Packing, float], batch: int) -> tuple[Packing, str]:
    """The packing that takes the least of the seconds of one core for `batch` sequences, by the rule of `choose_packing`, and why."""
    packing = min(seconds, key=lambda known: seconds[known] * (WORTH if known.features == 1 else 1.0))
    if len(seconds) == 1:
        return packing, "the only packing of this model"
    said = []
    for known, value in seconds.items():
        runs = -(-batch // known.sequences)
        batches = "1 packed batch" if runs == 1 else f"{runs} packed batches"
        said.append(f"with {known.features} a ciphertext {value:.1f} s, {batches} of up to {known.sequences} sequences")
    features = "one feature per ciphertext pays" if packing.features == 1 else f"{packing.features} features per ciphertext suit"
    rule = f"one feature must be {WORTH} times faster, since it takes more memory and larger messages"
    return packing, f"{features} {batch} sequences: {'; '.join(said)} (of one core; {rule})"


def key_sizes(plan: Plan, parameters: CKKSParameters) -> dict[str, dict[str, int]]:
    """Number of keys and their bytes in memory and in files, for the model and, where the parameters bootstrap, for bootstrapping.

    A key covers the moduli of the highest level of its use. A residue takes 4, 6 or 7 bytes; files hold one half of each key, which servers map, and
    a seed.
    """

    def size(limbs: list[int], chain: tuple[int, ...]) -> dict[str, int]:
        total = {"count": len(limbs), "memory": 0, "files": 0}
        for count in limbs:
            residues = -(-count // parameters.digit_size) * parameters.ring_degree
            covered = (*chain[:count], *parameters.special_moduli)
            half = residues * sum(map(packed_width, covered))
            total["memory"] += 2 * half
            total["files"] += half
        return total

    sizes = {"model": size([len(parameters.moduli), *(level + 1 for level in plan.rotations.values())], parameters.moduli)}
    if parameters.bootstrap_moduli:
        boot = BootstrapPlan(parameters)
        # relinearisation, conjugation, the rotations of the transforms, and the key from the sparse secret to the main one
        sizes["bootstrapping"] = size([boot.levels[0], boot.levels[0], boot.top, *rotation_limbs(boot).values()], parameters.full_moduli)
    return sizes


def _stages(model: nn.Module, session: CountingSession) -> list[Stage]:
    """None for a HEBert that is no chain of post-norm blocks with a Gaussian kernel."""
    config = model.config
    if config.model_type in DECODERS:
        return DecoderSearch(model, session).stages()
    chain = config.norm_position == "post" and not config.gated_ffn and config.attention_kernel == "gaussian_kernel"
    return encoder_stages(model, session) if chain else []


def _forward(model: nn.Module, session: CountingSession) -> EncryptedTensor:
    """Logits of a fresh batch."""
    if model.config.model_type in DECODERS:
        return model(inputs_embeds=session.state(session.top), use_cache=False).logits
    return model(embedding_output=session.state(session.top), attention_mask=session.mask()).logits
