"""Full fine-tuning with softmax attention on EncryptedTensors: the baseline that LoRA with the Gaussian kernel is compared with.

Every linear layer of the encoder (and the pooler) has an encrypted weight matrix (hf_he.ops.matrix), attention is hf_he.ops.softmax; norms,
activations, classifier and loss are those of LoRA fine-tuning. Maps of one state share what they do to it, in the forward and for their
gradients. Biases and the weights of norms stay as they are, which favours the baseline a little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_he import autograd
from hf_he.approximation import fit_reciprocal, kernel_exponential
from hf_he.backends.base import Ciphertext
from hf_he.models.kernel_attention import KernelAttention
from hf_he.ops import matrix, softmax
from hf_he.ops.operand import Operand
from hf_he.ops.weights import GRADIENT_LEVEL
from hf_he.tensor import SPLIT, WEIGHT, EncryptedSession, EncryptedTensor, state_tensor

MATRIX_LEVEL = 2
"""Matrices are multiplied no higher unless their consumer asks: measured to be the cheapest for the whole step, at both shapes."""

SCORE_RANGE = 6.0
"""Row means of exp(score - maximum) lie in [exp(-6), 1]: what the reciprocal of the row sums is fitted on."""
RECIPROCAL_DEGREE = 15
RECIPROCAL_ERROR = 1e-3


def softmax_form(tokens: int, squarings: int) -> softmax.Softmax:
    """Softmax of scores within SCORE_RANGE of 0: as many squarings as the kernel has, the cheapest reciprocal within RECIPROCAL_ERROR."""
    interval = (tokens * math.exp(-SCORE_RANGE), float(tokens))
    candidates = (fit_reciprocal(interval, RECIPROCAL_DEGREE, steps) for steps in range(1, 16))
    reciprocal = next(found for found in candidates if found.max_error <= RECIPROCAL_ERROR)
    return softmax.Softmax(SCORE_RANGE, kernel_exponential((-2 * SCORE_RANGE, 0.0), squarings), reciprocal)


class MatrixInput:
    """A state that encrypted matrices multiply: all of its maps are computed together, and so are their gradients."""

    def __init__(self, source: Operand) -> None:
        self.source = source
        self.maps: list[WaitingMatrix] = []
        self.gradients: list[WaitingMatrixGradient] = []

    @classmethod
    def of(cls, source: Operand) -> MatrixInput:
        if not hasattr(source, "matrix_input"):
            source.matrix_input = cls(source)
        return source.matrix_input

    def compute(self, level: int) -> None:
        """All maps that wait, at `level`."""
        waiting = [member for member in self.maps if member.waiting]
        context = self.source.context
        self.source.ensure(level + matrix.DEPTH)
        stacked = _joined(context, [_at(member.weight, level + 1) for member in waiting], self._inputs)
        out = matrix.encrypted(context, self.source.at(level + matrix.DEPTH), stacked, level)
        for member, part in zip(waiting, _cut(context, out, waiting), strict=True):
            member.finish(part)

    def compute_gradients(self) -> None:
        """Of all matrices, one level above what packs or updates them."""
        waiting, context = [member for member in self.gradients if member.waiting], self.source.context
        level = 1
        high = level + (context.packing.sequences > 1)
        self.source.ensure(high + matrix.DEPTH)
        parts = []
        for member in waiting:
            member.upstream.ensure(high + 1)
            parts.append(member.upstream.at(high + 1))
        backend = context.backend
        flat = backend.stack([backend.take(part, i) for part in parts for i in range(part.count)])
        found = matrix.weight_gradient(context, self.source.at(high + matrix.DEPTH), flat, level)
        found = backend.reshape(found, (self._inputs, found.count // self._inputs))
        start = 0
        for member, part in zip(waiting, parts, strict=True):
            own = [backend.take(backend.take(found, i), slice(start, start + part.count)) for i in range(self._inputs)]
            member.finish(backend.reshape(backend.stack(own), (self._inputs * part.count,)))
            start += part.count

    @property
    def _inputs(self) -> int:
        packing = self.source.context.packing
        return matrix.parts(packing) * packing.blocks(self.source.features)


class WaitingMatrix(Operand):
    """weight [out, in] times a state, computed with the state's other maps, no higher than the first consumer asks."""

    def __init__(self, shared: MatrixInput, weight: Operand, features: int) -> None:
        super().__init__(weight.context, features, pooled=shared.source.pooled)
        self.weight = weight
        self._shared = shared
        shared.maps.append(self)

    @property
    def level(self) -> int:
        return min(MATRIX_LEVEL, _left(self.context, self._shared.source.level, matrix.DEPTH)) if self.waiting else super().level

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level) if self.waiting else super().ciphertext

    def finish(self, ct: Ciphertext) -> None:
        self._ciphertext = ct

    def ensure(self, depth: int) -> Ciphertext:
        if self.waiting and self.level < depth <= self.context.top - matrix.DEPTH:
            self._shared.source.ensure(depth + matrix.DEPTH)
        self.at_least(depth if depth <= self.level else 0)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self.waiting:
            self._shared.compute(min(level, self.level))
        return super().ciphertext


class WaitingTransposed(Operand):
    """weight^T times the gradient of a map."""

    def __init__(self, upstream: Operand, weight: Operand, features: int) -> None:
        super().__init__(upstream.context, features, pooled=upstream.pooled)
        self._upstream, self._weight = upstream, weight

    @property
    def level(self) -> int:
        return min(MATRIX_LEVEL, _left(self.context, self._upstream.level, matrix.DEPTH)) if self.waiting else super().level

    @property
    def ciphertext(self) -> Ciphertext:
        return self.at_least(self.level) if self.waiting else super().ciphertext

    def ensure(self, depth: int) -> Ciphertext:
        if self.waiting and self.level < depth <= self.context.top - matrix.DEPTH:
            self._upstream.ensure(depth + matrix.DEPTH)
        self.at_least(depth if depth <= self.level else 0)
        return super().ensure(depth)

    def at_least(self, level: int) -> Ciphertext:
        if self.waiting:
            context, level = self.context, min(level, self.level)
            self._upstream.ensure(level + matrix.DEPTH)
            turned = matrix.transposed(context, _at(self._weight, level + 2), context.packing.blocks(self.features), level + 1)
            self._ciphertext = matrix.encrypted(context, self._upstream.at(level + matrix.DEPTH), turned, level, sign=-1)
        return super().ciphertext


class WaitingMatrixGradient(Operand):
    """Gradient of a matrix, computed with those of the state's other maps."""

    def __init__(self, shared: MatrixInput, upstream: Operand) -> None:
        super().__init__(upstream.context, shared.source.features)
        self.upstream = upstream
        self._shared = shared
        shared.gradients.append(self)

    @property
    def level(self) -> int:
        return 1 if self.waiting else super().level

    @property
    def ciphertext(self) -> Ciphertext:
        if self.waiting:
            self._shared.compute_gradients()
        return super().ciphertext

    def finish(self, ct: Ciphertext) -> None:
        self._ciphertext = ct


class MatrixProduct(torch.autograd.Function):
    """x times an encrypted matrix."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, weight: EncryptedTensor) -> EncryptedTensor:
        ctx.save_for_backward(x, weight)
        return state_tensor(WaitingMatrix(MatrixInput.of(x.operand), weight.operand, weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[EncryptedTensor | None, EncryptedTensor]:
        x, weight = ctx.saved_tensors
        dw = EncryptedTensor(WaitingMatrixGradient(MatrixInput.of(x.operand), gradient.operand), tuple(weight.shape), WEIGHT)
        dx = state_tensor(WaitingTransposed(gradient.operand, weight.operand, weight.shape[1])) if ctx.needs_input_grad[0] else None
        return dx, dw


class SoftmaxAttention(torch.autograd.Function):
    """Softmax attention of queries, keys and values [B, heads, T, head_dim]."""

    @staticmethod
    def forward(ctx: Any, query: EncryptedTensor, key: EncryptedTensor, value: EncryptedTensor, mask: EncryptedTensor, scaling: float, form: Any) -> Any:
        context, (batch, heads, tokens, head_dim) = query.session, query.shape
        operands = (query.operand, key.operand, value.operand)
        ctx.output = min(GRADIENT_LEVEL + matrix.DEPTH, context.top - 4)
        levels = replace(softmax.DEFAULT_LEVELS, query=ctx.output + 1 if any(ctx.needs_input_grad) else 3)
        out, saved = softmax.forward(context, *operands, mask.ciphertext, heads, scaling, form, levels)
        ctx.save_for_backward(autograd.kept(context, saved))
        return EncryptedTensor(Operand(context, heads * head_dim, out), (batch, tokens, heads, head_dim), SPLIT)

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[EncryptedTensor | None, ...]:
        (saved,) = ctx.saved_tensors
        batch, tokens, heads, head_dim = gradient.shape
        found = softmax.backward(gradient.session, saved.operand.value, gradient.operand, ctx.needs_input_grad[:3], ctx.output)
        shape = (batch, heads, tokens, head_dim)
        return (*(None if operand is None else EncryptedTensor(operand, shape, "attention heads") for operand in found), None, None, None)


class EncryptedMatrix(nn.Module):
    """In the place of a linear layer: its weight is the leaf `weight`, the bias is left out."""

    def __init__(self, weight: EncryptedTensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: EncryptedTensor) -> EncryptedTensor:
        return autograd.call(MatrixProduct, hidden_states, self.weight)


def encrypt_encoder(session: EncryptedSession, model: nn.Module, encrypt: Any) -> dict[str, EncryptedTensor]:
    """Give every linear layer of the encoder and the pooler an encrypted matrix, `encrypt(name, linear)` [ciphertexts], and its attention the
    softmax. Returns the matrices by name."""
    matrices = {}
    base = model.base_model
    for root in (base.encoder, base.pooler):
        for name, module in [] if root is None else list(root.named_modules()):
            if isinstance(module, nn.Linear):
                weight = Operand(session, module.in_features, encrypt(name, module))
                matrices[name] = EncryptedTensor(weight, tuple(module.weight.shape), WEIGHT, requires_grad=True)
                parent, _, own = name.rpartition(".")
                setattr(root.get_submodule(parent), own, EncryptedMatrix(matrices[name]))
    use_softmax(session, model)
    return matrices


def use_softmax(session: EncryptedSession, model: nn.Module) -> None:
    """Softmax in the place of every attention kernel of `model`."""
    for module in model.modules():
        if isinstance(module, KernelAttention):
            form = softmax_form(session.packing.tokens, module.kernel_approximation.squarings)

            def attend(query: Any, key: Any, value: Any, mask: Any, dropout: float, module: Any = module, form: Any = form, **kwargs: Any) -> Any:
                return autograd.call(SoftmaxAttention, query, key, value, mask, module.scaling, form), None

            module.attend = attend


def _left(context: Any, level: int, depth: int) -> int:
    return (level if level >= depth else context.top) - depth


def _at(weight: Operand, level: int) -> Ciphertext:
    weight.ensure(level)
    return weight.at(level)


def _joined(context: Any, matrices: Sequence[Ciphertext], inputs: int) -> Ciphertext:
    """Matrices of one state side by side: [inputs * outputs of all]."""
    backend = context.backend
    if len(matrices) == 1:
        return matrices[0]
    shaped = [backend.reshape(ct, (inputs, ct.count // inputs)) for ct in matrices]
    return backend.stack([backend.take(backend.take(ct, i), o) for i in range(inputs) for ct in shaped for o in range(ct.batch_shape[1])])


def _cut(context: Any, out: Ciphertext, maps: Sequence[WaitingMatrix]) -> list[Ciphertext]:
    parts, start = [], 0
    for member in maps:
        end = start + context.packing.blocks(member.features)
        parts.append(context.backend.take(out, slice(start, end)))
        start = end
    return parts
