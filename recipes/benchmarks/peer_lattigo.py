"""Lattigo 6 (Apache 2.0, Go): the shared library in the `orion-fhe` wheel, called directly; the rest of Orion is not imported."""

import ctypes
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from worker import Operation

VERSION = f"6.2.0 (orion-fhe {version('orion-fhe')})"
NO_BOOTSTRAP = "not measured: about 60 rotation keys of 207 MB at N = 2^16 (estimated) exceed the 6 GB this benchmark allows itself"
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
SPECIAL = {14: (49, 2), 15: (50, 4), 16: (50, 8)}


class FloatArray(ctypes.Structure):
    _fields_ = [("data", ctypes.POINTER(ctypes.c_float)), ("length", ctypes.c_ulong)]


def load():
    folder = Path(find_spec("orion").submodule_search_locations[0]) / "backend" / "lattigo"
    library = ctypes.CDLL(str(folder / "lattigo-linux.so"))
    library.Decode.restype = FloatArray
    library.FreeCArray.argtypes = [ctypes.c_void_p]
    library.Encode.argtypes = [ctypes.POINTER(ctypes.c_float), ctypes.c_int, ctypes.c_int, ctypes.c_ulong]
    return library


def integers(values):
    return (ctypes.c_int * len(values))(*values), len(values)


def open_library(log2_degree, limbs, threads, names, shape):
    if "bootstrap" in names:
        return {}, {}, {"bootstrap": NO_BOOTSTRAP}
    lattigo = load()
    degree, (bits, count) = 1 << log2_degree, SPECIAL[log2_degree]
    weight = 2 * degree // 3
    lattigo.NewScheme(log2_degree, *integers([50] + [40] * (limbs - 1)), *integers([bits] * count), 40, weight, b"standard", b"", b"none")
    for step in ("NewKeyGenerator", "GenerateSecretKey", "GeneratePublicKey", "GenerateRelinearizationKey", "GenerateEvaluationKeys"):
        getattr(lattigo, step)()
    for part in ("NewEncoder", "NewEncryptor", "NewDecryptor", "NewEvaluator"):
        getattr(lattigo, part)()
    slots = degree // 2
    values = np.random.default_rng(0).uniform(-1, 1, (2, slots))

    def encrypt(row):
        plaintext = lattigo.Encode((ctypes.c_float * slots)(*row), slots, limbs - 1, 1 << 40)
        ciphertext = lattigo.Encrypt(plaintext)
        lattigo.DeletePlaintext(plaintext)
        return ciphertext

    def decrypt(ciphertext):
        plaintext = lattigo.Decrypt(ciphertext)
        array = lattigo.Decode(plaintext)
        lattigo.DeletePlaintext(plaintext)
        decoded = np.ctypeslib.as_array(array.data, (array.length,)).astype(np.float64)
        lattigo.FreeCArray(array.data)
        return decoded

    def error(expected):
        return lambda result: np.abs(decrypt(result[-1] if isinstance(result, list) else result) - expected).max()

    def free(result):
        for ciphertext in result if isinstance(result, list) else [result]:
            lattigo.DeleteCiphertext(ciphertext)

    operations = {}
    if "rotate" in names:
        a, b = (encrypt(row) for row in values)

        def multiply():
            product = lattigo.MulRelinCiphertextNew(a, b)
            return lattigo.Rescale(product)

        operations = {
            "rotate": Operation(lambda: lattigo.RotateNew(a, 1), error(np.roll(values[0], -1)), free, threads=1),
            "rotate_8_hoisted": Operation(
                lambda: [lattigo.RotateNew(a, step) for step in STEPS],
                error(np.roll(values[0], -STEPS[-1])),
                free,
                threads=1,
                details={"note": "the wheel exports no hoisted rotation: eight one after another"},
            ),
            "multiply_relinearize_rescale": Operation(multiply, error(values[0] * values[1]), free, threads=1),
        }
    if "linear_per_weight" in names:
        inputs, outputs = shape
        weights = np.random.default_rng(2).integers(-(2**15), 2**15, inputs)
        rows = [encrypt(values[i % 2]) for i in range(inputs)]
        expected = weights @ values[np.arange(inputs) % 2]

        def per_weight():
            total = lattigo.MulScalarIntNew(rows[0], int(weights[0]))
            for row, factor in zip(rows[1:], weights[1:].tolist(), strict=True):
                product = lattigo.MulScalarIntNew(row, factor)
                lattigo.AddCiphertext(total, product)
                lattigo.DeleteCiphertext(product)
            return total

        def relative(result):
            return error(expected)(result) / 2.0**15

        details = {"inputs": inputs, "outputs": outputs, "measured": f"one output, times {outputs}"}
        operations["linear_per_weight"] = Operation(per_weight, relative, free, times=outputs, threads=1, details=details)
    described = {
        "log2_qp": 50 + 40 * (limbs - 1) + bits * count,
        "secure": True,
        "key_switching": f"{-(-limbs // count)} digits of {count} limbs, special moduli of {count} x {bits} bits, secret of Hamming weight 2N/3",
    }
    missing = "not exported by the wheel's library"
    return described, operations, {"ntt": missing, "linear_combination": missing, "linear_weighted_sum": missing}
