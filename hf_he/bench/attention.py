"""The attention operator alone: power softmax and Gaussian kernel beside a softmax, between the same encrypted queries, keys and values.

Each is run natively on heads of 64 features, at the levels that cost least there. Parameters without bootstrapping refresh with the secret key in this process:
refreshes are counted and their time is not. The same operators are priced, bootstraps included, by the counting backend at parameters that
bootstrap, also where a run would take hours. Beside the ratios stand those of Zimerman et al. (arXiv 2410.09457, v2), on an A100: power softmax,
softmax by a Taylor exponential and Goldschmidt, softmax by repeated squaring.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_he.approximation import Interval, KernelExponential, fit_reciprocal, kernel_exponential
from hf_he.backends import get_backend
from hf_he.backends.base import Ciphertext, HEBackend
from hf_he.bench.runner import Announce
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.errors import ApproximationError, LevelError, ScaleMismatchError
from hf_he.ops import attention, power_softmax, softmax
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.ops.placement import AttentionLevels
from hf_he.packing import Packing, pack_embeddings, unpack_state
from hf_he.planner import CountingSession

HEAD_DIM = 64
POWER, GUESS_DEGREE, GOLDSCHMIDT_STEPS = 4, 7, 2
TOLERANCE = 0.03
"""Exponentials get as many squarings as bring the operator, in floating point, within this of the exact one; values have standard deviation 1."""

MARGIN = 1.2
"""Intervals are this much wider than the values in them."""

FUNCTION_QUERY_LEVEL = 7
"""The lowest level of queries and keys from which the power softmax refreshes none of its scores: two levels to the scores, two for their power, one each
for mask, reciprocal and result. What an operator with a deeper function refreshes from there is the price of that function."""

MEASURED, PRICED = "n14", "n16-bootstrap"
NAMES = ("power_softmax", "gaussian_kernel", "softmax")
PAPER = {
    128: {"power softmax": 2.7, "softmax by Taylor series and Goldschmidt": 3.6, "softmax by squaring": 7.42},
    1024: {"power softmax": 8.6, "softmax by Taylor series and Goldschmidt": 83.9, "softmax by squaring": 173.4},
}
"""Seconds by tokens."""

Operands = tuple[Operand, Operand, Operand]


@dataclass(frozen=True)
class Operator:
    """`run`(context, operands, levels) -> [1]; `exact` [B, T, head_dim]: what it approximates."""

    name: str
    run: Callable[[OperationContext, Operands, AttentionLevels], Ciphertext]
    exact: torch.Tensor


@dataclass(frozen=True)
class Price:
    """The cheapest levels on the counting backend: seconds of one core, and the ciphertexts of each refresh."""

    levels: AttentionLevels
    seconds: dict[str, float]
    refreshes: tuple[int, ...]
    operations: dict[str, int]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def function(self) -> float:
        """Seconds from scores to weights and reciprocals, refreshes included: all but the products of the operator."""
        return self.seconds.get("kernel", 0.0) + self.seconds.get("refresh", 0.0)


def operators(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[Operator]:
    """The operators with intervals around what these queries, keys and values [B, 1, T, head_dim] need."""
    scaling = query.shape[-1] ** -0.5
    scores = scaling * query @ key.transpose(-1, -2)
    distances = -0.5 * scaling * (query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1)
    maximum = float(scores.max())
    form = power_softmax.PowerSoftmax(POWER, 0.0, length_agnostic=True)
    mean = fit_reciprocal(_around((scores**POWER).mean(-1)), GUESS_DEGREE, GOLDSCHMIDT_STEPS)

    def baseline(squarings: int) -> softmax.Softmax:
        exponential = kernel_exponential((MARGIN * float(scores.min() - maximum), 0.0), squarings)
        sums = _around(exponential(scores - maximum).sum(-1))
        return softmax.Softmax(maximum, exponential, fit_reciprocal(sums, GUESS_DEGREE, GOLDSCHMIDT_STEPS))

    def kernel(squarings: int) -> KernelExponential:
        return kernel_exponential((MARGIN * float(distances.min()), 0.0), squarings)

    exact = {
        NAMES[0]: scores**POWER / (scores**POWER).sum(-1, keepdim=True) @ value,
        NAMES[1]: distances.exp() @ value,
        NAMES[2]: scores.softmax(-1) @ value,
    }
    exact = {name: out.squeeze(1) for name, out in exact.items()}
    gaussian_form = _accurate(kernel, lambda form: attention.reference(query, key, value, None, scaling, form), exact[NAMES[1]])
    softmax_form = _accurate(baseline, lambda form: softmax.reference(query, key, value, None, scaling, form), exact[NAMES[2]])

    def power(context: OperationContext, operands: Operands, levels: AttentionLevels) -> Ciphertext:
        return power_softmax.encrypted(context, *operands, None, 1, scaling, form, mean, levels=levels)

    def gaussian(context: OperationContext, operands: Operands, levels: AttentionLevels) -> Ciphertext:
        return attention.encrypted(context, *operands, None, 1, scaling, gaussian_form, levels)

    def usual(context: OperationContext, operands: Operands, levels: AttentionLevels) -> Ciphertext:
        return softmax.forward(context, *operands, None, 1, scaling, softmax_form, levels)[0]

    return [Operator(name, run, exact[name]) for name, run in zip(NAMES, (power, gaussian, usual), strict=True)]


def _accurate(build: Callable[[int], Any], evaluate: Callable[[Any], torch.Tensor], exact: torch.Tensor) -> Any:
    """`build`(squarings) with the fewest squarings whose result [B, T, 1, head_dim] is within TOLERANCE of `exact`."""
    for squarings in range(3, 16):
        with suppress(ApproximationError):
            form = build(squarings)
            if float((evaluate(form).squeeze(2) - exact).abs().max()) <= TOLERANCE:
                return form
    raise ApproximationError(f"no exponential by squaring brings attention within {TOLERANCE:g} of the exact one")


def _around(values: torch.Tensor) -> Interval:
    return float(values.min()) / MARGIN, float(values.max()) * MARGIN


def sample(packing: Packing, seed: int = 0) -> torch.Tensor:
    """Queries, keys and values [3, B, 1, T, head_dim] of one head: normal, so that scores have standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, packing.sequences, 1, packing.tokens, packing.features, generator=generator, dtype=torch.float64)


def price(operator: Operator, parameters: CKKSParameters, packing: Packing) -> Price:
    """The cheapest of all levels of queries and values."""
    session, found = CountingSession(parameters, packing), []
    for value in range(1, 5):
        for query in range(attention.SCORE_DEPTH, session.top + 1):
            with suppress(LevelError, ScaleMismatchError):
                found.append(_price_at(operator, session, AttentionLevels(query, value)))
    return min(found, key=lambda price: price.total)


def _price_at(operator: Operator, session: CountingSession, levels: AttentionLevels) -> Price:
    session.backend.reset()
    operator.run(session, tuple(Operand(session, session.packing.features, session.backend.fresh(session.top)) for _ in range(3)), levels)
    refreshes = tuple(count for _, count in session.backend.refreshes)
    return Price(levels, dict(session.backend.seconds), refreshes, session.backend.log.operations())


class _LocalRefresh:
    """Refreshes with the secret key, and knows how long that took."""

    lanes = 1

    def __init__(self, secret: Any) -> None:
        self._secret = secret
        self.count, self.seconds, self.cpu_seconds = 0, 0.0, 0.0

    def refresh(self, backend: HEBackend, ct: Ciphertext, level: int, iterations: int = 1) -> Ciphertext:
        start, cpu = time.perf_counter(), time.process_time()
        fresh = backend.encrypt(backend.decrypt(ct, self._secret), self._secret)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu
        self.count += ct.count
        return fresh


def measure(tokens: int, rounds: int, backend_name: str = "native", parameters: CKKSParameters | None = None, announce: Announce = lambda text: None):
    """A row per operator: {"operator", "tokens", "sequences", "head_dim", "parameters", "seconds" (of one ciphertext, median, refreshes not
    counted), "cpu_seconds" (of all threads, likewise), "runs", "refreshed" ciphertexts, "max_error" beside the exact operator, "seconds_per_head",
    "ratio" to power softmax, in CPU seconds, which other programs disturb less}. Rounds go through all operators in turn."""
    parameters = parameters or parameter_set(MEASURED)
    packing = Packing.fit(parameters.slots, HEAD_DIM, tokens)
    query, key, value = sample(packing)
    backend = get_backend(backend_name, parameters)
    secret = backend.generate_secret_key()
    announce(f"{tokens} tokens: keys")
    steps = attention.rotations(packing, 1) | power_softmax.rotations(packing, 1) | softmax.rotations(packing, 1)
    backend.load_evaluation_keys(backend.generate_evaluation_keys(secret, steps))
    encrypted = [backend.encrypt(pack_embeddings(x.squeeze(1).numpy(), packing), secret) for x in (query, key, value)]
    chosen = [(operator, price(operator, parameters, packing).levels) for operator in operators(query, key, value)]
    seconds: dict[str, list[tuple[float, float]]] = {operator.name: [] for operator, _ in chosen}
    rows = {}
    for turn in range(rounds + 1):
        for operator, levels in chosen:
            announce(f"{tokens} tokens: {operator.name}, {'compiling' if turn == 0 else f'round {turn} of {rounds}'}")
            refresh = _LocalRefresh(secret)
            context = OperationContext(backend, packing, refresh) if turn == 0 else rows[operator.name]["context"]
            context.refresh = refresh
            start, cpu = time.perf_counter(), time.process_time()
            out = operator.run(context, tuple(Operand(context, HEAD_DIM, ct) for ct in encrypted), levels)
            if turn:
                spent = time.perf_counter() - start - refresh.seconds, time.process_time() - cpu - refresh.cpu_seconds
                seconds[operator.name].append(spent)
            found = unpack_state(backend.decrypt(out, secret), packing, HEAD_DIM)
            error = float(np.abs(found - operator.exact.numpy()).max())
            rows[operator.name] = {"context": context, "refreshed": refresh.count, "max_error": error}
    medians = {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in seconds.items()}
    return [
        {
            "operator": name,
            "tokens": tokens,
            "sequences": packing.sequences,
            "head_dim": HEAD_DIM,
            "parameters": f"2^{parameters.ring_degree.bit_length() - 1} x {len(parameters.moduli)}",
            "seconds": medians[name][0],
            "cpu_seconds": medians[name][1],
            "runs": rounds,
            "refreshed": rows[name]["refreshed"],
            "max_error": rows[name]["max_error"],
            "seconds_per_head": medians[name][0] / packing.sequences,
            "ratio": medians[name][1] / medians[NAMES[0]][1],
        }
        for name in NAMES
    ]


def priced(tokens: int, announce: Announce = lambda text: None) -> list[dict[str, Any]]:
    """A row per operator at parameters that bootstrap, heads narrower where 64 features of all tokens do not fit: {"operator", "tokens", "sequences",
    "head_dim", "parameters", "seconds" (of one core, bootstraps included), "seconds_without_refreshes", "refreshed" ciphertexts, "operations",
    "ratio" to power softmax, with refreshes, "levels"}.

    The whole operator at the levels that cost least pays for a deep function with products at higher levels. "function_seconds" is what lies between
    scores and weights, with its "function_refreshed" ciphertexts, where queries and keys have FUNCTION_QUERY_LEVEL levels. That is what the times of
    Zimerman et al. suggest theirs to be: 64 times the scores take their power softmax 3.2 times as long, products alone would take 8 times or more.
    "function_ratio": to that of the power softmax."""
    parameters = parameter_set(PRICED)
    packing = Packing.fit(parameters.slots, min(HEAD_DIM, parameters.slots // tokens), tokens)
    session, found, functions = CountingSession(parameters, packing), {}, {}
    for operator in operators(*sample(packing)):
        announce(f"{tokens} tokens: {operator.name}, priced")
        one = found[operator.name] = price(operator, parameters, packing)
        functions[operator.name] = _price_at(operator, session, AttentionLevels(FUNCTION_QUERY_LEVEL, one.levels.value))
    return [
        {
            "operator": name,
            "tokens": tokens,
            "sequences": packing.sequences,
            "head_dim": packing.features,
            "parameters": PRICED,
            "seconds": one.total,
            "seconds_without_refreshes": one.total - one.seconds.get("refresh", 0.0),
            "refreshed": sum(one.refreshes),
            "operations": one.operations,
            "ratio": one.total / found[NAMES[0]].total,
            "levels": {"query": one.levels.query, "value": one.levels.value},
            "function_seconds": functions[name].function,
            "function_refreshed": sum(functions[name].refreshes),
            "function_ratio": functions[name].function / functions[NAMES[0]].function,
        }
        for name, one in found.items()
    ]


def paper_ratios(tokens: Sequence[int]) -> list[dict[str, Any]]:
    """{"operator", "tokens", "seconds", "ratio" to power softmax} as printed, for the lengths that were."""
    return [
        {"operator": name, "tokens": count, "seconds": seconds, "ratio": seconds / PAPER[count]["power softmax"]}
        for count in tokens
        if count in PAPER
        for name, seconds in PAPER[count].items()
    ]
