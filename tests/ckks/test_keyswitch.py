"""ModUp, key switching, ModDown and rescaling against big integers, at every level and digit shape."""

import math

import numpy as np
import pytest
from ckks_reference import Toy, apply_automorphism, compose, random_residues, toy, toy_parameters

from hf_he.ckks import keyswitch, ntt
from hf_he.ckks.jit import KERNEL_LOCK

NOISE = 2**24


def random_row(engine, limbs, seed):
    return random_residues(np.random.default_rng(seed), engine.context.chain[:limbs], engine.context.ring_degree)


def exact_phase(engine, c0, c1, secret):
    """Centred integer coefficients of c0 + c1*s modulo the ciphertext modulus, from exact pointwise integers."""
    limbs = c0.shape[0]
    rows = np.empty_like(c0)
    for k in range(limbs):
        q = engine.context.chain[k]
        exact = [(int(a) + int(b) * int(s)) % q for a, b, s in zip(c0[k], c1[k], secret[k], strict=True)]
        rows[k] = [v - q if v > q // 2 else v for v in exact]
    return np.array(engine.coefficients(rows, limbs), dtype=object)


@pytest.mark.parametrize("special_count", [1, 2, 3])
@pytest.mark.parametrize("limbs", [1, 2, 4, 5])
def test_mod_up_is_the_centred_lift(special_count, limbs):
    engine = toy(levels=4, special_count=special_count)
    context, alpha = engine.context, special_count
    offset = context.limbs - limbs
    source = random_row(engine, limbs, limbs)
    with KERNEL_LOCK:
        keyswitch.mod_up(source, alpha, offset, context.tables, context.switch, context.scratch, context.threads)
    plain = context.inverse(source, np.arange(limbs))
    rows = limbs + special_count
    for j in range(-(-limbs // alpha)):
        digit = range(j * alpha, min((j + 1) * alpha, limbs))
        lifted = compose(plain[digit.start : digit.stop], [context.chain[i] for i in digit])
        for r in set(range(rows)) - set(digit):
            k = r if r < limbs else r + offset
            modulus = context.chain[k]
            row = np.empty(context.ring_degree)
            ntt.forward_rest(context.scratch.extended[j * rows + r], row, context.tables, k, True)
            row = context.inverse(row[None], np.array([k]))[0]
            assert all((int(x) - v) % modulus == 0 for x, v in zip(row, lifted, strict=True))


@pytest.mark.parametrize("special_count", [1, 2, 3, 8])
@pytest.mark.parametrize("limbs", [2, 3, 4, 5])
def test_relinearisation_and_rescaling_in_one_division(special_count, limbs):
    """The phase c0 + c1 s + c2 s^2 over the last modulus, up to the noise of a division: no larger than with two divisions."""
    engine = toy(levels=4, special_count=special_count)
    context = engine.context
    ct = np.stack([random_row(engine, limbs, seed) for seed in (1, 2, 3)])
    square = np.empty_like(engine.secret._rows)
    for k, q in enumerate(context.chain):
        square[k] = [(int(s) * int(s) + q // 2) % q - q // 2 for s in engine.secret._rows[k]]
    total = math.prod(context.chain[:limbs])
    first = exact_phase(engine, ct[0], ct[1], engine.secret._rows) + exact_phase(engine, np.zeros_like(ct[2]), ct[2], square)
    first = (first + total // 2) % total - total // 2
    merged = engine.evaluator.relinearize_rescale(ct[None], engine.keys)
    assert merged.shape == (1, 2, limbs - 1, context.ring_degree) and (np.abs(merged) <= 0.6 * context.tables.moduli[: limbs - 1, :1]).all()
    errors = []
    for out in (merged[0], engine.evaluator.rescale(engine.evaluator.relinearize(ct, engine.keys))):
        found = exact_phase(engine, out[0], out[1], engine.secret._rows)
        last, kept = context.chain[limbs - 1], total // context.chain[limbs - 1]
        errors.append(max(abs((f * last - w + total // 2) % total - total // 2) / last for f, w in zip(found, first, strict=True)))
        assert errors[-1] < min(NOISE, kept / 2)
    assert errors[0] < 2 * errors[1] + 8


@pytest.mark.parametrize("special_count", [1, 2, 3])
@pytest.mark.parametrize("limbs", [1, 2, 3, 5])
def test_relinearisation_is_exact_up_to_noise(special_count, limbs):
    engine = toy(levels=4, special_count=special_count)
    ct = np.zeros((3, limbs, engine.context.ring_degree))
    ct[2] = random_row(engine, limbs, 7)
    out = engine.evaluator.relinearize(ct, engine.keys)
    secret = engine.secret._rows
    square = np.array([[int(s) * int(s) % q for s in row] for row, q in zip(secret, engine.context.chain, strict=True)], dtype=object)
    wanted = exact_phase(engine, np.zeros_like(ct[0]), ct[2], square)
    got = exact_phase(engine, out[0], out[1], secret)
    modulus = math.prod(engine.context.chain[:limbs])
    difference = [(g - w + modulus // 2) % modulus - modulus // 2 for g, w in zip(got, wanted, strict=True)]
    assert max(map(abs, difference)) < NOISE


@pytest.mark.parametrize("step", [1, 5, 100])
@pytest.mark.parametrize("limbs", [1, 4])
def test_rotation_is_the_automorphism_up_to_noise(step, limbs):
    engine = toy()
    ct = np.stack([random_row(engine, limbs, 1), random_row(engine, limbs, 2)])
    secret, modulus = engine.secret._rows, math.prod(engine.context.chain[:limbs])
    wanted = apply_automorphism(exact_phase(engine, ct[0], ct[1], secret), engine.context.galois_element(step))
    for out in (engine.evaluator.rotate(ct, engine.keys, [step])[0], engine.evaluator.sum_rotated(ct[None], engine.keys, [step])):
        got = exact_phase(engine, out[0], out[1], secret)
        difference = [(g - w + modulus // 2) % modulus - modulus // 2 for g, w in zip(got, wanted, strict=True)]
        assert max(map(abs, difference)) < NOISE


def test_sum_rotated_without_rotations_is_exact():
    engine = toy()
    ct = np.stack([np.stack([random_row(engine, 4, seed), random_row(engine, 4, seed + 50)]) for seed in range(19)])
    out = engine.evaluator.sum_rotated(ct, engine.keys, [0] * 19)
    for k in range(4):
        assert not ((out[:, k] - ct[:, :, k].sum(0)) % engine.context.chain[k]).any()


def test_long_mixed_sums_stay_in_range():
    """More terms than fit between two reductions, with and without a rotation."""
    engine = toy()
    values = np.random.default_rng(3).uniform(-1, 1, (25, engine.parameters.slots))
    steps = [0 if g % 8 == 7 else 5 for g in range(25)]
    out = engine.evaluator.sum_rotated(engine.encrypt(values), engine.keys, steps)
    assert np.allclose(engine.decrypt(out), sum(np.roll(v, -s) for v, s in zip(values, steps, strict=True)), atol=1e-6)


@pytest.mark.parametrize("limbs", [2, 3, 7])
def test_rescaling_rounds_exactly(limbs):
    engine = toy()
    row = random_row(engine, limbs, 11)
    out = engine.evaluator.rescale(row[None])[0]
    last = engine.context.chain[limbs - 1]
    before, after = engine.coefficients(row, limbs), engine.coefficients(out, limbs - 1)
    modulus = math.prod(engine.context.chain[: limbs - 1])
    for b, a in zip(before, after, strict=True):
        rounded = (b - ((b + last // 2) % last - last // 2)) // last
        assert (rounded - a) % modulus == 0


@pytest.mark.parametrize("hoisted", [1, 4, 6])
def test_hoisted_rotations_equal_single_ones(hoisted):
    engine = toy()
    values = np.random.default_rng(4).uniform(-1, 1, (2, engine.parameters.slots))
    steps = (1, 2, 3, 5, 8, 100)[:hoisted]
    ct = engine.encrypt(values)
    together = engine.evaluator.rotate(ct, engine.keys, steps)
    for i, s in enumerate(steps):
        assert np.array_equal(together[i], engine.evaluator.rotate(ct, engine.keys, [s])[0])
        assert np.allclose(engine.decrypt(together[i]), np.roll(values, -s, axis=-1), atol=1e-6)


@pytest.mark.parametrize("log2_degree", [11, 13])
def test_other_ring_degrees(log2_degree):
    engine = Toy(toy_parameters(log2_degree, levels=2, special_count=1))
    values = np.random.default_rng(5).uniform(-1, 1, engine.parameters.slots)
    assert np.allclose(engine.decrypt(engine.evaluator.rotate(engine.encrypt(values), engine.keys, [8])[0]), np.roll(values, -8), atol=1e-5)
