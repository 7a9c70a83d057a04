"""Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_he import autograd
from hf_he.approximation import KernelExponential, Polynomial, Reciprocal
from hf_he.attention import gaussian_kernel_attention, normalized_gaussian_kernel_attention, power_softmax_attention
from hf_he.backends.base import Ciphertext
from hf_he.errors import ParameterError
from hf_he.handlers import cached
from hf_he.ops import attention, feature_major_attention, power_softmax
from hf_he.ops.attention_gradient import GaussianKernel
from hf_he.ops.feature_major_attention_gradient import FeatureMajorKernel
from hf_he.ops.operand import Operand
from hf_he.ops.power_softmax_gradient import PowerKernel
from hf_he.tensor import HEADS, MASK, SPLIT, EncryptedTensor, handler, unsupported


@handler(gaussian_kernel_attention)
def _gaussian_kernel(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[EncryptedTensor, None]:
    approximation = getattr(module, "kernel_approximation", None)
    if not isinstance(approximation, KernelExponential):
        raise _exact(gaussian_kernel_attention)
    return _attend(gaussian_kernel_attention, approximation, None, module, *args, **kwargs)


@handler(power_softmax_attention)
def _power_softmax(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[EncryptedTensor, None]:
    approximation = getattr(module, "kernel_approximation", None)
    if not isinstance(approximation, Reciprocal | Polynomial):
        raise _exact(power_softmax_attention)
    return _attend(power_softmax_attention, approximation, power_softmax_form(module.config), module, *args, **kwargs)


@handler(normalized_gaussian_kernel_attention)
def _normalized_gaussian_kernel(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[EncryptedTensor, None]:
    exponential, reciprocal = getattr(module, "kernel_approximation", None), getattr(getattr(module, "normalizer", None), "approximation", None)
    if not isinstance(exponential, KernelExponential) or reciprocal is None:
        raise _exact(normalized_gaussian_kernel_attention)
    return _attend(normalized_gaussian_kernel_attention, reciprocal, normalized_kernel_form(module.config, exponential), module, *args, **kwargs)


def _exact(name: Callable) -> Exception:
    return unsupported(name, " in exact mode: call model.set_mode('polynomial') first")


def _attend(
    name: Callable,
    approximation: KernelExponential | Reciprocal | Polynomial,
    form: power_softmax.PowerSoftmax | None,
    module: torch.nn.Module,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[EncryptedTensor, None]:
    """The Gaussian kernel, or with a `form` its powers over their row sums or over a constant."""
    if cached.is_cached(key):
        if attention_mask is not None:
            raise unsupported(name, " with a mask over a cache: the lengths of the cache say which tokens count")
        return cached.attend(name, module, query, key, value, scaling, approximation, form)
    (query, key, value), mask, trained = attention_operands(name, query, key, value, attention_mask, dropout)
    batch, heads, tokens, head_dim = query.shape
    context, causal = query.session, getattr(module, "is_causal", False)
    scaling = head_dim**-0.5 if scaling is None else scaling
    levels, feature_major = context.levels(module), context.packing.features == 1
    if trained:
        if form is None:
            kernel = (FeatureMajorKernel if feature_major else GaussianKernel)(heads, scaling, approximation, levels, causal)
        elif feature_major:
            raise unsupported(name, " that can be differentiated with one feature per ciphertext: pack the hidden size of the model")
        else:
            kernel = PowerKernel(heads, scaling, form, approximation, levels, causal)
        return autograd.call(autograd.Attention, query, key, value, attention_mask, kernel), None
    operands = (query.operand, key.operand, value.operand)
    if form is None:
        levels = levels or attention.default_levels(context, approximation.squarings, causal)
        gaussian = feature_major_attention if feature_major else attention
        out = gaussian.encrypted(context, *operands, mask, heads, scaling, approximation, levels, causal)
    else:
        out = power_softmax.encrypted(context, *operands, mask, heads, scaling, form, approximation, causal, levels)
    return EncryptedTensor(Operand(context, heads * head_dim, out), (batch, tokens, heads, head_dim), SPLIT), None


def power_softmax_form(config: Any) -> power_softmax.PowerSoftmax:
    """What a model's config says of its power softmax."""
    return power_softmax.PowerSoftmax(
        config.power_softmax_degree,
        config.power_softmax_eps,
        config.power_softmax_shift,
        config.power_softmax_divisor,
        config.power_softmax_length_agnostic,
    )


def normalized_kernel_form(config: Any, exponential: KernelExponential) -> power_softmax.PowerSoftmax:
    """The normalized Gaussian kernel (1 + s / 2^k)^(2^k) as a power softmax of 1 + s / 2^k."""
    eps, length_agnostic = config.power_softmax_eps, config.power_softmax_length_agnostic
    return power_softmax.PowerSoftmax(exponential.degree, eps, 1.0, None, length_agnostic, distances=True)


def mask_power(model: torch.nn.Module) -> int | None:
    """The `power` that `pack_attention_mask` takes for this model in polynomial mode; None where its masks hold ones.

    Raises ParameterError where its layers need different masks.
    """
    powers = {_counted_power(module) for module in model.modules() if getattr(module, "kernel_approximation", None) is not None}
    if len(powers) > 1:
        raise ParameterError("the kernels of this model's layers have different powers, and one mask serves them all: calibrate them to the same squarings")
    return powers.pop() if powers else None


def _counted_power(module: torch.nn.Module) -> int | None:
    """The power of a bidirectional kernel whose rows are divided by their number of valid keys."""
    config = module.config
    if config.attention_kernel == "gaussian_kernel" or getattr(module, "is_causal", False):
        return None
    form = power_softmax_form(config) if config.attention_kernel == "power_softmax" else normalized_kernel_form(config, module.kernel_approximation)
    return form.power if form.counts else None


def attention_operands(
    name: Callable, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float
) -> tuple[tuple[EncryptedTensor, EncryptedTensor, EncryptedTensor], Ciphertext | None, bool]:
    """Query, key and value, grouped keys and values repeated by their projections; the mask's ciphertext; whether somebody will differentiate."""
    if dropout:
        raise unsupported(name, " while training: set the model's dropout probabilities to 0, or call model.eval()")
    for tensor in (query, key, value):
        if not isinstance(tensor, EncryptedTensor) or tensor.kind != HEADS:
            raise unsupported(name, " of anything but encrypted queries, keys and values [B, heads, T, head_dim]")
    if attention_mask is not None and (not isinstance(attention_mask, EncryptedTensor) or attention_mask.kind != MASK):
        raise unsupported(name, " with a plaintext mask: make it with session.attention_mask(ciphertext)")
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    mask = None if attention_mask is None else attention_mask.ciphertext
    return (query, _repeated(key, query.shape[1]), _repeated(value, query.shape[1])), mask, trained


def _repeated(tensor: EncryptedTensor, heads: int) -> EncryptedTensor:
    """Each head of `tensor` for heads / its own heads queries."""
    batch, own, tokens, head_dim = tensor.shape
    if own == heads:
        return tensor
    rows = np.repeat(np.arange(own * head_dim).reshape(own, head_dim), heads // own, axis=0)
    return autograd.call(autograd.Select, tensor, rows.reshape(-1), (batch, heads, tokens, head_dim))
