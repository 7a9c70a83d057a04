"""Every backend computes what numpy computes, and keeps the same levels, scales and counts. Files and refusals: test_contract_errors.py."""

import numpy as np
import pytest
from party import STEPS, TOLERANCE

# ---- encryption ----


@pytest.mark.parametrize("key", ["secret", "public"])
def test_encrypt_then_decrypt(party, key):
    x = party.values(2, 3)
    ct = party.backend.encrypt(x, getattr(party, key))
    assert (ct.level, ct.scale, ct.components) == (party.parameters.max_level, party.parameters.scale_at(ct.level), 2)
    assert ct.key_id == party.secret.key_id
    party.check(ct, x)


def test_encrypt_at_every_level(party):
    x = party.values()
    for level in range(party.parameters.max_level + 1):
        ct = party.encrypt(x, level)
        assert ct.level == level and ct.scale == party.parameters.scale_at(level)
        party.check(ct, x)


def test_encryption_is_randomised(party):
    x = party.values()
    first, second = (party.backend.serialize(party.encrypt(x)) for _ in range(2))
    assert first != second


# ---- linear operations ----


def test_add_subtract_negate_sum(party):
    x, y = party.values(3), party.values(3)
    a, b, he = party.encrypt(x), party.encrypt(y), party.backend
    party.check(he.add(a, b), x + y)
    party.check(he.subtract(a, b), x - y)
    party.check(he.negate(a), -x)
    party.check(he.sum(a), x.sum(0))


def test_operands_broadcast_over_the_batch(party):
    x, y = party.values(2, 1), party.values(3)
    a, b, he = party.encrypt(x), party.encrypt(y), party.backend
    party.check(he.subtract(a, b), x - y)
    party.check(he.subtract(b, a), y - x)
    party.check(he.rescale(he.relinearize(he.multiply(a, b))), x * y)


@pytest.mark.parametrize("period", [1, 4, 64, None])
def test_periodic_plaintexts(party, period):
    x = party.values(2)
    period = period or party.parameters.slots
    w = party.generator.uniform(-1, 1, (2, period))
    full = np.tile(w, party.parameters.slots // period)
    ct, he = party.encrypt(x), party.backend
    plain = he.encode(w, ct.level)
    assert plain.period == period
    party.check(he.add_plain(ct, plain), x + full)
    party.check(he.rescale(he.multiply_plain(ct, plain)), x * full)


def test_one_plaintext_serves_a_batch(party):
    x, w = party.values(3), party.values()
    ct, he = party.encrypt(x), party.backend
    party.check(he.rescale(he.multiply_plain(ct, he.encode(w, ct.level))), x * w)
    party.check(he.add_plain(ct, he.encode(w, ct.level)), x + w)


@pytest.mark.parametrize(("batch", "plain"), [((), (1,)), ((), (2, 1)), ((1,), (3,)), ((3,), ()), ((3,), (1, 1)), ((3,), (2, 3)), ((2, 3), (3,))])
def test_plaintexts_and_ciphertexts_broadcast_both_ways(party, batch, plain):
    x, w = party.values(*batch), party.generator.uniform(-1, 1, (*plain, 4))
    full = np.tile(w, party.parameters.slots // 4)
    he, ct = party.backend, party.encrypt(x, 1)
    encoded = he.encode(w, ct.level)
    party.check(he.add_plain(ct, encoded), x + full)
    party.check(he.multiply_plain(ct, encoded), x * full)


@pytest.mark.parametrize("period", [8, None])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_multiply_plain_sum(party, period, batch):
    period = period or party.parameters.slots
    x = party.values(3, *batch)
    w = party.generator.uniform(-1, 1, (2, 3, period))
    ct, he = party.encrypt(x), party.backend
    full = np.tile(w, party.parameters.slots // period)
    party.check(he.rescale(he.multiply_plain_sum(he.encode(w, ct.level), ct)), np.einsum("gks,k...s->g...s", full, x))


def test_scalars(party):
    x = party.values(2)
    ct, he = party.encrypt(x), party.backend
    party.check(he.add_scalar(ct, -0.625), x - 0.625)
    party.check(he.rescale(he.multiply_scalar(ct, -1.75)), -1.75 * x)
    scaled = he.multiply_scalar(ct, 3.0, scale=2.0**20)
    assert scaled.scale == ct.scale * 2.0**20
    party.check(scaled, 3 * x)
    party.check(he.add_scalar(scaled, 0.5), 3 * x + 0.5)
    product = he.add_scalar(he.multiply(ct, ct), -0.25)
    party.check(he.rescale(he.relinearize(product)), x * x - 0.25)


def test_linear_combination(party):
    x = party.values(3, 2)
    w = party.generator.integers(-(2**24), 2**24, (4, 3))
    ct, he = party.encrypt(x), party.backend
    out = he.linear_combination(w, ct)
    assert out.scale == ct.scale and out.level == ct.level
    np.testing.assert_allclose(he.decrypt(out, party.secret) / 2**24, np.einsum("oi,i...s->o...s", w, x) / 2**24, atol=TOLERANCE)


# ---- products, relinearisation, rescaling ----


def test_product_of_ciphertexts(party):
    x, y = party.values(2), party.values(2)
    a, b, he = party.encrypt(x), party.encrypt(y), party.backend
    product = he.multiply(a, b)
    assert product.components == 3 and product.scale == a.scale * b.scale
    party.check(product, x * y)
    result = he.rescale(he.relinearize(product))
    assert result.components == 2 and result.level == a.level - 1
    assert result.scale == pytest.approx(party.parameters.scale_at(result.level), rel=1e-12)
    party.check(result, x * y)


def test_rescale_before_relinearize(party):
    x = party.values(2)
    ct, he = party.encrypt(x), party.backend
    party.check(he.relinearize(he.rescale(he.multiply(ct, ct))), x * x)


def test_sums_of_products_relinearise_once(party):
    x, y = party.values(4), party.values(4)
    he = party.backend
    product = he.sum(he.multiply(party.encrypt(x), party.encrypt(y)))
    party.check(he.rescale(he.relinearize(product)), (x * y).sum(0))


def test_multiply_down_the_whole_chain(party):
    x = party.values()
    ct, he, expected, error = party.encrypt(x), party.backend, x, 5e-7
    while ct.level:
        ct = he.rescale(he.relinearize(he.multiply(ct, ct)))
        expected = expected * expected
        error *= 2  # of squares near 1
        assert ct.scale == pytest.approx(party.parameters.scale_at(ct.level), rel=1e-9)
        party.check(ct, expected, max(TOLERANCE, error))


def test_drop_and_match_level(party):
    x = party.values(2)
    ct, he = party.encrypt(x), party.backend
    dropped = he.drop_level(ct, 1)
    assert (dropped.level, dropped.scale) == (1, ct.scale)
    party.check(dropped, x)
    matched = he.match_level(ct, 1)
    assert matched.level == 1 and matched.scale == pytest.approx(party.parameters.scale_at(1), rel=1e-12)
    party.check(matched, x)
    party.check(he.add(matched, party.encrypt(x, 1)), 2 * x)
    assert he.match_level(ct, ct.level) is ct


# ---- automorphisms ----


def test_rotations_are_left_and_cyclic(party):
    x = party.values(2)
    ct, he = party.encrypt(x), party.backend
    party.check(he.rotate(ct, (0, *STEPS)), np.stack([np.roll(x, -s, axis=-1) for s in (0, *STEPS)]))


@pytest.mark.parametrize("steps", [(0,), (0, 0), (1, 0), (0, 2, 1)])
def test_step_zero_is_a_copy(party, steps):
    x = party.values()
    party.check(party.backend.rotate(party.encrypt(x, 1), steps), np.stack([np.roll(x, -s) for s in steps]))


def test_rotations_below_the_top(party):
    x = party.values()
    for level in range(party.parameters.max_level):
        party.check(party.backend.rotate(party.encrypt(x, level), [2]), np.roll(x, -2)[None])


def test_sum_rotated(party):
    x = party.values(3, 2)
    expected = x[0] + np.roll(x[1], -5, axis=-1) + np.roll(x[2], 1, axis=-1)
    party.check(party.backend.sum_rotated(party.encrypt(x), (0, 5, -1)), expected)
    party.check(party.backend.sum_rotated(party.encrypt(x[:, 0]), (0, 5, -1)), expected[0])


def test_conjugate_keeps_reals(party):
    x = party.values()
    party.check(party.backend.conjugate(party.encrypt(x)), x)


def test_batch_structure(party):
    x, y = party.values(4), party.values(4)
    a, b, he = party.encrypt(x), party.encrypt(y), party.backend
    party.check(he.take(a, 2), x[2])
    party.check(he.take(a, slice(1, 3)), x[1:3])
    party.check(he.take(a, np.int64(1)), x[1])
    party.check(he.take(a, -3), x[1])
    party.check(he.take(a, slice(2, None, -2)), x[2::-2])
    party.check(he.stack([a, b]), np.stack([x, y]))
    party.check(he.reshape(a, (2, 2)), x.reshape(2, 2, -1))
    party.check(he.sum(he.take(he.reshape(a, (2, 2)), slice(0, 1))), x[:2])


@pytest.mark.parametrize("key", ["secret", "public"])
def test_an_empty_batch_keeps_its_shape(party, key):
    he, slots = party.backend, party.parameters.slots
    encrypted = he.encrypt(np.zeros((0, slots)), getattr(party, key))
    for empty in (encrypted, he.take(he.encrypt(party.values(2), getattr(party, key)), slice(1, 1))):
        assert he.decrypt(empty, party.secret).shape == (0, slots)
        assert he.decrypt(he.reshape(empty, (3, 0)), party.secret).shape == (3, 0, slots)


def test_operations_leave_their_operands_alone(party):
    x, y = party.values(2), party.values(2)
    a, b, he = party.encrypt(x), party.encrypt(y), party.backend
    plain = he.encode(y, a.level)
    for call in (
        lambda: he.add(a, b),
        lambda: he.rescale(he.relinearize(he.multiply(a, b))),
        lambda: he.add_plain(a, plain),
        lambda: he.add_scalar(a, 1.0),
        lambda: he.negate(a),
        lambda: he.rotate(a, [1]),
        lambda: he.drop_level(a, 0),
        lambda: he.add_scalar(he.take(a, 0), 1.0),
    ):
        call()
        party.check(a, x)
        party.check(b, y)


# ---- accounting ----


def test_the_log_counts_ciphertexts(party):
    he = party.backend
    ct = party.encrypt(party.values(3))
    he.log.reset()
    with he.log.measure("linear"):
        he.rotate(ct, [0, 1, 2])
    with he.log.measure("activation"):
        he.rescale(he.relinearize(he.multiply(ct, ct)))
    assert he.log.operations() == {"rotate": 6, "multiply": 3, "relinearize": 3, "rescale": 3}
    assert set(he.log.by_op()) == {"linear", "activation"}
    assert [(t.scope, t.primitive, t.level) for t in he.log.trace] == [
        ("linear", "rotate", ct.level),
        ("activation", "multiply", ct.level),
        ("activation", "relinearize", ct.level),
        ("activation", "rescale", ct.level),
    ]
