"""The warm-up compiles what a session needs: afterwards nothing new is compiled."""

import numpy as np
from ckks_reference import STEPS, toy
from kernel_list import KERNELS, substitute

from hf_he.ckks import arithmetic, keyswitch, products
from hf_he.ckks.warmup import compile_kernels


def signatures():
    kernels = (
        *(arithmetic.add_rows, arithmetic.sum_rows, arithmetic.multiply_rows, arithmetic.scale_rows, arithmetic.multiply_plain_rows),
        *(products.multiply_plain_sum, products.integer_matrix, keyswitch.switch_hoisted, keyswitch.switch_sum, keyswitch.rescale_rows),
    )
    return [len(kernel.signatures) for kernel in kernels]


def test_nothing_is_compiled_after_the_warm_up():
    calls = []
    assert compile_kernels(lambda done, total: calls.append((done, total))) > 0
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1]
    before = signatures()
    engine = toy()
    ct = engine.encrypt(np.zeros((len(STEPS), engine.parameters.slots)))
    evaluator, keys = engine.evaluator, engine.keys
    rotated = evaluator.rotate(evaluator.add(ct, ct)[0], keys, STEPS)
    product = evaluator.rescale(evaluator.relinearize(evaluator.multiply(rotated, ct), keys))
    plain = evaluator.encode(np.ones((3, len(STEPS), 64)), product.shape[-2] - 1, 2.0**40)
    summed = evaluator.sum_rotated(evaluator.multiply_plain_sum(plain, product), keys, STEPS[:3])
    evaluator.linear_combination(np.ones((2, 3), dtype=np.int64), evaluator.multiply_integer(evaluator.sum(product[None]), 5)[:3])
    evaluator.multiply_plain(summed, plain[0, 0])
    assert signatures() == before == [1] * len(before)


def test_the_warm_up_runs_every_kernel(monkeypatch):
    compile_kernels()
    ran = set()

    def noted(name, kernel):
        def call(*arguments):
            ran.add(name)
            return kernel(*arguments)

        return call

    substitute(monkeypatch, {name: noted(name, kernel) for name, kernel in KERNELS.items()})
    compile_kernels()
    assert ran == set(KERNELS)
