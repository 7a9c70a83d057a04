"""1 / v of a ciphertext: a polynomial guess and Goldschmidt's iteration (hf_he.approximation.Reciprocal)."""

from __future__ import annotations

from hf_he.approximation import Reciprocal
from hf_he.backends.base import Ciphertext
from hf_he.ops import polynomial
from hf_he.ops.context import OperationContext


def depth(approximation: Reciprocal) -> int:
    """Levels from the mapped input to 1 / v."""
    return polynomial.depth(approximation.guess.coefficients) + (approximation.steps + 1 if approximation.steps else 0)


def evaluate_reciprocal(context: OperationContext, mapped: Ciphertext, approximation: Reciprocal, level: int) -> Ciphertext:
    """1 / (g v), g = 2 / (high - low), of the v whose image in [-1, 1] is `mapped`; at `level` or higher, refreshed on the way where levels are missing.

    Dividing by g as well saves a level: g v is `mapped` plus a constant, and the caller has multiplied by g already. The result reaches (high - low) / (2 low),
    too much for a level 0 of 10 bits above the scale where that is over 512: what a refresh must follow is refreshed one step earlier.
    """
    backend = context.backend
    low, high = approximation.interval
    guess = approximation.guess.coefficients
    least, wanted = polynomial.depth(guess), depth(approximation) + level
    mapped = context.ensure_level(mapped, wanted if wanted <= context.top else least)
    mapped = backend.match_level(mapped, min(mapped.level, wanted))
    y = polynomial.evaluate(backend, mapped, tuple(0.5 * (high - low) * c for c in guess))
    if not approximation.steps:
        return context.ensure_level(y, level)
    value = backend.add_scalar(mapped, (high + low) / (high - low))
    if y.level < 2:
        y, value = _together(context, y, backend.match_level(value, y.level), min(approximation.steps + 1 + level, context.top))
    value = backend.match_level(value, y.level)
    residual = backend.add_scalar(backend.negate(context.product(value, y)), 1.0)
    for step in range(approximation.steps):
        y = backend.match_level(y, residual.level)
        last = step == approximation.steps - 1
        if y.level < (2 if level or not last else 1):
            y, residual = _together(context, y, residual, min(approximation.steps - step + level, context.top))
        products = context.product(y if last else backend.stack([y, residual]), residual)
        y = backend.add(backend.match_level(y, products.level), products if last else backend.take(products, 0))
        residual = residual if last else backend.take(products, 1)
    return context.ensure_level(y, level)


def _together(context: OperationContext, a: Ciphertext, b: Ciphertext, level: int) -> tuple[Ciphertext, Ciphertext]:
    """Both refreshed in one go, at `level`."""
    backend = context.backend
    fresh = backend.match_level(context.ensure_level(backend.stack([a, b]), level), level)
    return backend.take(fresh, 0), backend.take(fresh, 1)
