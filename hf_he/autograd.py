"""Differentiable operations on EncryptedTensors: one torch.autograd.Function each, whose backward works on encrypted gradients.

Only encrypted weights are leaves, so torch's engine stops at the lowest adapter: below it nothing requires a gradient, and what an operation
below it computes is what inference computes. Linear maps and sums of gradients wait for their consumers as those of the forward do. What a
backward needs of its forward is saved with `ctx.save_for_backward`, so that gradient checkpointing (`GradientCheckpointingLayer`) works too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_he.approximation import InverseSquareRoot, Polynomial
from hf_he.backends.base import Ciphertext
from hf_he.errors import UnsupportedEncryptedOperation
from hf_he.ops import activation, arithmetic, norm, norm_gradient, reduce, weights
from hf_he.ops.attention_gradient import GaussianKernel
from hf_he.ops.context import OperationContext
from hf_he.ops.gathered import Gathered
from hf_he.ops.linear import WaitingLinear
from hf_he.ops.operand import Operand, together
from hf_he.ops.placement import ActivationLevels, NormLevels
from hf_he.ops.power_softmax_gradient import PowerKernel
from hf_he.ops.rotary import Rotation, WaitingRotary
from hf_he.tensor import BIAS, HEADS, KEPT, LOSS, SPLIT, WEIGHT, EncryptedTensor, Labels, state_tensor

Gradient = EncryptedTensor | None
Kernel = GaussianKernel | PowerKernel


class Kept(Operand):
    """Anything that a backward needs and that is not an operand of its forward; it has no ciphertext of its own."""

    def __init__(self, context: OperationContext, value: Any) -> None:
        super().__init__(context, 0)
        self.value = value

    @property
    def ciphertext(self) -> Ciphertext:
        raise UnsupportedEncryptedOperation("the server computes no loss, only its gradient: compute the loss on the client, from the decrypted logits")


class _Untracked:
    """Stands for the context of a Function whose result nobody will differentiate."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


def call(function: type[torch.autograd.Function], *inputs: Any) -> EncryptedTensor:
    """`function.apply(*inputs)` if an input requires a gradient, otherwise its forward alone: what inference computes."""
    if torch.is_grad_enabled() and any(isinstance(i, EncryptedTensor) and i.requires_grad for i in inputs):
        return function.apply(*inputs)
    return function.forward(_Untracked(len(inputs)), *inputs)


def kept(context: OperationContext, value: Any) -> EncryptedTensor:
    return EncryptedTensor(Kept(context, value), (), KEPT)


def _saved(ctx: Any) -> tuple[EncryptedTensor, ...]:
    """The saved tensors; gradient checkpointing runs the forward for them again, which takes over torch's functions as it did before."""
    with torch._C._EnableTorchFunction():
        return ctx.saved_tensors


def _alias(gradient: EncryptedTensor) -> EncryptedTensor:
    """Another tensor of the same ciphertexts: the engine keeps one per input."""
    return EncryptedTensor(gradient.operand, tuple(gradient.shape), gradient.kind)


def _like(operand: Operand, ct: Any) -> EncryptedTensor:
    return state_tensor(Operand(operand.context, operand.features, ct, operand.pooled))


class Linear(torch.autograd.Function):
    """A plaintext `layer` (weight, bias); dx = weight^T dy."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, layer: tuple[torch.Tensor, torch.Tensor | None]) -> EncryptedTensor:
        ctx.weight = layer[0]
        return state_tensor(WaitingLinear(x.operand, *layer))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None]:
        if isinstance(gradient.operand, Gathered):
            return state_tensor(gradient.operand.transposed(ctx.weight)), None
        weight = gradient.session.derived(ctx.weight, "transposed", lambda w: w.detach().T)
        return state_tensor(WaitingLinear(gradient.operand, weight, None)), None


class EncryptedLinear(torch.autograd.Function):
    """A trained matrix, by rows or by columns (hf_he.ops.weights)."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, weight: EncryptedTensor) -> EncryptedTensor:
        shape, source = tuple(weight.shape), x.operand
        ctx.shape, ctx.pooled = shape, source.pooled
        if weights.orientation(shape) == "rows":
            ctx.save_for_backward(x, weight)
            return state_tensor(weights.WaitingRows(source, weight.operand, shape[0]))
        spread = weights.Spread(source)
        ctx.save_for_backward(kept(source.context, spread), weight)
        return state_tensor(weights.WaitingColumns(spread, weight.operand, shape[0]))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, Gradient]:
        (out_features, in_features), (saved, weight) = ctx.shape, _saved(ctx)
        dx = dw = gathered = None
        level, vectors = weights.GRADIENT_LEVEL, weight.operand
        if weights.orientation(ctx.shape) == "rows":
            numbers, state, n = weights.Spread(gradient.operand), saved.operand, out_features
            if ctx.needs_input_grad[0]:
                dx = weights.WaitingColumns(numbers, vectors, in_features)
        else:
            numbers, state, n = saved.operand.value, gradient.operand, in_features
            if isinstance(state, Gathered):
                gathered, level = state, level + 1
                state = gathered.joined
            if ctx.needs_input_grad[0]:
                dx = weights.WaitingRows(state, vectors if gathered is None else gathered.columns(vectors, n), n)
        if ctx.needs_input_grad[1]:
            if isinstance(dx, weights.WaitingRows):
                state.prepare(weights.GRADIENT_LEVEL + weights.ROWS_DEPTH)
                state.at_least(weights.GRADIENT_LEVEL + weights.ROWS_DEPTH)
            product = weights.vector_gradient(numbers, state, n, in_features, level)
            dw = EncryptedTensor(product if gathered is None else gathered.moved_back(product, n), ctx.shape, WEIGHT)
        return None if dx is None else state_tensor(dx), dw


class AddBias(torch.autograd.Function):
    """A trained bias."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, bias: EncryptedTensor) -> EncryptedTensor:
        return state_tensor(weights.BiasSum(x.operand, bias.operand))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, Gradient]:
        db = EncryptedTensor(weights.bias_gradient(gradient.operand), (gradient.operand.features,), BIAS) if ctx.needs_input_grad[1] else None
        return _alias(gradient) if ctx.needs_input_grad[0] else None, db


class Sum(torch.autograd.Function):
    """a + b."""

    @staticmethod
    def forward(ctx: Any, a: EncryptedTensor, b: EncryptedTensor) -> EncryptedTensor:
        x, y = a.operand, b.operand
        adapted = any(isinstance(operand, weights.WaitingColumns) for operand in (x, y))
        return state_tensor(weights.WaitingAdaptation(x, y) if adapted else arithmetic.WaitingSum(x, y))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, Gradient]:
        return tuple(_alias(gradient) if needed else None for needed in ctx.needs_input_grad)


class Product(torch.autograd.Function):
    """a * b of two states. Gradients are at level 2 where the factor has one more: with a gate, the other factor is an activation's result, whose own
    gradient takes another product."""

    OUTPUT = 2

    @staticmethod
    def forward(ctx: Any, a: EncryptedTensor, b: EncryptedTensor) -> EncryptedTensor:
        ctx.save_for_backward(a, b)
        if any(ctx.needs_input_grad):
            for factor in (a, b):
                factor.operand.at_least(Product.OUTPUT + 1)
        return state_tensor(arithmetic.multiply(a.operand, b.operand))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, Gradient]:
        a, b = _saved(ctx)
        others = (b, a)
        return tuple(
            state_tensor(arithmetic.scaled(gradient.operand, other.operand, min(max(other.level - 1, 1), Product.OUTPUT))) if needed else None
            for needed, other in zip(ctx.needs_input_grad, others, strict=True)
        )


class AddNumber(torch.autograd.Function):
    """x + number."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, number: float) -> EncryptedTensor:
        return _like(x.operand, arithmetic.add_number(x.session, x.operand, number))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None]:
        return _alias(gradient), None


class MultiplyNumber(torch.autograd.Function):
    """x * number."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, number: float) -> EncryptedTensor:
        ctx.number = number
        return _like(x.operand, arithmetic.multiply_number(x.session, x.operand, number))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None]:
        return _like(gradient.operand, arithmetic.multiply_number(gradient.session, gradient.operand, ctx.number)), None


class Activation(torch.autograd.Function):
    """A polynomial of every feature. Kept: its input on [-1, 1], high enough for the derivative; or that is computed again."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, approximation: Polynomial, levels: ActivationLevels) -> EncryptedTensor:
        operand, ctx.approximation = x.operand, approximation
        if not ctx.needs_input_grad[0] or x.session.activations == "recompute":
            ctx.save_for_backward(x)
            out = _like(operand, activation.encrypted(operand.context, operand, approximation, levels))
            if operand.pooled and isinstance(operand, WaitingLinear):
                operand.source.forget_babies()
            return out
        mapped = activation.mapped(operand.context, operand, approximation, max(levels.output, activation.SLOPE_LEVEL))
        ctx.save_for_backward(kept(operand.context, mapped))
        return _like(operand, activation.evaluated(operand.context, mapped, approximation))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None, None]:
        (saved,), context = _saved(ctx), gradient.session
        if saved.kind == KEPT:
            mapped = saved.operand.value
        else:
            mapped = activation.mapped(context, saved.operand, ctx.approximation, activation.SLOPE_LEVEL)
        return state_tensor(activation.gradient(context, mapped, ctx.approximation, gradient.operand)), None, None


class Norm(torch.autograd.Function):
    """LayerNorm or RMSNorm: `layer` = (weight, bias, eps, approximation, levels, centre). Kept: its statistics; or the input, for computing
    them again."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, layer: tuple[torch.Tensor, torch.Tensor | None, float, InverseSquareRoot, NormLevels | None, bool]) -> Any:
        keep = ctx.needs_input_grad[0] and x.session.activations == "keep"
        ctx.layer = layer
        out = norm.WaitingNorm(x.operand, *layer, keep=keep)
        ctx.save_for_backward(kept(x.session, out.statistics) if keep else x)
        return state_tensor(out)

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None]:
        weight, _, eps, approximation, _, centre = ctx.layer
        (saved,) = _saved(ctx)
        if saved.kind == KEPT:
            statistics = saved.operand.value()
        else:
            statistics = norm.statistics_of(gradient.session, saved.operand, eps, approximation, NormLevels(0, 0), centre, high=True)
        return state_tensor(norm_gradient.WaitingNormGradient(gradient.operand, statistics, weight, approximation, centre)), None


class FirstToken(torch.autograd.Function):
    """The first token of a hidden state; its gradient is zero on all others already."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor) -> EncryptedTensor:
        return state_tensor(reduce.WaitingToken(x.operand))

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> Gradient:
        return state_tensor(reduce.Unpooled(gradient.operand))


class Reshape(torch.autograd.Function):
    """The same ciphertexts under another shape."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, shape: tuple[int, ...], kind: str) -> EncryptedTensor:
        ctx.source = (tuple(x.shape), x.kind)
        return EncryptedTensor(x.operand, shape, kind)

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None, None]:
        return EncryptedTensor(gradient.operand, *ctx.source), None, None


class Select(torch.autograd.Function):
    """The features `rows` of heads, as a tensor of `shape` [B, heads, T, head_dim]."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, rows: np.ndarray, shape: tuple[int, ...]) -> EncryptedTensor:
        ctx.rows, ctx.source, ctx.features = rows, (tuple(x.shape), x.kind), x.operand.features
        return EncryptedTensor(x.operand.select(rows), shape, HEADS)

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None, None]:
        return EncryptedTensor(Gathered([gradient.operand], [ctx.rows], ctx.features), *ctx.source), None, None


class Rotary(torch.autograd.Function):
    """Rotary position embedding of heads; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: EncryptedTensor, rotation: Rotation) -> EncryptedTensor:
        ctx.rotation = rotation
        return EncryptedTensor(WaitingRotary(x.operand, rotation), tuple(x.shape), HEADS)

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, None]:
        operand, back = gradient.operand, ctx.rotation.transposed
        rotated = operand.rotated(back) if isinstance(operand, Gathered) else WaitingRotary(operand, back)
        return EncryptedTensor(rotated, tuple(gradient.shape), HEADS), None


class Attention(torch.autograd.Function):
    """Attention of queries, keys and values [B, heads, T, head_dim] by the `kernel`, hf_he.ops.attention_gradient's or
    hf_he.ops.power_softmax_gradient's."""

    @staticmethod
    def forward(
        ctx: Any, query: EncryptedTensor, key: EncryptedTensor, value: EncryptedTensor, mask: EncryptedTensor | None, kernel: Kernel
    ) -> EncryptedTensor:
        context, (batch, heads, tokens, head_dim) = query.session, query.shape
        out, saved = kernel.forward(context, query.operand, key.operand, value.operand, None if mask is None else mask.ciphertext)
        ctx.kernel = kernel
        ctx.save_for_backward(kept(context, saved))
        return EncryptedTensor(out, (batch, tokens, heads, head_dim), SPLIT)

    @staticmethod
    def backward(ctx: Any, gradient: EncryptedTensor) -> tuple[Gradient, ...]:
        (saved,) = _saved(ctx)
        batch, tokens, heads, head_dim = gradient.shape
        found = together(ctx.kernel.backward(gradient.session, saved.operand.value, gradient.operand, ctx.needs_input_grad[:3]))
        shape = (batch, heads, tokens, head_dim)
        return (*(None if operand is None else EncryptedTensor(operand, shape, HEADS) for operand in found), None, None)


class Loss(torch.autograd.Function):
    """A loss of encrypted logits and labels whose value nobody computes; `gradient`: what it is in the logits, summed over the sequences."""

    @staticmethod
    def forward(
        ctx: Any, logits: EncryptedTensor, labels: EncryptedTensor, gradient: Callable[[OperationContext, Operand, Labels], Operand]
    ) -> EncryptedTensor:
        ctx.gradient, ctx.source = gradient, (tuple(logits.shape), logits.kind)
        ctx.save_for_backward(logits, labels)
        return EncryptedTensor(Kept(logits.session, None), (), LOSS)

    @staticmethod
    def backward(ctx: Any, seed: torch.Tensor) -> tuple[Gradient, None, None]:
        logits, labels = _saved(ctx)
        return EncryptedTensor(ctx.gradient(logits.session, logits.operand, labels.operand), *ctx.source), None, None
