"""The trained parameters as ciphertexts: densely packed for the optimiser, one periodic ciphertext per vector for the model.

Dense: lane j of the packing's T * B lanes holds the c values of trained vector j, so that 64 vectors of 128 values share one ciphertext at
N = 2^14. Refreshes, optimiser steps, checkpoints and messages work on these few ciphertexts. Periodic: every lane holds the same vector, as
products with states need it (hf_he.ops.weights).

    dense -> periodic   two rounds of lane masks and rotations, sqrt(lanes) - 1 rotations per ciphertext each: 2 levels
    periodic -> dense   multiply by the lane's mask, which carries public constants too, and add: 1 level, no rotation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from hf_he.backends.base import Ciphertext, Plaintext
from hf_he.errors import ShapeError
from hf_he.ops import reduce, weights
from hf_he.ops.context import OperationContext
from hf_he.packing import Packing
from hf_he.tensor import EncryptedSession, EncryptedTensor

SPREAD_DEPTH = 2
"""Levels from dense to periodic."""


@dataclass(frozen=True)
class AdapterLayout:
    """Which parameters are trained, in order, and which lanes hold their vectors (rows or columns, see `hf_he.ops.weights`)."""

    packing: Packing
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, packing: Packing) -> AdapterLayout:
        """The parameters of `model` that require a gradient, by name. Raises ShapeError when there are none."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not shapes:
            raise ShapeError("no parameter of this model is trained: make it with peft.get_peft_model and an HELoraConfig")
        return cls(packing, shapes)

    def __post_init__(self) -> None:
        for name, shape in self.shapes.items():
            if not 1 <= len(shape) <= 2 or min(shape) < 1:
                raise ShapeError(f"{name} has shape {tuple(shape)}: only matrices and vectors can be trained under encryption")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def lanes(self) -> int:
        return self.packing.tokens * self.packing.sequences

    def vectors(self, name: str) -> int:
        """Periodic ciphertexts of one parameter."""
        shape = self.shapes[name]
        return weights.vectors(shape, self.packing) if len(shape) == 2 else self.packing.blocks(shape[0])

    @cached_property
    def starts(self) -> dict[str, int]:
        """The number of each parameter's first vector."""
        starts, total = {}, 0
        for name in self.shapes:
            starts[name] = total
            total += self.vectors(name)
        return starts

    @property
    def total(self) -> int:
        """Trained vectors."""
        return sum(self.vectors(name) for name in self.shapes)

    @property
    def count(self) -> int:
        """Dense ciphertexts."""
        return -(-self.total // self.lanes)

    def pack(self, state: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Values by parameter name -> [count, slots]; unused lanes and features are zero. Raises ShapeError for other names or shapes."""
        if state.keys() != self.shapes.keys():
            raise ShapeError(f"the adapter's parameters are {', '.join(self.shapes)}, got {', '.join(state)}")
        dense = np.zeros((self.count * self.lanes, self.packing.features))
        for name, start in self.starts.items():
            values = state[name].detach().to(torch.float64).cpu().numpy()
            if values.shape != self.shapes[name]:
                raise ShapeError(f"{name} has shape {values.shape}, this adapter's is {self.shapes[name]}: use the adapter's own settings")
            dense[start : start + self.vectors(name)] = weights.reference(values, self.packing)
        return dense.reshape(self.count, self.packing.slots)

    def unpack(self, slots: np.ndarray) -> dict[str, torch.Tensor]:
        """The inverse: [count, slots] -> float64 tensors by name."""
        rows = np.asarray(slots).reshape(-1, self.packing.features)
        state = {}
        for name, shape in self.shapes.items():
            values = rows[self.starts[name] : self.starts[name] + self.vectors(name)]
            values = values.reshape(weights.count(shape) if len(shape) == 2 else 1, -1)[:, : max(shape)]
            values = values[0] if len(shape) == 1 else values if weights.orientation(shape) == "rows" else values.T
            state[name] = torch.from_numpy(np.ascontiguousarray(values))
        return state

    def values(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The trained parameters of a plain model, for `pack`."""
        return {name: model.get_parameter(name).detach() for name in self.shapes}

    def load(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Write values by name into a plain model's parameters."""
        with torch.no_grad():
            for name, values in state.items():
                model.get_parameter(name).copy_(values)


class EncryptedAdapter:
    """The trained parameters of `model` as encrypted leaves: `dense` [count] is what the optimiser knows, `install` gives the model its vectors."""

    def __init__(self, session: EncryptedSession, model: nn.Module, layout: AdapterLayout, dense: Ciphertext) -> None:
        self.session = session
        self.model = model
        self.layout = layout
        self._leaves: dict[str, EncryptedTensor] = {}
        self.replace(dense)

    @property
    def dense(self) -> Ciphertext:
        return self._dense

    def replace(self, dense: Ciphertext) -> None:
        """Other weights from now on; `install` brings them into the model. Raises ShapeError for another number of ciphertexts."""
        if dense.batch_shape != (self.layout.count,):
            raise ShapeError(f"this adapter is {self.layout.count} dense ciphertexts, got a batch of {dense.batch_shape}")
        self._dense = dense

    def install(self) -> None:
        """Put the weights into the model as leaves of autograd, replacing its parameters and earlier leaves with their gradients.

        The dense ciphertexts are refreshed first unless they are at the top: that is cheap, and every level of the weights is used. A bootstrap takes
        two iterations: the errors of all steps add up in the weights.
        """
        self._dense = self.session.ensure_level(self._dense, self.session.top, iterations=2)
        for name in self.layout.names:  # before there are new ones: with one feature per ciphertext they take gigabytes
            module, attribute = self._place(name)
            module._parameters.pop(attribute, None)
            vars(module).pop(attribute, None)
        self._leaves.clear()
        backend = self.session.backend
        with backend.log.measure("optimizer"):
            spread_out = spread(self.session, self._dense, self.layout)
            for name, shape in self.layout.shapes.items():
                vectors = backend.stack([next(spread_out) for _ in range(self.layout.vectors(name))])
                leaf = self.session.weight(vectors, shape) if len(shape) == 2 else self.session.bias(vectors, shape[0])
                setattr(*self._place(name), leaf)
                self._leaves[name] = leaf

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module of a parameter, and the parameter's name there."""
        path, _, attribute = name.rpartition(".")
        return self.model.get_submodule(path), attribute

    def collect(self, factor: float = 1.0, scales: Sequence[float] = ()) -> Ciphertext:
        """`factor` times the gradients that backward passes left in the leaves, dense [count], one level below them; clears them.

        `factor` is public: the optimiser's gradient_gain over the number of sequences; `scales`, one per parameter or none, multiply it. Raises
        ShapeError when a leaf has no gradient, or for another number of scales.
        """
        factors = scaled(self.layout.names, factor, scales)
        parts: list[Ciphertext | None] = [None] * self.layout.count
        for name, leaf in self._leaves.items():
            if leaf.grad is None:
                raise ShapeError(f"{name} has no gradient: run loss.backward() with this adapter installed")
            for index, part in _placed(self.session, leaf.grad.ciphertext, self.layout, self.layout.starts[name], factors[name]):
                parts[index] = part if parts[index] is None else _sum(self.session, parts[index], part)
            leaf.grad = None
        level = min(part.level for part in parts)
        return self.session.backend.stack([self.session.backend.match_level(part, level) for part in parts])


def scaled(names: Sequence[str], factor: float, scales: Sequence[float]) -> dict[str, float]:
    """`factor` by parameter name, times `scales`, one per parameter in order, or none. Raises ShapeError for another number of them."""
    if scales and len(scales) != len(names):
        raise ShapeError(f"{len(scales)} gradient scales for {len(names)} trained parameters: calibrate them with this adapter")
    return dict(zip(names, (factor * scale for scale in scales or [1.0] * len(names)), strict=True))


def _placed(context: OperationContext, vectors: Ciphertext, layout: AdapterLayout, start: int, factor: float) -> list[tuple[int, Ciphertext]]:
    """(dense ciphertext, its part) of periodic vectors [n] numbered from `start`, at the lowest level."""
    backend, lanes, parts, done = context.backend, layout.lanes, [], 0
    vectors = backend.drop_level(vectors, 1)
    scale = context.canonical_factor(1, vectors.scale)
    while done < vectors.count:
        index, lane = divmod(start + done, lanes)
        n = min(vectors.count - done, lanes - lane)

        def masks(lane: int = lane, n: int = n) -> np.ndarray:
            return factor * np.repeat(np.eye(n, lanes, lane), layout.packing.features, axis=1)[None]

        with context.backend.log.measure("optimizer"):
            plain = backend.encode(masks(), 1, scale)
            part = backend.rescale(backend.multiply_plain_sum(plain, backend.take(vectors, slice(done, done + n))))
        parts.append((index, backend.take(part, 0)))
        done += n
    return parts


def _sum(context: OperationContext, a: Ciphertext, b: Ciphertext) -> Ciphertext:
    level = min(a.level, b.level)
    return context.backend.add(context.backend.match_level(a, level), context.backend.match_level(b, level))


def spread(context: OperationContext, dense: Ciphertext, layout: AdapterLayout) -> Iterator[Ciphertext]:
    """[count] dense -> `total` periodic, two levels below, as they are asked for.

    First every group of `inner` lanes is copied over all groups, then every lane over its group: with outer = lanes / inner,
    count (outer - 1) + groups (inner - 1) rotations by powers of two, which the lane sums of gradients need as well.
    """
    backend, c = context.backend, layout.packing.features
    inner = 1 << (layout.lanes.bit_length() - 1) // 2
    lanes = np.repeat(np.eye(inner), c, axis=1)
    selected = _groups(context, dense, layout, inner)
    for group in range(selected.count):  # one after another: of a group's copies there are `inner`
        copies = _shifts(context, backend.take(selected, slice(group, group + 1)), c, inner)
        masks = _masks(context, copies, "lanes", lambda: np.stack([np.roll(lanes, shift, axis=0) for shift in range(inner)], axis=1))
        spread_out = backend.rescale(backend.multiply_plain_sum(masks, copies))
        yield from (backend.take(backend.take(spread_out, j), 0) for j in range(min(inner, layout.total - group * inner)))


def _groups(context: OperationContext, dense: Ciphertext, layout: AdapterLayout, inner: int) -> Ciphertext:
    """[count] dense -> [groups], every used group of `inner` lanes copied over all groups, one level below."""
    backend, outer = context.backend, layout.lanes // inner
    copies = _shifts(context, dense, inner * layout.packing.features, outer)
    masks = _masks(context, copies, "groups", lambda: np.repeat(np.eye(outer), inner * layout.packing.features, axis=1)[None])
    # copy s holds group g where the mask of group g - s is: the copies in falling order, twice, so that each g is a slice
    falling = backend.stack([backend.take(copies, -k % outer) for k in range(2 * outer)])
    used = [divmod(group, outer) for group in range(-(-layout.total // inner))]
    groups = {g: backend.take(backend.multiply_plain_sum(masks, backend.take(falling, slice(outer - g, 2 * outer - g))), 0) for _, g in used}
    return backend.rescale(backend.stack([backend.take(groups[g], index) for index, g in used]))


def _shifts(context: OperationContext, ct: Ciphertext, step: int, count: int) -> Ciphertext:
    """[batch] -> [count, batch], entry s rotated by s * step, by rotations of powers of two."""
    backend = context.backend
    out = backend.reshape(ct, (1, ct.count))
    while out.batch_shape[0] < count:
        rotated = backend.take(backend.rotate(out, [step * out.batch_shape[0]]), 0)
        out = backend.reshape(backend.stack([out, rotated]), (2 * out.batch_shape[0], ct.count))
    return out


def _masks(context: OperationContext, ct: Ciphertext, tag: str, build: Callable[[], np.ndarray]) -> Plaintext:
    return context.constant(("spread", tag), ct.level, context.canonical_factor(ct.level, ct.scale), build)


def rotations(packing: Packing) -> set[int]:
    """Rotation steps of `spread`: whole lanes by powers of two."""
    return set(reduce.power_steps(packing.features, packing.slots))
