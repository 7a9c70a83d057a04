"""At which level each operation of a model runs and where it is refreshed: a shortest path, found without keys or data.

Each stage of a post-norm HEBert (attention with its residual sum, LayerNorm, feed-forward with its residual sum, LayerNorm, ..., classifier) is run
at every choice of its levels on a backend that only counts. A choice needs some level of the hidden state and leaves another; refreshing the
state between two stages costs one ciphertext, refreshing inside a stage what it refreshes. The cheapest path from the fresh input to the logits over
(stage, level) is the plan. Other architectures run at the defaults of hf_he.ops, demand by demand.

    plan = make_plan(model, parameters, packing)
    session.place(model, plan.levels)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_he.backends.base import Plaintext
from hf_he.backends.counting import CountingBackend
from hf_he.ckks.bootstrapping.keys import rotation_limbs
from hf_he.ckks.bootstrapping.plan import BootstrapPlan
from hf_he.ckks.parameters import CKKSParameters
from hf_he.ckks.vector import packed_width
from hf_he.ops import DECODERS, polynomial
from hf_he.ops.attention import SCORE_DEPTH
from hf_he.ops.norm import STATISTIC_DEPTH, inverse_root_depth, inverse_root_level
from hf_he.ops.placement import ActivationLevels, AttentionLevels, Levels, NormLevels
from hf_he.packing import Packing
from hf_he.tensor import EncryptedSession, EncryptedTensor


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


@dataclass(frozen=True)
class Choice:
    """One way to run a stage: the level of the state it needs, the level it leaves at most, and its seconds."""

    need: int
    output: int
    seconds: float
    levels: dict[str, Levels]


class CountingSession(EncryptedSession):
    """A session on a CountingBackend: plaintexts have shapes only."""

    def __init__(self, parameters: CKKSParameters, packing: Packing) -> None:
        backend = CountingBackend(parameters)
        super().__init__(backend, packing, backend)
        self._shapes: dict[Any, tuple[int, ...]] = {}

    def encoded(self, owners: tuple[Any, ...], tag: Any, level: int, scale: float, build: Callable[[], np.ndarray]) -> Plaintext:
        key = (tuple(map(id, owners)), tag)
        if key not in self._shapes:
            self._shapes[key] = build().shape
        shape = self._shapes[key]
        return Plaintext(None, shape[:-1], level, scale, shape[-1])

    def state(self, level: int) -> EncryptedTensor:
        return self.hidden_state(self.backend.fresh(level))

    def mask(self) -> EncryptedTensor:
        return self.attention_mask(self.backend.fresh(self.top))


def make_plan(model: nn.Module, parameters: CKKSParameters, packing: Packing) -> Plan:
    """The plan of a HEBert sequence classifier or a decoder (all positions, no padding mask) in polynomial mode."""
    session = CountingSession(parameters, packing)
    backend = session.backend
    with torch.no_grad():
        levels = _cheapest(_stages(model, session), session) if _is_chain(model) else {}
        session.place(model, levels)
        backend.reset()
        _run(lambda: _forward(model, session))
    return Plan(levels, backend.rotation_levels, backend.relinearization_level, tuple(backend.refreshes), backend.log.operations(), dict(backend.seconds))


def key_sizes(plan: Plan, parameters: CKKSParameters) -> dict[str, dict[str, int]]:
    """Number of keys and their bytes in memory and in files, for the model and, where the parameters bootstrap, for bootstrapping.

    A key covers the moduli of the highest level of its use. In memory a residue takes 4, 6 or 7 bytes; files hold one half of each key in ceil(b / 8)
    bytes per residue of a b-bit modulus, and a seed.
    """

    def size(limbs: list[int], chain: tuple[int, ...]) -> dict[str, int]:
        total = {"count": len(limbs), "memory": 0, "files": 0}
        for count in limbs:
            residues = -(-count // parameters.digit_size) * parameters.ring_degree
            covered = (*chain[:count], *parameters.special_moduli)
            total["memory"] += 2 * residues * sum(map(packed_width, covered))
            total["files"] += residues * sum(-(-modulus.bit_length() // 8) for modulus in covered)
        return total

    sizes = {"model": size([len(parameters.moduli), *(level + 1 for level in plan.rotations.values())], parameters.moduli)}
    if parameters.bootstrap_moduli:
        boot = BootstrapPlan(parameters)
        # relinearisation, conjugation, the rotations of the transforms, and the key from the sparse secret to the main one
        sizes["bootstrapping"] = size([boot.levels[0], boot.levels[0], boot.top, *rotation_limbs(boot).values()], parameters.full_moduli)
    return sizes


def _is_chain(model: nn.Module) -> bool:
    config = model.config
    return getattr(config, "norm_position", "pre") == "post" and not config.gated_ffn and config.attention_kernel == "gaussian_kernel"


def _forward(model: nn.Module, session: CountingSession) -> EncryptedTensor:
    """Logits of a fresh batch."""
    if model.config.model_type in DECODERS:
        return model(inputs_embeds=session.state(session.top), use_cache=False).logits
    return model(embedding_output=session.state(session.top), attention_mask=session.mask()).logits


def _run(function: Callable[[], EncryptedTensor], level: int | None = None) -> int:
    """Compute what `function` returns, at `level` if it is still waiting; its level."""
    operand = function().operand
    return (operand.ciphertext if level is None else operand.at_least(level)).level


Stage = Callable[[], Iterator[Choice]]


def _cheapest(stages: list[Stage], session: CountingSession) -> dict[str, Levels]:
    """Levels of the cheapest path: best[level] is the cheapest way to have the state at that level after some stages."""
    session.backend.reset()
    session.backend.refresh(session.backend, session.backend.fresh(0), 0)
    refresh, top = session.backend.total_seconds, session.top
    best: dict[int, tuple[float, dict[str, Levels]]] = {top: (0.0, {})}
    for stage in stages:
        following: dict[int, tuple[float, dict[str, Levels]]] = {}
        for choice in stage():
            for level, (spent, levels) in best.items():
                fresh = level < choice.need
                output = min(choice.output, top if fresh else level)
                total = spent + choice.seconds + refresh * fresh
                if output not in following or total < following[output][0]:
                    following[output] = (total, levels | choice.levels)
        best = following
    return min(best.values(), key=lambda found: found[0])[1]


def _stages(model: nn.Module, session: CountingSession) -> list[Stage]:
    search = _Search(model, session)
    stages: list[Stage] = []
    for layer in model.base_model.encoder.layer:
        stages += [
            lambda layer=layer: search.attention(layer.attention),
            lambda layer=layer: search.norm(layer.attention.output.LayerNorm),
            lambda layer=layer: search.feed_forward(layer),
            lambda layer=layer: search.norm(layer.output.LayerNorm),
        ]
    return [*stages, search.head]


class _Search:
    """The choices of each kind of stage, measured on the counting backend."""

    def __init__(self, model: nn.Module, session: CountingSession) -> None:
        self.model = model
        self.session = session
        self.top = session.top
        self._names = {id(module): name for name, module in model.named_modules()}

    def _measure(self, need: int, levels: dict[nn.Module, Levels], stage: Callable[[EncryptedTensor], EncryptedTensor], output: int | None = None) -> Choice:
        named = {self._names[id(module)]: at for module, at in levels.items()}
        self.session.place(self.model, named)
        self.session.backend.reset()
        level = _run(lambda: stage(self.session.state(need)), output)
        return Choice(need, level, self.session.backend.total_seconds, named)

    def attention(self, block: nn.Module) -> Iterator[Choice]:
        """Scores high enough for the kernel, or refreshed; the values as low as the wanted output allows, or the output map after a refresh."""
        squarings = block.self.kernel_approximation.squarings

        def stage(state: EncryptedTensor) -> EncryptedTensor:
            return block.output.dense(block.self(state, self.session.mask())[0])

        for value in range(1, self.top):
            for query in sorted({SCORE_DEPTH, squarings + value + 1 + SCORE_DEPTH}):
                need = max(query, value + 1) + 1
                if need <= self.top:
                    yield self._measure(need, {block.self: AttentionLevels(query, value)}, stage)

    def norm(self, norm: nn.Module) -> Iterator[Choice]:
        """The statistic high enough for 1 / sqrt, or refreshed."""
        depth = inverse_root_depth(norm.approximation)
        for output in range(inverse_root_level(self.top, norm.approximation)):
            for statistic in (0, depth + output + 1):
                need = max(statistic, output) + STATISTIC_DEPTH
                if need <= self.top:
                    yield self._measure(need, {norm: NormLevels(statistic, output)}, norm, output)

    def feed_forward(self, layer: nn.Module) -> Iterator[Choice]:
        """Both maps and the activation without a refresh, or with one of the wide state when the levels do not suffice for that."""
        act = layer.intermediate.intermediate_act_fn
        depth = polynomial.depth(act.approximation.coefficients)
        for output in range(self.top - depth):
            yield self._measure(depth + output + 1, {act: ActivationLevels(output)}, lambda state: layer.output.dense(layer.intermediate(state)))

    def head(self) -> Iterator[Choice]:
        for need in range(1, self.top + 1):
            yield self._measure(need, {}, self._classify)

    def _classify(self, state: EncryptedTensor) -> EncryptedTensor:
        pooler = self.model.base_model.pooler
        return self.model.classifier(state[:, 0] if pooler is None else pooler(state))
