"""Chebyshev series of a ciphertext at the least depth: ceil(log2(degree + 1)) levels from an input in [-1, 1].

Paterson and Stockmeyer's method in the Chebyshev basis (as in Bossuat et al., EUROCRYPT 2021): p = q T_n + r with n a power of two, down
to leaves that are sums of T_i with scalar factors. The branch q T_n loses a level per division, so its leaves shrink to degree 1; the
branches r have time and end in larger leaves. Scales are exact without spending levels on them: every product is given the scale its
parent asks for, and the leaves' scalar factors absorb the rest. Sums are taken before relinearising and rescaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hf_he.backends.base import Ciphertext, HEBackend

LEAF_DEGREES = (1, 3, 7, 15)


@dataclass(frozen=True)
class Leaf:
    coefficients: tuple[float, ...]

    @property
    def powers(self) -> list[int]:
        return [i for i, c in enumerate(self.coefficients) if i and c]


@dataclass(frozen=True)
class Division:
    """quotient * T_n + remainder"""

    quotient: Leaf | Division
    n: int
    remainder: Leaf | Division


Node = Leaf | Division


def power_depth(n: int) -> int:
    """Levels that T_n takes."""
    return (n - 1).bit_length()


def split(n: int) -> tuple[int, int]:
    """T_n = 2 T_a T_b - T_(a - b) with a - b <= 1."""
    return n - n // 2, n // 2


def _trimmed(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    end = len(coefficients)
    while end > 1 and not coefficients[end - 1]:
        end -= 1
    return coefficients[:end]


def divide(coefficients: tuple[float, ...], n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Quotient and remainder by T_n, n <= degree < 2n, from T_(n + i) = 2 T_n T_i - T_(n - i)."""
    quotient = (coefficients[n], *(2.0 * c for c in coefficients[n + 1 :]))
    remainder = list(coefficients[:n])
    for i, c in enumerate(coefficients[n + 1 :], start=1):
        remainder[n - i] -= c
    return _trimmed(quotient), _trimmed(tuple(remainder))


def _tree(coefficients: tuple[float, ...], spent: int, largest_leaf: int) -> Node:
    """The evaluation tree whose root's operands may have spent `spent` levels."""
    degree = len(coefficients) - 1
    leaf = Leaf(coefficients)
    if degree <= 1 or (degree <= largest_leaf and all(power_depth(i) <= spent for i in leaf.powers)):
        return leaf
    n = 1 << (degree.bit_length() - 1)
    quotient, remainder = divide(coefficients, n)
    return Division(_tree(quotient, spent - 1, largest_leaf), n, _tree(remainder, spent, largest_leaf))


def _products(node: Node, powers: set[int]) -> int:
    if isinstance(node, Leaf):
        powers.update(node.powers)
        return 0
    powers.add(node.n)
    own = 0 if isinstance(node.quotient, Leaf) and not node.quotient.powers else 1
    return own + _products(node.quotient, powers) + _products(node.remainder, powers)


def _cost(node: Node) -> int:
    """Ciphertext products, those for the T_n included."""
    powers: set[int] = set()
    own = _products(node, powers)
    needed, pending = set(), {p for p in powers if p > 1}
    while pending:
        n = pending.pop()
        needed.add(n)
        pending |= {m for m in split(n) if m > 1} - needed
    return own + len(needed)


@lru_cache(maxsize=256)
def evaluation_tree(coefficients: tuple[float, ...]) -> Node:
    """The tree with the fewest ciphertext products at the least depth."""
    depth = (len(coefficients) - 1).bit_length()
    return min((_tree(coefficients, depth - 1, leaf) for leaf in LEAF_DEGREES), key=_cost)


def depth(coefficients: tuple[float, ...]) -> int:
    """Levels `evaluate` takes: ceil(log2(degree + 1))."""
    return (len(_trimmed(coefficients)) - 1).bit_length()


class _Evaluation:
    """One evaluation: T_n of the input as they become known, and sums at exactly the scales asked for."""

    def __init__(self, backend: HEBackend, u: Ciphertext) -> None:
        self.backend = backend
        self.known = {1: u}

    def power(self, n: int) -> Ciphertext:
        """T_n, as high as it can be; its scale is whatever the product gave."""
        if n not in self.known:
            backend = self.backend
            a, b = split(n)
            high, low = self.power(a), self.power(b)
            level = min(high.level, low.level)
            product = backend.multiply(backend.drop_level(high, level), backend.drop_level(low, level))
            product = backend.add(product, product)
            if a == b:
                product = backend.add_scalar(product, -1.0)
            else:
                product = backend.subtract(product, self.scaled(1, 1.0, level, product.scale))
            self.known[n] = self.reduced(product)
        return self.known[n]

    def reduced(self, ct: Ciphertext) -> Ciphertext:
        return self.backend.relinearize_rescale(ct)

    def scaled(self, n: int, factor: float, level: int, scale: float) -> Ciphertext:
        """factor * T_n at `level`, not rescaled, at exactly `scale`."""
        power = self.backend.drop_level(self.power(n), level)
        return self.backend.multiply_scalar(power, factor, scale / power.scale)

    def sum(self, node: Node, level: int, scale: float) -> tuple[Ciphertext | None, float]:
        """The node at `level` and `scale` before rescaling, as a ciphertext (None: nothing but the constant) and a constant."""
        if isinstance(node, Leaf):
            total = None
            for n in node.powers:
                term = self.scaled(n, node.coefficients[n], level, scale)
                total = term if total is None else self.backend.add(total, term)
            return total, node.coefficients[0]
        term = self._quotient_term(node, level, scale)
        rest, constant = self.sum(node.remainder, level, scale)
        return (term if rest is None else self.backend.add(term, rest)), constant

    def _quotient_term(self, node: Division, level: int, scale: float) -> Ciphertext:
        if isinstance(node.quotient, Leaf) and not node.quotient.powers:
            return self.scaled(node.n, node.quotient.coefficients[0], level, scale)
        power = self.backend.drop_level(self.power(node.n), level)
        q = self.backend.parameters.moduli[level + 1]
        quotient, constant = self.sum(node.quotient, level + 1, scale / power.scale * q)
        assert quotient is not None
        quotient = self.reduced(self.backend.add_scalar(quotient, constant))
        return self.backend.multiply(quotient, power)


def evaluate(backend: HEBackend, u: Ciphertext, coefficients: tuple[float, ...]) -> Ciphertext:
    """sum_j coefficients[j] T_j(u) for u in [-1, 1], canonical, at level u.level - depth(coefficients).

    A series of even terms plus c_1 T_1 (GELU and ReLU on a symmetric interval) is evaluated in T_2(u), with half the products.
    """
    coefficients = _trimmed(tuple(float(c) for c in coefficients))
    level = u.level - depth(coefficients) + 1
    scale = backend.parameters.scale_at(level - 1) * backend.parameters.moduli[level] if level else 0.0
    evaluation = _Evaluation(backend, u)
    if len(coefficients) > 4 and not any(coefficients[3::2]):
        halved = _Evaluation(backend, evaluation.power(2))
        total, constant = halved.sum(evaluation_tree(coefficients[::2]), level, scale)
        if coefficients[1]:
            linear = evaluation.scaled(1, coefficients[1], level, scale)
            total = linear if total is None else backend.add(total, linear)
    else:
        total, constant = evaluation.sum(evaluation_tree(coefficients), level, scale)
    assert total is not None
    return evaluation.reduced(backend.add_scalar(total, constant))
