"""DESILO FHE (closed source, non-commercial licence), mode "parallel". Its moduli cannot be chosen: instances are picked by limb count."""

import time
from importlib.metadata import version

import desilofhe
import numpy as np
from worker import Operation

VERSION = version("desilofhe")
BOOTSTRAP_GB = 15
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
FIRST_LEVELS = {14: 5, 15: 16, 16: 29}
"""Where the search for an engine begins: below the instance wanted in version 2.0.0."""


def limbs_of(ciphertext, degree):
    return ciphertext.nbytes // (ciphertext.polynomial_count * degree * 8)


def find_engine(log2_degree, limbs, threads):
    """The engine with the fewest levels whose fresh ciphertexts have at least `limbs` limbs in this ring."""
    best = None
    for level in range(FIRST_LEVELS[log2_degree], 40):
        try:
            engine = desilofhe.Engine(max_level=level, mode="parallel", thread_count=threads)
        except (RuntimeError, ValueError):
            continue
        if engine.slot_count > 1 << (log2_degree - 1):
            break
        if engine.slot_count < 1 << (log2_degree - 1):
            continue
        found = limbs_of(engine.encrypt(np.zeros(engine.slot_count), engine.create_secret_key()), 1 << log2_degree)
        best = engine, found
        if found >= limbs:
            break
    if best is None:
        raise RuntimeError(f"no engine with ring degree 2^{log2_degree}")
    return best


def available_gb():
    with open("/proc/meminfo", encoding="ascii") as facts:
        return next(int(line.split()[1]) / 1e6 for line in facts if line.startswith("MemAvailable"))


def bootstrapping(threads):
    """With the small key, which rotates by powers of two: the medium one needs still more memory."""
    if available_gb() < BOOTSTRAP_GB:
        raise RuntimeError(f"bootstrapping needs about {BOOTSTRAP_GB} GB of memory, {available_gb():.0f} GB are available")
    engine = desilofhe.Engine(mode="parallel", bootstrap=True, thread_count=threads)
    secret = engine.create_secret_key()
    start = time.perf_counter()
    keys = (
        engine.create_relinearization_key(secret),
        engine.create_conjugation_key(secret),
        engine.create_roll_key(secret),
        engine.create_small_bootstrap_key(secret),
    )
    seconds = time.perf_counter() - start
    values = np.random.default_rng(0).uniform(-1, 1, engine.slot_count)
    exhausted = engine.encrypt(values, secret, 0)
    result = engine.bootstrap(exhausted, *keys)
    details = {
        "levels_left": result.level,
        "key_bytes": sum(key.nbytes for key in keys),
        "keygen_s": seconds,
        "max_error": float(np.abs(engine.decrypt(result, secret) - values).max()),
    }
    limbs = limbs_of(engine.encrypt(values, secret), 2 * engine.slot_count)
    described = {"limbs": limbs, "secure": None, "key_switching": f"moduli not disclosed, {engine.max_level} levels, small bootstrap key"}
    return described, {"bootstrap": Operation(lambda: engine.bootstrap(exhausted, *keys), details=details)}, {}


def open_library(log2_degree, limbs, threads, names, shape):
    if "bootstrap" in names:
        return bootstrapping(threads)
    engine, found = find_engine(log2_degree, limbs, threads)
    secret = engine.create_secret_key()
    values = np.random.default_rng(0).uniform(-1, 1, (2, engine.slot_count))

    def error(expected):
        return lambda result: np.abs(engine.decrypt(result[-1] if isinstance(result, list) else result, secret) - expected).max()

    relinearisation = engine.create_relinearization_key(secret)
    operations = {}
    if "rotate" in names:
        a, b = (engine.encrypt(row, secret) for row in values)
        keys = [engine.create_fixed_rotation_key(secret, step) for step in STEPS]
        operations = {
            "rotate": Operation(lambda: engine.rotate(a, keys[0]), error(np.roll(values[0], -STEPS[0]))),
            "rotate_8_hoisted": Operation(lambda: engine.rotate_many(a, keys), error(np.roll(values[0], -STEPS[-1]))),
            "multiply_relinearize_rescale": Operation(lambda: engine.multiply(a, b, relinearisation), error(values[0] * values[1])),
        }
    if "linear_per_weight" in names:
        operations |= linear(engine, secret, error, values, *shape)
    described = {
        "limbs": found,
        "levels": engine.max_level,
        "secure": None,
        "key_switching": f"moduli not disclosed, keys of {relinearisation.nbytes / (2 * (8 << log2_degree)):.0f} pairs of residue rows",
    }
    return described, operations, {"ntt": "not in the API", "linear_combination": "no such call"}


def linear(engine, secret, error, values, inputs, outputs):
    weights = np.random.default_rng(2).integers(-(2**15), 2**15, inputs)
    rows = [engine.encrypt(values[i % 2], secret) for i in range(inputs)]
    expected = weights @ values[np.arange(inputs) % 2]
    details = {"inputs": inputs, "outputs": outputs, "measured": f"one output, times {outputs}"}
    integers = weights.tolist()
    with_constant = [0, *integers]

    def per_weight():
        total = engine.multiply(rows[0], integers[0])
        for row, weight in zip(rows[1:], integers[1:], strict=True):
            engine.add(total, engine.multiply(row, weight), total)
        return total

    def relative(result):
        return error(expected)(result) / 2.0**15

    return {
        "linear_per_weight": Operation(per_weight, relative, times=outputs, details=details),
        "linear_weighted_sum": Operation(lambda: engine.weighted_sum(rows, with_constant), relative, times=outputs, details=details),
    }
