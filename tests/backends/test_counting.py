"""The counting backends charge what is computed: one operation for each entry of the broadcast batch."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from hf_he.backends.counting import CountingBackend
from hf_he.bench.pricing import PricedBackend
from hf_he.ckks.parameters import CKKSParameters

LEVEL = 2
SHAPES = mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=5)

pytestmark = pytest.mark.filterwarnings("ignore:CKKS parameters with N")


@cache
def parameters():
    return CKKSParameters.from_bits(10, first_bits=50, scale_bits=40, levels=3, special_bits=50, special_count=2, insecure=True)


def entries(*shapes):
    """Counted one by one."""
    return sum(1 for _ in np.broadcast(*(np.empty(shape) for shape in shapes)))


def ciphertext(backend, shape, components=2):
    return replace(backend.fresh(LEVEL), batch_shape=shape, components=components)


def units(backend):
    return {name: count for (name, level), count in backend.take_units().items() if name != "encode"}


@given(SHAPES.map(lambda found: found.input_shapes), st.sampled_from([(2, 2), (2, 3), (3, 2)]))
def test_operations_on_two_batches_count_the_entries_of_both_together(shapes, components):
    backend, size = PricedBackend(parameters()), entries(*shapes)
    a, b = (ciphertext(backend, shape) for shape in shapes)
    product = backend.multiply(a, b)
    assert product.count == size and units(backend) == {"multiply": size}
    x, y = (ciphertext(backend, *operand) for operand in zip(shapes, components, strict=True))
    for add in (backend.add, backend.subtract):
        assert add(x, y).components == max(components) and units(backend) == {"add component": size * max(components)}
    for period, name in ((4, "multiply_plain"), (parameters().slots, "full-slot multiply_plain")):
        plain = backend.encode(np.ones((*shapes[1], period)), LEVEL)
        backend.multiply_plain(a, plain)
        assert units(backend) == {name: size}
        backend.add_plain(x, plain)
        assert units(backend) == {"add component": size * components[0]}


@given(SHAPES.map(lambda found: found.input_shapes))
def test_their_seconds_are_those_of_operands_already_broadcast(shapes):
    backend, whole = CountingBackend(parameters()), np.broadcast_shapes(*shapes)

    def seconds(operation, left, right, components):
        backend.reset()
        a = ciphertext(backend, left, components)
        operation(a, backend.encode(np.ones((*right, 4)), LEVEL) if operation in plain else ciphertext(backend, right))
        return backend.total_seconds

    plain = (backend.multiply_plain, backend.add_plain)
    for operation in (backend.multiply, backend.add, backend.subtract, *plain):
        for components in (2,) if operation == backend.multiply else (2, 3):
            assert seconds(operation, *shapes, components) == pytest.approx(seconds(operation, whole, whole, components))
            assert seconds(operation, whole, whole, components) > 0


@pytest.mark.parametrize(("left", "right", "expected"), [((4, 1), (1, 5), 20), ((1,), (8,), 8), ((3, 1), (2, 1, 4), 24)])
def test_outer_products(left, right, expected):
    backend = PricedBackend(parameters())
    backend.multiply(ciphertext(backend, left), ciphertext(backend, right))
    backend.multiply_plain(ciphertext(backend, left), backend.encode(np.ones((*right, 4)), LEVEL))
    assert units(backend) == {"multiply": expected, "multiply_plain": expected}
