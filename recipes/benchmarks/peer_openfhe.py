"""OpenFHE's Python wheel (BSD 2-clause), threads by OpenMP."""

import math
from importlib.metadata import version

import numpy as np
import openfhe
from worker import Operation

VERSION = version("openfhe")
NO_BOOTSTRAP = "not measured: about 80 rotation keys of 126 MB at N = 2^16 (estimated) exceed the 6 GB this benchmark allows itself"
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
DIGITS = {14: (4, 8), 15: (4, 8), 16: (3, 4)}
"""Key-switching digits, ours first; the first number that OpenFHE accepts as 128-bit secure is taken."""


def make_context(log2_degree, limbs, digits):
    parameters = openfhe.CCParamsCKKSRNS()
    parameters.SetSecretKeyDist(openfhe.UNIFORM_TERNARY)
    parameters.SetSecurityLevel(openfhe.HEStd_128_classic)
    parameters.SetRingDim(1 << log2_degree)
    parameters.SetBatchSize(1 << (log2_degree - 1))
    parameters.SetMultiplicativeDepth(limbs - 1)
    parameters.SetFirstModSize(50)
    parameters.SetScalingModSize(40)
    parameters.SetScalingTechnique(openfhe.FIXEDMANUAL)
    parameters.SetKeySwitchTechnique(openfhe.HYBRID)
    parameters.SetNumLargeDigits(digits)
    context = openfhe.GenCryptoContext(parameters)
    for feature in (openfhe.PKE, openfhe.KEYSWITCH, openfhe.LEVELEDSHE, openfhe.ADVANCEDSHE):
        context.Enable(feature)
    return context


def secure_context(log2_degree, limbs):
    refused = None
    for digits in DIGITS[log2_degree]:
        try:
            return make_context(log2_degree, limbs, digits), digits
        except RuntimeError as error:
            refused = error
    raise refused


def open_library(log2_degree, limbs, threads, names, shape):
    if "bootstrap" in names:
        return {}, {}, {"bootstrap": NO_BOOTSTRAP}
    context, digits = secure_context(log2_degree, limbs)
    keys = context.KeyGen()
    slots = 1 << (log2_degree - 1)
    values = np.random.default_rng(0).uniform(-1, 1, (2, slots))

    def encrypt(row):
        return context.Encrypt(keys.publicKey, context.MakeCKKSPackedPlaintext(row.tolist()))

    def error(expected):
        def check(result):
            plaintext = context.Decrypt(result[-1] if isinstance(result, list) else result, keys.secretKey)
            plaintext.SetLength(slots)
            return np.abs(np.array(plaintext.GetRealPackedValue()) - expected).max()

        return check

    operations = {}
    if "rotate" in names:
        a, b = (encrypt(row) for row in values)
        context.EvalMultKeyGen(keys.secretKey)
        context.EvalRotateKeyGen(keys.secretKey, list(STEPS))

        def hoisted():
            digits_of = context.EvalFastRotationPrecompute(a)
            return [context.EvalFastRotation(a, step, 2 << log2_degree, digits_of) for step in STEPS]

        operations = {
            "rotate": Operation(lambda: context.EvalRotate(a, 1), error(np.roll(values[0], -1))),
            "rotate_8_hoisted": Operation(hoisted, error(np.roll(values[0], -STEPS[-1]))),
            "multiply_relinearize_rescale": Operation(lambda: context.Rescale(context.EvalMult(a, b)), error(values[0] * values[1])),
        }
    if "linear_per_weight" in names:
        operations |= linear(context, encrypt, error, values, *shape)
    size = math.ceil(math.ceil(limbs / digits) * 40 / 60 + 10 / 60)
    described = {
        "log2_qp": 50 + 40 * (limbs - 1) + 60 * size,
        "secure": True,
        "key_switching": f"HYBRID, {digits} digits, special moduli of {size} x 60 bits, HEStd_128_classic",
    }
    return described, operations, {"ntt": "not in the Python API", "linear_combination": "no such call"}


def linear(context, encrypt, error, values, inputs, outputs):
    weights = np.random.default_rng(2).integers(-(2**15), 2**15, inputs) / 2.0**15
    rows = [encrypt(values[i % 2]) for i in range(inputs)]
    expected = weights @ values[np.arange(inputs) % 2]
    details = {"inputs": inputs, "outputs": outputs, "measured": f"one output, times {outputs}"}

    def per_weight():
        total = context.EvalMult(rows[0], weights[0])
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            context.EvalAddInPlace(total, context.EvalMult(row, weight))
        return total

    as_list = weights.tolist()
    return {
        "linear_per_weight": Operation(per_weight, error(expected), times=outputs, details=details),
        "linear_weighted_sum": Operation(lambda: context.EvalLinearWSum(rows, as_list), error(expected), times=outputs, details=details),
    }
