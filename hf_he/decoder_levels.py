"""The stages of a decoder for the level search: its two residual branches per layer, and the final norm with the language-model head.

A branch is a norm and what follows it. Both are measured apart: the norm at every level of its result, the rest on a fresh state, with a refresh
between them where the norm leaves too few levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product

import torch
from torch import nn

from hf_he.approximation import KernelExponential, Reciprocal
from hf_he.errors import LevelError, ScaleMismatchError
from hf_he.level_search import Choice, Search, Stage, refresh_seconds
from hf_he.ops import goldschmidt, polynomial
from hf_he.ops.attention import SCORE_DEPTH
from hf_he.ops.placement import ActivationLevels, AttentionLevels, Levels
from hf_he.tensor import EncryptedTensor


class DecoderSearch(Search):
    """Choices of HEGPTNeoX and HELlama layers without a padding mask."""

    def stages(self) -> list[Stage]:
        base, stages = self.model.base_model, []
        for layer in base.layers:
            attention, feed_forward = partial(self._attention_branch, layer), partial(self._feed_forward_branch, layer)
            if getattr(layer, "use_parallel_residual", False):
                stages.append(lambda a=attention, f=feed_forward: _side_by_side(a(), f()))
            else:
                stages += [attention, feed_forward]
        final = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
        return [*stages, lambda: self._branch(final, [self.measure(1, {}, self.model.lm_head)])]

    def _attention_branch(self, layer: nn.Module) -> list[Choice]:
        return self._branch(layer.input_layernorm, self._attention(layer.attention if hasattr(layer, "attention") else layer.self_attn))

    def _feed_forward_branch(self, layer: nn.Module) -> list[Choice]:
        return self._branch(layer.post_attention_layernorm, self._feed_forward(layer.mlp))

    def _branch(self, norm: nn.Module, rest: Iterable[Choice]) -> list[Choice]:
        """Each choice of `rest` after the norm at exactly the level it needs, or after a refreshed one at level 0."""
        refresh = refresh_seconds(self.session)
        norms = list(self.norm(norm))
        found = []
        for choice in rest:
            for before in norms:
                if before.output in (0, choice.need):
                    seconds = before.seconds + choice.seconds + refresh * (before.output < choice.need)
                    found.append(Choice(before.need, choice.output, seconds, before.levels | choice.levels))
        return _undominated(found)

    def _attention(self, module: nn.Module) -> list[Choice]:
        """Scores high enough for the kernel or powers, and for the reciprocal after them, or refreshed; values as low as the output allows."""
        kernel = module.kernel_approximation
        reciprocal = module.normalizer.approximation if hasattr(module, "normalizer") else kernel
        with_reciprocal = isinstance(reciprocal, Reciprocal)
        scores = SCORE_DEPTH + 1
        depth = kernel.squarings if isinstance(kernel, KernelExponential) else (module.config.power_softmax_degree - 1).bit_length()
        extra = goldschmidt.depth(reciprocal) if with_reciprocal else 0
        found = []
        for value in range(1 + with_reciprocal, self.top - 1):
            queries = {SCORE_DEPTH, scores, scores + depth + value + 1, scores + depth + 1 + extra + value - 1}
            for query in sorted(queries):
                need = max(query + 1, value + 1) + 1
                if need <= self.top:
                    found += self._tried(need, {module: AttentionLevels(query, value)}, lambda state: self._attend(module, state))
        return _undominated(found)

    def _attend(self, module: nn.Module, state: EncryptedTensor) -> EncryptedTensor:
        positions = torch.arange(self.session.packing.tokens).unsqueeze(0)
        return module(state, position_embeddings=self.model.base_model.rotary_emb(state, positions))[0]

    def _feed_forward(self, mlp: nn.Module) -> list[Choice]:
        """The activation as low as the output allows; a gate takes one level more."""
        act = mlp.act if hasattr(mlp, "act") else mlp.act_fn
        depth = polynomial.depth(act.approximation.coefficients)
        return _undominated(choice for output in range(self.top - depth) for choice in self._tried(depth + output + 1, {act: ActivationLevels(output)}, mlp))

    def _tried(self, need: int, levels: dict[nn.Module, Levels], stage: Callable[[EncryptedTensor], EncryptedTensor]) -> list[Choice]:
        """[`measure`], or nothing where these levels do not work."""
        try:
            return [self.measure(need, levels, stage)]
        except (LevelError, ScaleMismatchError):
            return []


def _side_by_side(attention: list[Choice], feed_forward: list[Choice]) -> Iterator[Choice]:
    """Both branches on one state, which is computed for the attention: no higher than that needs."""
    for a, f in product(attention, feed_forward):
        if f.need <= a.need:
            yield Choice(a.need, min(a.output, f.output), a.seconds + f.seconds, a.levels | f.levels)


def _undominated(choices: Iterable[Choice]) -> list[Choice]:
    """Without those that need more, leave less and cost more than another."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.seconds, c.need, -c.output)):
        if not any(other.need <= choice.need and other.output >= choice.output for other in kept):
            kept.append(choice)
    return kept
