"""FHElium (MIT), built for the CPU; ciphertexts stay in the domain that its next operation takes (coefficients for rotations, NTT for products)."""

from importlib.metadata import version

import fhelium
import numpy as np
import torch
from fhelium.eager import Engine
from worker import Operation

VERSION = version("fhelium")
NO_BOOTSTRAP = "not repeated: its example at N = 2^16 took 357 s and 17.5 GB with 9 minutes of key generation when run alone"
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
SPECIAL = {14: (49, 2), 15: (50, 4), 16: (50, 8)}


def is_prime(n):
    d, s = n - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, d, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(s - 1)):
            return False
    return True


def primes(bits, degree, count, taken):
    found, candidate = [], (1 << bits) + 1
    while len(found) < count:
        candidate -= 2 * degree
        if candidate not in taken and is_prime(candidate):
            found.append(candidate)
    return found


def open_library(log2_degree, limbs, threads, names, shape):
    if "bootstrap" in names:
        return {}, {}, {"bootstrap": NO_BOOTSTRAP}
    torch.set_num_threads(threads)
    degree = 1 << log2_degree
    bits, count = SPECIAL[log2_degree]
    scaling = primes(40, degree, limbs - 1, ())
    first = primes(50, degree, 1, ())
    special = primes(bits, degree, count, first)
    config = fhelium.CkksConfig(default_scale=2.0**40, q_depth_groups=tuple((q,) for q in (*scaling, *first)), p_moduli=tuple(special), logN=log2_degree)
    engine = Engine(config)
    values = np.random.default_rng(0).uniform(-1, 1, (2, degree // 2))

    def encrypt(row):
        return engine.encrypt_message(torch.from_numpy(row))

    def error(expected):
        def check(result):
            last = result[-1] if isinstance(result, list) else result
            if last.polynomial_domain == "ntt":
                last = engine.ntt_domain_to_coefficient_domain(last)
            return np.abs(engine.decrypt_message(last, is_real=True).numpy()[: degree // 2] - expected).max()

        return check

    operations = {}
    if "rotate" in names:
        a, b = (encrypt(row) for row in values)
        a_ntt, b_ntt = engine.coefficient_domain_to_ntt_domain(a), engine.coefficient_domain_to_ntt_domain(b)
        keys = [engine.rotation_key(step) for step in STEPS]
        relinearisation = engine.relinearization_key
        shift = 1 if np.abs(error(np.roll(values[0], 1))(engine.rotate_with_key(a, keys[0]))) < 0.1 else -1
        operations = {
            "rotate": Operation(lambda: engine.rotate_with_key(a, keys[0]), error(np.roll(values[0], shift))),
            "rotate_8_hoisted": Operation(lambda: engine.rotate_many_with_keys(a, keys), error(np.roll(values[0], shift * STEPS[-1]))),
            "multiply_relinearize_rescale": Operation(
                lambda: engine.rescale_to_next_depth(engine.relinearize(engine.multiply(a_ntt, b_ntt), relinearisation)), error(values[0] * values[1])
            ),
        }
    if "linear_per_weight" in names:
        operations |= linear(engine, encrypt, error, values, *shape)
    described = {
        "log2_qp": round(float(sum(np.log2(float(q)) for q in (*scaling, *first, *special))), 1),
        "secure": True,
        "key_switching": f"{engine.key_digit_count} digits, special moduli of {count} x {bits} bits",
    }
    unsupported = {
        "ntt": "timed inside operations only",
        "linear_combination": "no such call",
        "linear_weighted_sum": "its fused sums take encoded plaintexts, 1 MB per weight",
    }
    return described, operations, unsupported


def linear(engine, encrypt, error, values, inputs, outputs):
    weights = np.random.default_rng(2).integers(-(2**15), 2**15, inputs)
    rows = [encrypt(values[i % 2]) for i in range(inputs)]
    expected = weights @ values[np.arange(inputs) % 2]
    integers = weights.tolist()

    def per_weight():
        total = engine.multiply_integer_scalar(rows[0], integers[0])
        for row, weight in zip(rows[1:], integers[1:], strict=True):
            engine.add_(total, engine.multiply_integer_scalar(row, weight))
        return total

    def relative(result):
        return error(expected)(result) / 2.0**15

    details = {"inputs": inputs, "outputs": outputs, "measured": f"one output, times {outputs}"}
    return {"linear_per_weight": Operation(per_weight, relative, times=outputs, details=details)}
