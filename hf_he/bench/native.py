"""The native engine as a measured library (see `worker`)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

import hf_he
from hf_he.backends.native import NativeBackend
from hf_he.bench import operations as names
from hf_he.bench.transforms import forward_rows
from hf_he.bench.worker import Operation
from hf_he.ckks.parameters import MAX_LOG2_QP, CKKSParameters, parameter_set

VERSION = hf_he.__version__
WEIGHT_BITS = 16
BOOTSTRAP_PARAMETERS = "n16-bootstrap"
_SPECIAL = {14: (49, 2), 15: (50, 4), 16: (50, 8)}


def parameters_for(log2_degree: int, limbs: int) -> CKKSParameters:
    """A 50-bit modulus and 40-bit ones, special moduli as in the named sets; outside the security table for N < 2^14 (unit tests)."""
    bits, count = _SPECIAL.get(log2_degree, (50, 2))
    return CKKSParameters.from_bits(log2_degree, 50, 40, limbs - 1, bits, count, insecure=log2_degree < 14)


def open_library(
    log2_degree: int, limbs: int, threads: int, wanted: Sequence[str], shape: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Operation], dict[str, str]]:
    """The operations of `wanted` on fresh keys. Raises ParameterError for sets the engine does not have."""
    if wanted[0] in names.BOOTSTRAP_SLOTS:
        return _bootstrapping(threads, wanted[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = parameters_for(log2_degree, limbs)
    backend = _backend(parameters, threads)
    found: dict[str, Operation] = {}
    secret = backend.generate_secret_key()
    if {names.ROTATE, names.HOISTED, names.MULTIPLY} & set(wanted):
        backend.load_evaluation_keys(backend.generate_evaluation_keys(secret, names.HOISTED_STEPS))
        found |= _primitives(backend, secret)
    if names.NTT in wanted:
        found[names.NTT] = _transform(backend)
    if names.COMBINATION in wanted or names.PER_WEIGHT in wanted:
        found |= _linear(backend, secret, shape)
    unsupported = {names.WEIGHTED_SUM: "linear_combination does all outputs in one call"}
    return _describe(parameters, limbs), {name: found[name] for name in wanted if name in found}, unsupported


def _backend(parameters: CKKSParameters, threads: int) -> NativeBackend:
    backend = NativeBackend(parameters)
    if backend.context.threads != threads:
        raise RuntimeError(f"the engine runs {backend.context.threads} threads, not {threads}: set NUMBA_NUM_THREADS before it starts")
    return backend


def _describe(parameters: CKKSParameters, limbs: int) -> dict[str, Any]:
    special = parameters.special_moduli
    return {
        "log2_qp": round(parameters.log2_qp, 1),
        "limbs": limbs,
        "secure": parameters.log2_qp <= MAX_LOG2_QP.get(parameters.ring_degree, 0),
        "key_switching": f"{-(-limbs // parameters.digit_size)} digits of {parameters.digit_size} limbs, special moduli of {len(special)} x "
        f"{special[0].bit_length()} bits",
    }


def _bootstrapping(threads: int, name: str) -> tuple[dict[str, Any], dict[str, Operation], dict[str, str]]:
    """Two ciphertexts' worth of real values ride in one bootstrap; a batch of one is measured, the result checked in every slot."""
    parameters, period = parameter_set(BOOTSTRAP_PARAMETERS), names.BOOTSTRAP_SLOTS[name]
    backend = _backend(parameters, threads)
    secret = backend.generate_secret_key()
    start = time.perf_counter()
    keys = backend.generate_evaluation_keys(secret, (), bootstrapping=True, bootstrapping_slots=period)
    seconds = time.perf_counter() - start
    backend.load_evaluation_keys(keys)
    distinct = period or parameters.slots
    values = np.tile(np.random.default_rng(0).uniform(-1, 1, distinct), parameters.slots // distinct)
    exhausted = backend.encrypt(values, secret, 0)
    details = {"slots": distinct, "levels_left": parameters.max_level, "key_bytes": keys.bootstrapping.nbytes, "keygen_s": seconds}

    def check(result) -> float:
        return float(np.abs(backend.decrypt(result, secret) - values).max())

    operation = Operation(lambda: backend.bootstrap(exhausted), check, details=details)
    return _describe(parameters, len(parameters.full_moduli)), {name: operation}, {}


def _primitives(backend: NativeBackend, secret: Any) -> dict[str, Operation]:
    values = np.random.default_rng(0).uniform(-1, 1, (2, backend.parameters.slots))
    a, b = (backend.encrypt(row, secret) for row in values)

    def error(expected: np.ndarray):
        return lambda result: np.abs(backend.decrypt(result, secret) - expected).max()

    rotated = np.stack([np.roll(values[0], -step) for step in names.HOISTED_STEPS])
    return {
        names.ROTATE: Operation(lambda: backend.rotate(a, (1,)), error(rotated[:1])),
        names.HOISTED: Operation(lambda: backend.rotate(a, names.HOISTED_STEPS), error(rotated)),
        names.MULTIPLY: Operation(lambda: backend.relinearize_rescale(backend.multiply(a, b)), error(values[0] * values[1])),
    }


def _transform(backend: NativeBackend) -> Operation:
    """Forward transforms of as many different rows as there are limbs, one thread, per row."""
    context, limbs = backend.context, backend.context.limbs
    rows = np.random.default_rng(1).integers(-(2**38), 2**38, (limbs, context.ring_degree)).astype(np.float64)
    chain, out = np.arange(limbs), np.empty((limbs, context.ring_degree))

    def run() -> np.ndarray:
        forward_rows(rows, out, context.scratch.block[0], context.tables)
        return out

    def check(result: np.ndarray) -> float:
        return float(np.abs(context.inverse(result, chain) - rows).max())

    return Operation(run, check, times=1 / limbs, threads=1)


def _linear(backend: NativeBackend, secret: Any, shape: tuple[int, int]) -> dict[str, Operation]:
    """`linear_combination` with WEIGHT_BITS-bit weights, and one output of it by scalar products and additions."""
    inputs, outputs = shape
    generator = np.random.default_rng(2)
    weights = generator.integers(-(2 ** (WEIGHT_BITS - 1)), 2 ** (WEIGHT_BITS - 1), (outputs, inputs))
    values = generator.uniform(-1, 1, (8, backend.parameters.slots))
    a = backend.encrypt(values[np.arange(inputs) % 8], secret)
    rows = [backend.take(a, i) for i in range(inputs)]
    scale = 2.0 ** (WEIGHT_BITS - 1)

    def per_weight():
        total = backend.multiply_scalar(rows[0], weights[0, 0] / scale, scale)
        for row, weight in zip(rows[1:], weights[0, 1:], strict=True):
            total = backend.add(total, backend.multiply_scalar(row, weight / scale, scale))
        return total

    def check_first(result) -> float:
        expected = (weights[0] / scale) @ values[np.arange(inputs) % 8]
        return float(np.abs(backend.decrypt(result, secret) - expected).max())

    def check(result) -> float:
        expected = weights[-1] @ values[np.arange(inputs) % 8]
        return float(np.abs(backend.decrypt(backend.take(result, outputs - 1), secret) - expected).max() / scale)

    products = inputs * outputs * 2 * backend.context.limbs * backend.context.ring_degree
    details = {"inputs": inputs, "outputs": outputs, "weight_bits": WEIGHT_BITS}
    return {
        names.COMBINATION: Operation(lambda: backend.linear_combination(weights, a), check, details={**details, "modular_products": products}),
        names.PER_WEIGHT: Operation(per_weight, check_first, times=outputs, details={**details, "measured": f"one output, times {outputs}"}),
    }
