"""The search for levels: what every choice of a stage needs, leaves and costs on a backend that only counts, and the cheapest path through the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from hf_he.backends.base import Plaintext
from hf_he.backends.counting import CountingBackend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.nn import HERMSNorm
from hf_he.ops import polynomial
from hf_he.ops.attention import SCORE_DEPTH
from hf_he.ops.norm import inverse_root_depth, inverse_root_level, statistic_depth
from hf_he.ops.placement import ActivationLevels, AttentionLevels, Levels, NormLevels
from hf_he.packing import Packing
from hf_he.tensor import EncryptedSession, EncryptedTensor


@dataclass(frozen=True)
class Choice:
    """One way to run a stage: the level of the state it needs, the level it leaves at most, and its seconds."""

    need: int
    output: int
    seconds: float
    levels: dict[str, Levels]


class CountingSession(EncryptedSession):
    """A session on a CountingBackend: plaintexts have shapes only. `features`: of a hidden state (default: one ciphertext)."""

    def __init__(self, parameters: CKKSParameters, packing: Packing, features: int | None = None) -> None:
        backend = CountingBackend(parameters)
        super().__init__(backend, packing, backend)
        self._features = packing.features if features is None else features
        self._shapes: dict[Any, tuple[int, ...]] = {}

    def encoded(self, owners: tuple[Any, ...], tag: Any, level: int, scale: float, build: Callable[[], np.ndarray]) -> Plaintext:
        key = (tuple(map(id, owners)), tag)
        if key not in self._shapes:
            self._shapes[key] = build().shape
        shape = self._shapes[key]
        return Plaintext(None, shape[:-1], level, scale, shape[-1])

    def state(self, level: int) -> EncryptedTensor:
        blocks = self.packing.blocks(self._features)
        return self.hidden_state(replace(self.backend.fresh(level), batch_shape=(blocks,)), self._features)

    def mask(self) -> EncryptedTensor:
        return self.attention_mask(self.backend.fresh(self.top))


def run(function: Callable[[], EncryptedTensor], level: int | None = None) -> int:
    """Compute what `function` returns, at `level` if it is still waiting; its level."""
    operand = function().operand
    return (operand.ciphertext if level is None else operand.at_least(level)).level


Stage = Callable[[], Iterable[Choice]]


def refresh_seconds(session: CountingSession) -> float:
    """Of one hidden state."""
    session.backend.reset()
    session.backend.refresh(session.backend, session.state(0).ciphertext, 0)
    return session.backend.total_seconds


def cheapest(stages: list[Stage], session: CountingSession) -> dict[str, Levels]:
    """Levels of the cheapest path: best[level] is the cheapest way to have the state at that level after some stages."""
    refresh, top = refresh_seconds(session), session.top
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


def encoder_stages(model: nn.Module, session: CountingSession) -> list[Stage]:
    search = Search(model, session)
    stages: list[Stage] = []
    for layer in model.base_model.encoder.layer:
        stages += [
            lambda layer=layer: search.attention(layer.attention),
            lambda layer=layer: search.norm(layer.attention.output.LayerNorm),
            lambda layer=layer: search.feed_forward(layer),
            lambda layer=layer: search.norm(layer.output.LayerNorm),
        ]
    return [*stages, search.head]


class Search:
    """The choices of each kind of stage, measured on the counting backend."""

    def __init__(self, model: nn.Module, session: CountingSession) -> None:
        self.model = model
        self.session = session
        self.top = session.top
        self.names = {id(module): name for name, module in model.named_modules()}

    def measure(self, need: int, levels: dict[nn.Module, Levels], stage: Callable[[EncryptedTensor], EncryptedTensor], output: int | None = None) -> Choice:
        named = {self.names[id(module)]: at for module, at in levels.items()}
        self.session.place(self.model, named)
        self.session.backend.reset()
        level = run(lambda: stage(self.session.state(need)), output)
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
                    yield self.measure(need, {block.self: AttentionLevels(query, value)}, stage)

    def norm(self, norm: nn.Module) -> Iterator[Choice]:
        """The statistic high enough for 1 / sqrt, or refreshed."""
        depth = inverse_root_depth(norm.approximation)
        for output in range(inverse_root_level(self.top, norm.approximation)):
            for statistic in (0, depth + output + 1):
                need = max(statistic, output) + statistic_depth(not isinstance(norm, HERMSNorm))
                if need <= self.top:
                    yield self.measure(need, {norm: NormLevels(statistic, output)}, norm, output)

    def feed_forward(self, layer: nn.Module) -> Iterator[Choice]:
        """Both maps and the activation without a refresh, or with one of the wide state when the levels do not suffice for that."""
        act = layer.intermediate.intermediate_act_fn
        depth = polynomial.depth(act.approximation.coefficients)
        for output in range(self.top - depth):
            yield self.measure(depth + output + 1, {act: ActivationLevels(output)}, lambda state: layer.output.dense(layer.intermediate(state)))

    def head(self) -> Iterator[Choice]:
        for need in range(1, self.top + 1):
            yield self.measure(need, {}, self._classify)

    def _classify(self, state: EncryptedTensor) -> EncryptedTensor:
        pooler = self.model.base_model.pooler
        return self.model.classifier(state[:, 0] if pooler is None else pooler(state))
