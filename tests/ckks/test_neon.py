"""NEON from the same source: every kernel that Python calls, cross-compiled for aarch64, and run by an emulator where there is one.

Two threads' shares of a kernel run one after another there; results are compared bit for bit with what this machine's kernel left in the same arrays,
which the other tests compare with integers.
"""

import re
from functools import cache

import numba
import numpy as np
import pytest
from aarch64 import CrossKernel, emulator
from ckks_reference import random_residues, toy
from kernel_list import KERNELS, substitute

from hf_he.ckks import encryption, keys
from hf_he.ckks.jit import KERNEL_LOCK


def copied(value):
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple):
        items = [copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def arrays_of(value):
    if isinstance(value, np.ndarray):
        return [value]
    return [a for item in value for a in arrays_of(item)] if isinstance(value, tuple) else []


class Recorder:
    """Stands for a kernel: keeps the first call's arguments, and copies of all arrays before and after it."""

    def __init__(self, kernel, memory):
        self.kernel, self.memory, self.before, self.after = kernel, memory, None, None

    def __call__(self, *arguments):
        if self.before is not None:
            return self.kernel(*arguments)
        self.signature = tuple(numba.typeof(a) for a in arguments)
        self.before = copied(arguments)
        self.placed = {m.ctypes.data: m.copy() for m in self.memory}
        result = self.kernel(*arguments)
        self.after = [a.copy() for a in (*arrays_of(arguments), *self.memory)]
        return result


def operations(memory):
    """One call or more of every kernel, on small keys."""
    engine = toy()
    evaluator, context, galois = engine.evaluator, engine.context, engine.keys
    residues = np.stack([random_residues(np.random.default_rng(j), context.chain, context.ring_degree) for j in range(2)])
    packed = np.zeros(2 * context.ring_degree * int(context.switch.widths.sum()), dtype=np.uint8)
    memory += [packed, *(half for halves in galois.halves for half in halves)]
    with KERNEL_LOCK:
        keys._pack(residues, packed.ctypes.data, context.switch.widths)
        keys._largest(packed.ctypes.data, context.switch.widths, 2 * context.ring_degree, np.zeros((len(context.chain), 8)))
    values = np.random.default_rng(0).uniform(-1, 1, (3, engine.parameters.slots))
    ct = engine.encrypt(values)
    evaluator.encrypt(values, engine.public, engine.top, engine.parameters.scale_at(engine.top))
    engine.decrypt(ct)
    evaluator.rotate(ct, galois, [1, 2])
    product = evaluator.multiply(ct, ct)
    evaluator.relinearize(product, galois)
    evaluator.rescale(ct)
    evaluator.sum(evaluator.add(ct, ct))
    evaluator.add_integer(evaluator.multiply_integer(ct, 3), 1)
    evaluator.weighted_sum([ct, ct], [3, 5], 7)
    plain = evaluator.encode(values[:, :8], engine.top, 2.0**40)
    evaluator.multiply_plain(ct, plain)
    evaluator.multiply_plain_sum(plain[None], ct)
    evaluator.linear_combination(np.ones((2, 3), dtype=np.int64), ct)
    evaluator.sum_rotated(ct, galois, [1, 0, 2])
    type(galois).generate(context, engine.secret, {})
    rows = random_residues(np.random.default_rng(1), context.chain[:3], context.ring_degree)[None]
    encryption.mixed_radix(rows, np.empty_like(rows), np.ones((3, 3)), context.tables.moduli)


@pytest.fixture(scope="module")
def calls():
    """Recorded calls by the names of KERNELS. Everything is compiled before a kernel is replaced: compilation looks kernels up by name."""
    operations([])
    memory = []
    recorders = {name: Recorder(kernel, memory) for name, kernel in KERNELS.items()}
    with pytest.MonkeyPatch.context() as patch:
        substitute(patch, recorders)
        operations(memory)
    return recorders


@cache
def compiled(kernel, signature):
    return CrossKernel(kernel, signature)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_vectors_of_neon(name, calls):
    """Products are fused multiply-adds on pairs of doubles; none falls back to scalars or to a library call."""
    assembly = compiled(KERNELS[name], calls[name].signature).assembly()
    assert not re.search(r"\b(fn?m(?:add|sub)\t[sd]\d|bl\tfmaf?\b)", assembly)
    if not name.startswith("random."):
        assert re.search(r"\b(fml[as]|fmul|fmaxnm|fcvtzs)\tv\d+\.2d", assembly)


@pytest.mark.skipif(emulator() is None, reason="qemu-aarch64 is not on the path (Debian: qemu-user-static): NEON code is compiled, not run")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_the_same_bits(name, calls):
    call = calls[name]
    results = compiled(KERNELS[name], call.signature).run(call.before, call.placed)
    assert len(results) == len(call.after)
    for got, expected in zip(results, call.after, strict=True):
        assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes()
