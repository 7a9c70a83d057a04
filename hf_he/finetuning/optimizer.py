"""Optimisers on densely packed ciphertexts: SGD with momentum and AdamW-HE, each with its plaintext twin.

AdamW-HE (Rho et al., ICLR 2025): theta <- theta - lr * m / sqrt(v + eps) with eps inside the root and not tiny, so that 1 / sqrt on an interval
is the only function to approximate; nothing is divided. m and v are the bias-corrected averages: from step to step
m <- a m + (1 - a) g with a = beta (1 - beta^(t-1)) / (1 - beta^t), likewise v with g^2. These factors are public numbers of the step, so the
correction costs no level, every value stays of the size of a gradient, and the first step needs no encrypted zeros.

The state before the first step is empty: the averages begin with its gradient.

Gradients arrive multiplied by `gradient_gain` = 1 / sqrt(divisor), a constant that packing them folds into its masks. With g' = g / sqrt(M),
m' / sqrt(v' + eps / M) is the update itself: M cancels, and v' + eps / M lies in [eps / M, 1] when `divisor` M is above v + eps.

Squared gradients of a classifier are hundreds of times those of LoRA matrices: one eps for all would starve the adapters. So each parameter's
gradient may come multiplied by a public scale of its own (`TrainingSettings.gradient_scales`, folded into the same masks), which changes AdamW in
nothing but its eps: eps and divisor are then in units of the scaled gradients.

Where the optimiser runs changes who learns what, not the result:
- on the server (default): it sees ciphertexts only; the client sees nothing until it asks for the adapter.
- on the client: once per step the server sends the dense gradient (`AdapterLayout.count` ciphertexts) and gets the dense weights back, freshly
  encrypted. The client then holds adapter, moments and gradients in the clear, all made of its own data; the server still sees ciphertexts only, and
  learns when the client answered. The client applies the same polynomials, so that both places give one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_he.approximation import InverseSquareRoot, fit_inverse_square_root
from hf_he.backends.base import Ciphertext
from hf_he.errors import ParameterError, RangeError
from hf_he.ops.context import OperationContext
from hf_he.ops.norm import inverse_root, inverse_root_depth

State = dict[str, Ciphertext]
PlainState = dict[str, np.ndarray]


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent as torch.optim.SGD: b <- momentum b + g + weight_decay theta; theta <- theta - lr b.

    `divisor` M makes gradients travel as g / sqrt(M), of order 1, which is what an encrypted refresh keeps accurate. One level.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0
    divisor: float = 1.0

    def __post_init__(self) -> None:
        _check(self, momentum=(0.0, 1.0), weight_decay=(0.0, 1.0))

    @property
    def gradient_gain(self) -> float:
        return 1.0 / math.sqrt(self.divisor)

    def step(
        self, context: OperationContext, weights: Ciphertext, gradient: Ciphertext, state: Mapping[str, Ciphertext], lr: float, step: int
    ) -> tuple[Ciphertext, State]:
        """Updated dense weights [count] and state; `gradient` is gradient_gain times the gradient. One level of each, refreshed when there is none."""
        weights, gradient, *buffer = context.ensure_levels([(ct, 1) for ct in (weights, gradient, *state.values())])
        gain = self.gradient_gain
        terms = [(gradient, 1.0), *((ct, self.momentum) for ct in buffer)]
        if self.weight_decay:
            terms.append((weights, gain * self.weight_decay))
        with context.backend.log.measure("optimizer"):
            updated = combination(context, [(ct, -lr / gain * factor) for ct, factor in terms] + [(weights, 1.0)])
            return updated, {"momentum": combination(context, terms)} if self.momentum else {}

    def reference(self, weights: np.ndarray, gradient: np.ndarray, state: Mapping[str, np.ndarray], lr: float, step: int) -> tuple[np.ndarray, PlainState]:
        """What `step` computes, on arrays; `gradient` is gradient_gain times the gradient."""
        gain = self.gradient_gain
        buffer = gradient + self.momentum * state.get("momentum", np.zeros(())) + gain * self.weight_decay * weights
        return weights - lr / gain * buffer, {"momentum": buffer} if self.momentum else {}


@dataclass(frozen=True)
class AdamWHE:
    """AdamW with polynomials: theta <- (1 - lr weight_decay) theta - lr m / sqrt(v + eps).

    `eps` is in units of a squared gradient, `divisor` a bound of v + eps; `degree` and `newton_steps` are those of 1 / sqrt on [eps / divisor, 1]
    (defaults: relative error 4.2e-3 at a ratio of 0.02 without Newton, in 4 levels; `fitting` for other ratios). Levels: 2 for v,
    `approximation.depth`, 1 for the product.
    Values of v + eps above `divisor` cannot be seen under encryption: `calibrate_divisor` leaves room, and `reference` raises.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 2e-2
    divisor: float = 1.0
    weight_decay: float = 0.0
    degree: int = 15
    newton_steps: int = 0

    def __post_init__(self) -> None:
        _check(self, beta1=(0.0, 1.0), beta2=(0.0, 1.0), weight_decay=(0.0, 1.0))
        if not 0.0 < self.eps < self.divisor:
            raise ParameterError(f"eps must be above 0 and below the divisor {self.divisor:g}, got {self.eps:g}: calibrate both on plaintext gradients")

    @property
    def gradient_gain(self) -> float:
        return 1.0 / math.sqrt(self.divisor)

    @cached_property
    def approximation(self) -> InverseSquareRoot:
        """1 / sqrt of v / divisor + eps / divisor."""
        return fit_inverse_square_root((self.eps / self.divisor, 1.0), self.degree, self.newton_steps)

    @property
    def depth(self) -> int:
        """Levels from the gradient to the updated weights when nothing is refreshed on the way."""
        return 2 + inverse_root_depth(self.approximation) + 1

    def step(
        self, context: OperationContext, weights: Ciphertext, gradient: Ciphertext, state: Mapping[str, Ciphertext], lr: float, step: int
    ) -> tuple[Ciphertext, State]:
        """Updated dense weights [count] and state {"m", "v"}; `gradient` is gradient_gain times the gradient, `step` counts from 1.

        Gradient and moments are refreshed together when one of them is too low for the whole update (or, where that is deeper than the
        parameters, for the averages; then the argument of 1 / sqrt is refreshed too). A bootstrap takes two iterations: the update is the gradient over at
        least sqrt(eps), a thirtieth of what they are scaled to, and one iteration's error would move every weight by 2.5e-4 of the learning rate.
        """
        backend = context.backend
        deep = self.depth if self.depth <= context.top else 2
        needed = {"m": 2, "v": deep - 1}
        gradient, *moments = context.ensure_levels([(gradient, deep), *((ct, needed[name]) for name, ct in state.items())], iterations=2)
        moments = dict(zip(state, moments, strict=True))
        keep1, keep2 = _kept(self.beta1, step), _kept(self.beta2, step)
        low, high = self.approximation.interval
        with backend.log.measure("optimizer"):
            square = context.square(gradient)
            first = [(gradient, 1.0 - keep1), *([(moments["m"], keep1)] if keep1 else [])]
            second = [(square, 1.0 - keep2), *([(moments["v"], keep2)] if keep2 else [])]
            mapped = combination(context, [(ct, 2.0 / (high - low) * factor) for ct, factor in second])
            mapped = backend.add_scalar(mapped, (2.0 * self.eps / self.divisor - low - high) / (high - low))
            inverse = inverse_root(context, mapped, self.approximation, 1)
            rate = combination(context, [(ct, -lr * factor) for ct, factor in first])
            level = min(inverse.level, rate.level)
            update = context.product(backend.match_level(inverse, level), backend.match_level(rate, level))
            state = {"m": combination(context, first), "v": combination(context, second)}
        weights = context.ensure_level(weights, 1)
        with backend.log.measure("optimizer"):
            level = min(update.level, weights.level - 1)
            decayed = combination(context, [(backend.match_level(weights, level + 1), 1.0 - lr * self.weight_decay)])
            return backend.add(decayed, backend.match_level(update, level)), state

    def reference(self, weights: np.ndarray, gradient: np.ndarray, state: Mapping[str, np.ndarray], lr: float, step: int) -> tuple[np.ndarray, PlainState]:
        """What `step` computes, on arrays. Raises RangeError when a second moment exceeds what `divisor` allows."""
        keep1, keep2 = _kept(self.beta1, step), _kept(self.beta2, step)
        m = keep1 * state.get("m", np.zeros(())) + (1.0 - keep1) * gradient
        v = keep2 * state.get("v", np.zeros(())) + (1.0 - keep2) * gradient**2
        argument = v + self.eps / self.divisor
        if argument.max() > self.approximation.interval[1]:
            raise RangeError(
                f"optimizer, step {step}: v + eps reaches {argument.max():.3g} divisors. Calibrate the divisor again with a larger margin, "
                f"or set it above {self.divisor * argument.max():.3g}."
            )
        return weights * (1.0 - lr * self.weight_decay) - lr * m * self.approximation(argument), {"m": m, "v": v}


Optimizer = SGD | AdamWHE


def combination(context: OperationContext, terms: list[tuple[Ciphertext, float]]) -> Ciphertext:
    """sum of factor * ciphertext, canonical, one level below the lowest of them."""
    backend = context.backend
    level = min(ct.level for ct, _ in terms)
    total = None
    for ct, factor in terms:
        ct = backend.drop_level(ct, level)
        term = backend.multiply_scalar(ct, factor, context.canonical_factor(level, ct.scale))
        total = term if total is None else backend.add(total, term)
    return backend.rescale(total)


def calibrate_divisor(largest_square: float, ratio: float = 0.001, margin: float = 16.0) -> tuple[float, float]:
    """(divisor, eps) from the largest squared gradient entry of a few plaintext batches, on the client.

    v is an average of such squares, so it stays below `margin` times the largest one seen; eps is `ratio` of the divisor, which
    sets the interval [ratio, 1] of 1 / sqrt. Raises ParameterError when there was no gradient.
    """
    if not (math.isfinite(largest_square) and largest_square > 0.0):
        raise ParameterError(f"the calibration batches gave gradients whose largest square is {largest_square:g}: check labels and trained parameters")
    divisor = margin * largest_square / (1.0 - ratio)
    return divisor, ratio * divisor


FITS = ((15, 0), (31, 0), (63, 0), (63, 1), (63, 2), (63, 3))


def fitting(ratio: float) -> tuple[int, int]:
    """(degree, newton_steps) of the shallowest of `FITS` (4, 5, 6, 8, 10, 12 levels) whose 1 / sqrt is within 1 % on [`ratio`, 1], the last where none
    is: (63, 0) at 0.001, (63, 2) and 0.3 % at 0.0001."""
    return next((fit for fit in FITS if fit_inverse_square_root((ratio, 1.0), *fit).max_error <= 0.01), FITS[-1])


def _kept(beta: float, step: int) -> float:
    """The share of a bias-corrected average that step `step` keeps; 0 for the first."""
    return beta * (1.0 - beta ** (step - 1)) / (1.0 - beta**step)


def _check(optimizer: Optimizer, **ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        if not low <= getattr(optimizer, name) < high:
            raise ParameterError(f"{name} must be from {low:g} to below {high:g}, got {getattr(optimizer, name)!r}")
    if not (math.isfinite(optimizer.divisor) and optimizer.divisor > 0.0):
        raise ParameterError(f"the divisor must be a positive number, got {optimizer.divisor!r}")
