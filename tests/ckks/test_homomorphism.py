"""Encrypted circuits compute what numpy computes: random circuits at toy size, the main operations at n14."""

import numpy as np
import pytest
from ckks_reference import STEPS, Toy, toy
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.ckks.parameters import parameter_set

OPERATIONS = ("add", "subtract", "negate", "rotate", "conjugate", "multiply", "square", "plain", "scalar", "sum_rotated")


def apply(engine, name, ct, values, generator):
    """One random operation on (ciphertext, plain values), ending at the canonical scale."""
    evaluator, p, level = engine.evaluator, engine.parameters, ct.shape[-2] - 1
    slots, scale = p.slots, p.scale_at(level)
    other = generator.uniform(-1, 1, slots)
    step = int(generator.choice(STEPS))
    if name in ("add", "subtract"):
        sign = 1.0 if name == "add" else -1.0
        return evaluator.add(ct, engine.encrypt(other, level), sign), values + sign * other
    if name == "negate":
        return evaluator.negate(ct), -values
    if name == "rotate":
        return evaluator.rotate(ct, engine.keys, [step])[0], np.roll(values, -step)
    if name == "conjugate":
        return evaluator.conjugate(ct, engine.keys), values
    if name == "sum_rotated":
        pair = np.stack([ct, engine.encrypt(other, level)])
        return evaluator.sum_rotated(pair, engine.keys, [step, 0]), np.roll(values, -step) + other
    if name == "multiply":
        product = evaluator.multiply(ct, engine.encrypt(other, level))
        return evaluator.rescale(evaluator.relinearize(product, engine.keys)), values * other
    if name == "square":
        return evaluator.relinearize(evaluator.rescale(evaluator.multiply(ct, ct)), engine.keys), values * values
    if name == "plain":
        period = 1 << int(generator.integers(0, slots.bit_length()))
        plain = evaluator.encode(other[:period], level, scale)
        return evaluator.rescale(evaluator.multiply_plain(ct, plain)), values * np.tile(other[:period], slots // period)
    return evaluator.rescale(evaluator.multiply_integer(ct, round(0.75 * scale))), 0.75 * values


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_random_circuits(names, seed):
    engine, generator = toy(), np.random.default_rng(seed)
    values = generator.uniform(-1, 1, engine.parameters.slots)
    ct = engine.encrypt(values)
    for name in names:
        if ct.shape[-2] == 1 and name in ("multiply", "square", "plain", "scalar"):
            continue
        ct, values = apply(engine, name, ct, values, generator)
        if np.abs(values).max() > 4 and ct.shape[-2] > 1:
            scale = engine.parameters.scale_at(ct.shape[-2] - 1)
            ct, values = engine.evaluator.rescale(engine.evaluator.multiply_integer(ct, round(scale / 16))), values / 16
    assert np.allclose(engine.decrypt(ct), values, atol=1e-5 * max(1.0, np.abs(values).max()))


def test_encryption_hides_equal_messages():
    engine = toy()
    a, b = engine.encrypt(np.ones(engine.parameters.slots)), engine.encrypt(np.ones(engine.parameters.slots))
    assert not np.array_equal(a[1], b[1]) and (a[0] != b[0]).mean() > 0.99


def test_wrong_secret_decrypts_to_noise():
    engine, other = toy(), Toy(toy().parameters)
    ct = engine.encrypt(np.zeros(engine.parameters.slots))
    assert np.abs(other.decrypt(ct)).max() > 1


def test_large_values_and_scales_decrypt():
    engine = toy()
    values = np.random.default_rng(0).uniform(-1, 1, engine.parameters.slots) * 2.0**30
    assert np.allclose(engine.decrypt(engine.encrypt(values)) / 2.0**30, values / 2.0**30, atol=1e-12)


@pytest.fixture(scope="module")
def n14():
    return Toy(parameter_set("n14"))


def test_n14(n14):
    generator = np.random.default_rng(1)
    values = generator.uniform(-1, 1, (2, n14.parameters.slots))
    ct = n14.encrypt(values)
    evaluator, keys = n14.evaluator, n14.keys
    product = evaluator.rescale(evaluator.relinearize(evaluator.multiply(ct[0], ct[1]), keys))
    assert np.allclose(n14.decrypt(product), values[0] * values[1], atol=1e-6)
    rotated = evaluator.rotate(ct, keys, STEPS)
    for i, s in enumerate(STEPS):
        assert np.allclose(n14.decrypt(rotated[i]), np.roll(values, -s, axis=-1), atol=1e-6)
    diagonals = generator.uniform(-1, 1, (2, len(STEPS), 128))
    plain = evaluator.encode(diagonals, n14.top, n14.parameters.scale_at(n14.top))
    sums = evaluator.rescale(evaluator.multiply_plain_sum(plain, rotated))
    wanted = np.einsum("gks,kbs->gbs", np.tile(diagonals, 64), np.stack([np.roll(values, -s, axis=-1) for s in STEPS]))
    assert np.allclose(n14.decrypt(sums), wanted, atol=1e-6)
    giant = evaluator.sum_rotated(sums, keys, (0, 100))
    assert np.allclose(n14.decrypt(giant), wanted[0] + np.roll(wanted[1], -100, axis=-1), atol=1e-6)


def test_noise_of_fresh_ciphertexts_at_n14(n14):
    """Secret-key encryption adds a Gaussian of 3.19 per coefficient, hence 3.19*sqrt(N/2) per slot, plus rounding."""
    errors = n14.decrypt(n14.encrypt(np.zeros((4, n14.parameters.slots)))) * 2.0**40
    predicted = 3.19 * np.sqrt(n14.context.ring_degree / 2)
    assert 0.9 < errors.std() / predicted < 1.1
