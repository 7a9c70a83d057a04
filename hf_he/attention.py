"""Attention without softmax, for any model on transformers' attention interface.

- `gaussian_kernel` (Rho et al., "Encryption-Friendly LLM Architecture", ICLR 2025): weights exp(-||q - k||^2 / (2 sqrt(head_dim))), not
  normalised, so that no division is left and the exponent is never positive.
- `power_softmax` (Zimerman et al., "Power-Softmax", arXiv 2410.09457): weights x^p / (eps + sum x^p) of the scores x, p even; eps = 1 is the
  denominator of PolySketchFormer (arXiv 2310.01655), and a shift c and a constant divisor make it the (x + c)^p / constant of Powerformer
  (Park et al., ACL 2025), without any division. A patent family (US 2026/0046109 A1, US 12,647,248 B2) describes replacing
  self-attention with a power softmax under homomorphic encryption; check it before use.
- `normalized_gaussian_kernel`: Gaussian-kernel weights divided by eps + their row sum. They are at most 1 and the reciprocal's input at most
  1 + eps whatever the text is. In polynomial mode, (1 + s)^(2^k), it is a power softmax of 1 + s, so that the patent family above concerns it too.

All multiply by a 0/1 mask, which is exact: masked weights are 0, there is no -inf. Importing this module registers the attention
functions and their masks, after which `attn_implementation="gaussian_kernel"` works. transformers does not save that name in config.json,
and a model that does not use the interface ignores it silently: see `check_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from transformers import Cache, PreTrainedModel

from hf_he._compat import ALL_ATTENTION_FUNCTIONS, AttentionInterface, AttentionMaskInterface, create_causal_mask, maybe_autocast, sdpa_mask
from hf_he.approximation import KernelExponential
from hf_he.errors import ApproximationError, UnsupportedModelError
from hf_he.nn import observe

DEFAULT_POWER = 4
DEFAULT_POWER_EPS = 1e-3


def _overridable(attention: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Leave calls whose query, key or value has a `__torch_function__` of its own to that."""

    @wraps(attention)
    def overridable(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if has_torch_function((query, key, value)):
            return handle_torch_function(overridable, (query, key, value), module, query, key, value, *args, **kwargs)
        return attention(module, query, key, value, *args, **kwargs)

    return overridable


@_overridable
def gaussian_kernel_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Un-normalised Gaussian-kernel attention. Overridable through `__torch_function__` of query, key or value.

    The exponent is -scaling / 2 (||q||^2 + ||k||^2 - 2 q.k); its exponential is the real one, or `module.kernel_approximation` (a
    `KernelExponential`) in polynomial mode.

    Args:
        query: [B, heads, T, head_dim]; `key` and `value`: [B, heads / groups, S, head_dim].
        attention_mask: 0/1 or boolean, broadcastable to [B, heads, T, S]; 1 keeps. None keeps everything.
        scaling: 1 / sqrt(head_dim) when None.
        dropout: probability on the weights while training.

    Returns:
        output [B, T, heads, head_dim] and the weights [B, heads, T, S].

    Raises:
        RangeError: polynomial mode, outside a `RangeTracker`, an exponent left the fitted interval.
        ApproximationError: polynomial mode in 16 bits, or with the approximation of another kernel.
        UnsupportedModelError: an additive mask, no mask for a causal module, or attention sinks, position biases or
            a cap on the scores.
    """
    query, key = _wide_enough(module, query, key)
    key, value, mask, scaling = _prepare(module, query, key, value, attention_mask, scaling, kwargs)
    return _weighted_sum(module, _gaussian_weights(module, query, key, mask, scaling), value, dropout)


@_overridable
def normalized_gaussian_kernel_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian-kernel weights over eps + their sum; arguments, results and errors as for `gaussian_kernel_attention`.

    eps is `power_softmax_eps` of `module.config`, added to the sum, or with `power_softmax_length_agnostic` to the mean over the row's valid keys. The
    reciprocal is of eps + mean in both cases: the real one, or the approximation of `module.normalizer` (a `Reciprocal`).
    """
    query, key = _wide_enough(module, query, key)
    key, value, mask, scaling = _prepare(module, query, key, value, attention_mask, scaling, kwargs)
    weights = _gaussian_weights(module, query, key, mask, scaling)
    length: torch.Tensor | float = float(key.shape[-2]) if mask is None else mask.sum(-1, keepdim=True).clamp(min=1.0)
    config, normalizer = getattr(module, "config", None), getattr(module, "normalizer", None)
    eps = getattr(config, "power_softmax_eps", DEFAULT_POWER_EPS)
    eps = eps if getattr(config, "power_softmax_length_agnostic", False) else eps / length
    approximation = getattr(normalizer, "approximation", None)
    mean = _of_rows_with_keys(eps + weights.sum(-1, keepdim=True) / length, mask, approximation)
    if normalizer is not None:
        observe(normalizer, "kernel_mean", mean, approximation)
    inverse = 1.0 / mean if approximation is None else approximation(mean)
    return _weighted_sum(module, weights * (inverse / length), value, dropout)


def _wide_enough(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32 where they have 16 bits, in which ||q||^2 + ||k||^2 - 2 q.k cancels or overflows. Polynomial mode refuses 16 bits."""
    if getattr(module, "kernel_approximation", None) is None and query.dtype in (torch.float16, torch.bfloat16):
        return query.float(), key.float()
    return query, key


def _gaussian_weights(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """exp(-scaling / 2 ||q - k||^2), or its approximation, times the mask: [B, heads, T, S]."""
    squared_distance = query.square().sum(-1).unsqueeze(-1) + key.square().sum(-1).unsqueeze(-2)
    with maybe_autocast(query.device.type, enabled=False):
        squared_distance = squared_distance - 2.0 * (query @ key.transpose(-1, -2))
    exponent = (-0.5 * scaling * squared_distance).clamp(max=0.0)
    approximation = getattr(module, "kernel_approximation", None)
    if approximation is not None and not isinstance(approximation, KernelExponential):
        raise _of_another_kernel(module, "a Gaussian kernel")
    observe(module, "exponent", exponent, approximation)
    weights = torch.exp(exponent) if approximation is None else approximation(exponent)
    return weights if mask is None else weights * mask


@_overridable
def power_softmax_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Power-softmax attention; arguments, results and errors as for `gaussian_kernel_attention`.

    `module.config` may set `power_softmax_degree` (even, default 4), `power_softmax_eps` (default 1e-3), `power_softmax_shift` (c of
    (x + c)^p, default 0), `power_softmax_divisor` (a constant instead of eps + sum, default None) and `power_softmax_length_agnostic`:
    False, eps is added to the sum of x^p; True, to the mean over the row's valid keys (whose number multiplies a constant divisor). Without
    an approximation the numerically stable form runs; with `module.kernel_approximation` (a `Reciprocal` of eps + mean x^p) the raw
    length-agnostic form that is evaluated under encryption. With a constant divisor both modes are the same polynomial, and
    `module.kernel_approximation` (a `Polynomial`) only tells the interval of the shifted scores.
    """
    key, value, mask, scaling = _prepare(module, query, key, value, attention_mask, scaling, kwargs)
    config = getattr(module, "config", None)
    power = getattr(config, "power_softmax_degree", DEFAULT_POWER)
    eps = getattr(config, "power_softmax_eps", DEFAULT_POWER_EPS)
    scores = (query @ key.transpose(-1, -2)) * scaling + getattr(config, "power_softmax_shift", 0.0)
    length: torch.Tensor | float = float(key.shape[-2])
    if mask is not None:
        scores = scores * mask
        length = mask.sum(-1, keepdim=True).clamp(min=1.0)
    approximation = getattr(module, "kernel_approximation", None)
    if isinstance(approximation, KernelExponential):
        raise _of_another_kernel(module, "power softmax")
    length_agnostic = getattr(config, "power_softmax_length_agnostic", False)
    divisor = getattr(config, "power_softmax_divisor", None)
    mean_eps = eps if length_agnostic else eps / length
    if divisor is not None:
        observe(module, "score", scores, approximation)
        weights = scores**power / (divisor * length if length_agnostic else divisor)
    elif approximation is None:
        observe(module, "power_mean", power_mean(scores, power, mean_eps, length), None)
        weights = stable_power_softmax(scores, power, mean_eps * length)
    else:
        powers = scores**power
        denominator = _of_rows_with_keys(mean_eps + powers.sum(-1, keepdim=True) / length, mask, approximation)
        observe(module, "power_mean", denominator, approximation)
        weights = powers * (approximation(denominator) / length)
    return _weighted_sum(module, weights, value, dropout)


def _of_another_kernel(module: nn.Module, needed: str) -> ApproximationError:
    name = getattr(module, "layer_name", "") or type(module).__name__
    return ApproximationError(f"{name}: its approximation was fitted to another attention than {needed}: keep the attn_implementation it was calibrated with.")


def _of_rows_with_keys(mean: torch.Tensor, mask: torch.Tensor | None, approximation: Any | None) -> torch.Tensor:
    """`mean` with a value inside the fitted interval for rows that may attend to nothing (left padding), whose weights are 0 in any case."""
    if mask is None or approximation is None:
        return mean
    return torch.where(mask.any(-1, keepdim=True), mean, mean.new_tensor(sum(approximation.interval) / 2))


def stable_power_softmax(scores: torch.Tensor, power: int, eps: float | torch.Tensor) -> torch.Tensor:
    """scores^p / (eps + sum scores^p) over the last dimension without overflow: rows are divided by c = max |score| and eps by c^p,
    which leaves the function (and hence its gradient, c being a constant) unchanged."""
    largest = scores.detach().abs().amax(-1, keepdim=True) + 1e-4
    powers = (scores / largest) ** power
    return powers / (eps / largest**power + powers.sum(-1, keepdim=True))


def power_mean(scores: torch.Tensor, power: int, eps: float | torch.Tensor, length: float | torch.Tensor) -> torch.Tensor:
    """eps + (sum scores^p) / length over the last dimension: the quantity whose reciprocal the length-agnostic form needs."""
    return eps + (scores**power).sum(-1, keepdim=True) / length


def softmax_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with the 0/1 masks used here: the baseline and distillation teacher. It has no polynomial form."""
    key, value, mask, scaling = _prepare(module, query, key, value, attention_mask, scaling, kwargs)
    scores = (query @ key.transpose(-1, -2)) * scaling
    if mask is not None:
        scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
    return _weighted_sum(module, scores.softmax(-1), value, dropout)


def keep_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Boolean mask [B, 1, T, S], True keeps, never skipped: attention functions here multiply by it instead of adding -inf."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    kwargs.pop("dtype", None)
    return sdpa_mask(*args, **kwargs)


def causal_keep_mask(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`create_causal_mask` as booleans [B, 1, T, S], True keeps, whatever implementation the model's config names. Overridable.

    Args:
        inputs_embeds: [B, T, ...], for its shape and device.
        attention_mask: [B, S] with 1 for real tokens, or a finished [B, 1, T, S], returned as it is.
        kwargs: ignored; the name and signature under which `generate` asks a model for the masks of a static cache have more.
    """
    if has_torch_function((inputs_embeds, attention_mask)):
        return handle_torch_function(causal_keep_mask, (inputs_embeds, attention_mask), inputs_embeds, attention_mask, past_key_values, position_ids)
    return create_causal_mask(_KEEP_MASK, inputs_embeds, attention_mask, past_key_values, position_ids)


ATTENTION_FUNCTIONS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "gaussian_kernel": gaussian_kernel_attention,
    "normalized_gaussian_kernel": normalized_gaussian_kernel_attention,
    "power_softmax": power_softmax_attention,
}

for _name, _function in ATTENTION_FUNCTIONS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, keep_mask)

_KEEP_MASK = SimpleNamespace(_attn_implementation="gaussian_kernel")


@dataclass(frozen=True)
class AttentionCheck:
    """What `check_attention` saw: calls of the attention function in one forward, whether the model is causal, and the largest
    change of an earlier position's output when the last token changes (None when the model is not causal)."""

    calls: int
    causal: bool
    future_leak: float | None


@torch.no_grad()
def check_attention(model: PreTrainedModel, name: str = "gaussian_kernel", num_tokens: int = 6) -> AttentionCheck:
    """Run `model` on a few tokens with attention `name` and make sure that it is really used and, in a causal model, sees no future.

    The model keeps its own attention, mode and training flag.

    Raises:
        UnsupportedModelError: the model never calls the function, refuses the name, or leaks future tokens.
    """
    if name not in ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(f"No attention named {name!r}; known: {', '.join(ATTENTION_FUNCTIONS)}.")
    modules: list[nn.Module] = []

    def counting(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        modules.append(module)
        return ATTENTION_FUNCTIONS[name](module, *args, **kwargs)

    original, training = model.config._attn_implementation, model.training
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(num_tokens, device=model.device).remainder(vocabulary - 2).unsqueeze(0) + 1
    ALL_ATTENTION_FUNCTIONS[name] = counting
    try:
        model.eval()
        _set_attention(model, name)
        before = model(input_ids=tokens)[0]
        calls, causal = len(modules), any(getattr(module, "is_causal", False) for module in modules)
        if not calls:
            raise UnsupportedModelError(
                f"{type(model).__name__} ignores attn_implementation={name!r}: it does not use transformers' attention interface, and "
                "would go on with its own softmax. Use a model that does, or port its attention."
            )
        if not causal:
            return AttentionCheck(calls, False, None)
        changed = tokens.clone()
        changed[0, -1] = tokens[0, -1] % (vocabulary - 1) + 1
        after = model(input_ids=changed)[0]
        leak = float((after[:, :-1] - before[:, :-1]).abs().max())
        if leak != 0.0:
            raise UnsupportedModelError(
                f"{type(model).__name__} leaks future tokens with {name!r}: changing the last token moves earlier outputs by {leak:.3g}. "
                "Its causal mask does not reach the attention function."
            )
        return AttentionCheck(calls, True, leak)
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        _set_attention(model, original)
        model.train(training)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{type(model).__name__} refuses attn_implementation={name!r}: {error}") from error


def _prepare(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
    """Repeat grouped keys and values, default the scaling, and turn the mask into 0/1 numbers of the query's type."""
    for argument in ("s_aux", "position_bias", "softcap"):
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} passes {argument!r}, which only means something to softmax attention.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        if getattr(module, "is_causal", False) and query.shape[-2] > 1:
            raise UnsupportedModelError(f"{type(module).__name__} is causal but no mask arrived: its model builds masks for another attention implementation.")
        return key, value, None, scaling
    if attention_mask.dtype != torch.bool and attention_mask.numel() and _is_additive(attention_mask):
        raise UnsupportedModelError(
            f"{type(module).__name__} passes an additive mask; a 0/1 or boolean one is needed (1 keeps). Its model builds the mask itself."
        )
    return key, value, attention_mask[..., : key.shape[-2]].to(query.dtype), scaling


def _is_additive(mask: torch.Tensor) -> bool:
    """Whether numbers added to the scores: negative ones, or floating-point zeros only."""
    return bool((mask < 0).any()) or (mask.is_floating_point() and not bool((mask > 0).any()))


def _weighted_sum(module: nn.Module, weights: torch.Tensor, value: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
    weights = F.dropout(weights.to(value.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
