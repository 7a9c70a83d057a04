"""Compile every kernel once. numba caches the machine code on disk, so that this takes time in the first process of an installation only."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from hf_he.ckks.context import context_for
from hf_he.ckks.evaluator import Evaluator
from hf_he.ckks.keys import PublicKey, SecretKey, SwitchingKeys, residues_fit
from hf_he.ckks.parameters import parameter_set


def compile_kernels(progress: Callable[[int, int], None] | None = None) -> float:
    """Run every kernel once on throw-away keys of the smallest parameter set; returns the seconds it took. `progress` gets (done, total)."""
    start = time.perf_counter()
    parameters = parameter_set("n13")
    context = context_for(parameters)
    evaluator, level, scale = Evaluator(context), parameters.max_level, parameters.scale_at(parameters.max_level)
    values = np.linspace(-1, 1, 2 * parameters.slots).reshape(2, -1)
    made: dict = {}

    def keys() -> None:
        made["secret"] = SecretKey.generate(context)
        made["public"] = PublicKey.generate(context, made["secret"])
        made["keys"] = SwitchingKeys.generate(context, made["secret"], {context.galois_element(1): context.limbs})
        residues_fit(context, made["keys"].halves[0][0], context.limbs)

    def encryption() -> None:
        made["ct"] = evaluator.encrypt(values, made["secret"], level, scale)[0]
        evaluator.encrypt(values, made["public"], level, scale)
        evaluator.decrypt(made["ct"], made["secret"], scale)

    def pointwise() -> None:
        ct = made["ct"]
        made["product"] = evaluator.multiply(ct, ct)
        evaluator.sum(evaluator.add(ct, ct))
        evaluator.multiply_integer(evaluator.add_integer(ct, 1), 3)
        made["plain"] = evaluator.encode(values[:, :8], level, scale)
        evaluator.multiply_plain(evaluator.add_plain(ct, made["plain"]), made["plain"])

    steps = [
        keys,
        encryption,
        pointwise,
        lambda: evaluator.multiply_plain_sum(made["plain"][None], made["ct"]),
        lambda: evaluator.linear_combination(np.ones((1, 2), dtype=np.int64), made["ct"]),
        lambda: evaluator.weighted_sum([made["ct"], made["ct"]], [1, 1], 1),
        lambda: evaluator.relinearize(made["product"], made["keys"]),
        lambda: evaluator.rotate(made["ct"], made["keys"], [1]),
        lambda: evaluator.sum_rotated(made["ct"], made["keys"], [1, 0]),
        lambda: evaluator.rescale(made["product"]),
    ]
    for done, step in enumerate(steps):
        if progress is not None:
            progress(done, len(steps))
        step()
    if progress is not None:
        progress(len(steps), len(steps))
    return time.perf_counter() - start
