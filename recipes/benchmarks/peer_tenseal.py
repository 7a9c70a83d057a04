"""TenSEAL (Apache 2.0) through `tenseal.sealapi`, the SEAL calls under its vectors: those have no rotation. SEAL runs on one thread."""

from importlib.metadata import version

import numpy as np
import tenseal.sealapi as seal
from worker import Operation

VERSION = version("tenseal")
NO_BOOTSTRAP = "SEAL does not bootstrap"
SPECIAL_BITS = {14: 49, 15: 50, 16: 50}
HOISTED = "SEAL does not hoist: eight rotations one after another"


def open_library(log2_degree, limbs, threads, names, shape):
    if "bootstrap" in names:
        return {}, {}, {"bootstrap": NO_BOOTSTRAP}
    if log2_degree > 15:
        raise RuntimeError("SEAL's 128-bit table ends at ring degree 2^15; at 2^16 its one-limb digits would need 0.6 GB per Galois key")
    bits = [50] + [40] * (limbs - 1) + [SPECIAL_BITS[log2_degree]]
    degree = 1 << log2_degree
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(degree)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(degree, bits))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise RuntimeError("SEAL refuses these parameters at 128-bit security")
    generator = seal.KeyGenerator(context)
    public = seal.PublicKey()
    generator.create_public_key(public)
    encoder, evaluator = seal.CKKSEncoder(context), seal.Evaluator(context)
    encryptor, decryptor = seal.Encryptor(context, public), seal.Decryptor(context, generator.secret_key())
    slots, scale = degree // 2, 2.0**40
    values = np.random.default_rng(0).uniform(-1, 1, (2, slots))

    def encrypt(row):
        plaintext, ciphertext = seal.Plaintext(), seal.Ciphertext(context)
        encoder.encode(row.tolist(), scale, plaintext)
        encryptor.encrypt(plaintext, ciphertext)
        return ciphertext

    def error(expected):
        def check(result):
            plaintext = seal.Plaintext()
            decryptor.decrypt(result[-1] if isinstance(result, list) else result, plaintext)
            return np.abs(np.array(encoder.decode_double(plaintext)) - expected).max()

        return check

    operations = {}
    if "rotate" in names:
        a, b = (encrypt(row) for row in values)
        relinearisation, galois = seal.RelinKeys(), seal.GaloisKeys()
        generator.create_relin_keys(relinearisation)
        generator.create_galois_keys([pow(3, 1, 2 * degree)], galois)

        def rotate():
            result = seal.Ciphertext(context)
            evaluator.rotate_vector(a, 1, galois, result)
            return result

        def multiply():
            result = seal.Ciphertext(context)
            evaluator.multiply(a, b, result)
            evaluator.relinearize_inplace(result, relinearisation)
            evaluator.rescale_to_next_inplace(result)
            return result

        rotated = np.roll(values[0], -1)
        operations = {
            "rotate": Operation(rotate, error(rotated), threads=1),
            "rotate_8_hoisted": Operation(lambda: [rotate() for _ in range(8)], error(rotated), threads=1, details={"note": HOISTED}),
            "multiply_relinearize_rescale": Operation(multiply, error(values[0] * values[1]), threads=1),
        }
    if "linear_per_weight" in names:
        inputs, outputs = shape
        weights = np.random.default_rng(2).integers(-(2**15), 2**15, inputs) / 2.0**15
        rows = [encrypt(values[i % 2]) for i in range(inputs)]
        level = context.first_parms_id()

        def per_weight():
            total = None
            for row, weight in zip(rows, weights, strict=True):
                plaintext, product = seal.Plaintext(), seal.Ciphertext(context)
                encoder.encode(float(weight), level, 2.0**15, plaintext)
                evaluator.multiply_plain(row, plaintext, product)
                if total is None:
                    total = product
                else:
                    evaluator.add_inplace(total, product)
            return total

        details = {"inputs": inputs, "outputs": outputs, "measured": f"one output, times {outputs}"}
        expected = weights @ values[np.arange(inputs) % 2]
        operations["linear_per_weight"] = Operation(per_weight, error(expected), times=outputs, threads=1, details=details)
    described = {
        "log2_qp": sum(bits),
        "secure": True,
        "key_switching": f"{limbs} digits of one limb, special modulus of {bits[-1]} bits",
    }
    return described, operations, {"ntt": "not in the Python API", "linear_combination": "no such call", "linear_weighted_sum": "no such call"}
