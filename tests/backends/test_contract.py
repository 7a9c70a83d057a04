"""Every backend computes what numpy computes, keeps the same levels and scales, and refuses the same mistakes."""

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest

from hf_he.backends import BACKENDS, available_backends, get_backend
from hf_he.backends.keys import SecretKeyBase, refuse_secret_key
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.errors import (
    BackendUnavailableError,
    CorruptFileError,
    LevelError,
    MissingKeyError,
    ParameterError,
    ScaleMismatchError,
    SecretKeyOnServerError,
    ShapeError,
    WrongKeyError,
)

STEPS = (1, 2, 5, -1)
TOLERANCE = 1e-5


def toy_parameters() -> CKKSParameters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CKKSParameters.from_bits(11, first_bits=50, scale_bits=40, levels=3, special_bits=50, special_count=2, insecure=True)


AVAILABLE = [name for name, (ok, _) in available_backends().items() if ok]
EXAMPLE = "fifth"


class Party:
    """A backend with its keys, and fresh random values to compare with."""

    def __init__(self, name: str, parameters: CKKSParameters):
        self.backend = get_backend(name, parameters)
        self.parameters = parameters
        self.secret = self.backend.generate_secret_key()
        self.public = self.backend.generate_public_key(self.secret)
        self.keys = self.backend.generate_evaluation_keys(self.secret, STEPS, conjugation=True)
        self.backend.load_evaluation_keys(self.keys)
        self.generator = np.random.default_rng(0)

    def values(self, *batch: int) -> np.ndarray:
        return self.generator.uniform(-1, 1, (*batch, self.parameters.slots))

    def encrypt(self, values: np.ndarray, level: int | None = None):
        return self.backend.encrypt(values, self.secret, level)

    def check(self, ct, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
        assert ct.batch_shape == expected.shape[:-1]
        np.testing.assert_allclose(self.backend.decrypt(ct, self.secret), expected, atol=tolerance)


@pytest.fixture(scope="module", autouse=True)
def example():
    """tests/backends/fifth.py, one file, as a backend like the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, EXAMPLE, "fifth:FifthBackend")
        yield


@pytest.fixture(scope="module", params=[(name, size) for name in (*AVAILABLE, EXAMPLE) for size in ("toy", "n14")], ids=lambda p: f"{p[0]}-{p[1]}")
def party(request) -> Party:
    name, size = request.param
    if (name, size) == ("desilo", "toy"):
        pytest.skip("DESILO FHE chooses its own rings, none of them this small")
    if size == "toy":
        return Party(name, toy_parameters())
    return Party(name, parameter_set("n14-6" if name == "desilo" else size))


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
    party.check(he.stack([a, b]), np.stack([x, y]))
    party.check(he.reshape(a, (2, 2)), x.reshape(2, 2, -1))
    party.check(he.sum(he.take(he.reshape(a, (2, 2)), slice(0, 1))), x[:2])


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


# ---- bytes ----


@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_a_ciphertext_survives_serialisation(party, batch):
    x = party.values(*batch)
    ct = party.backend.drop_level(party.encrypt(x), 1)
    back = party.backend.deserialize(party.backend.serialize(ct), "ciphertext")
    assert (back.level, back.scale, back.batch_shape, back.key_id, back.components) == (ct.level, ct.scale, ct.batch_shape, ct.key_id, 2)
    party.check(back, x)


def test_keys_survive_serialisation(party):
    he, x = party.backend, party.values()
    secret = he.deserialize(he.serialize(party.secret, allow_secret=True), "secret_key")
    public = he.deserialize(he.serialize(party.public), "public_key")
    keys = he.deserialize(he.serialize(party.keys), "evaluation_keys")
    assert keys.rotations == party.keys.rotations and keys.conjugation
    server = get_backend(he.name, party.parameters)
    server.load_evaluation_keys(keys)
    ct = he.encrypt(x, public)
    result = server.rescale(server.relinearize(server.multiply(server.take(server.rotate(ct, [5]), 0), ct)))
    np.testing.assert_allclose(he.decrypt(result, secret), np.roll(x, -5) * x, atol=TOLERANCE)


def test_damaged_or_foreign_bytes_are_refused(party):
    he = party.backend
    data = he.serialize(party.encrypt(party.values()))
    with pytest.raises(CorruptFileError):
        he.deserialize(data[: len(data) // 2], "ciphertext")
    flipped = bytearray(data)
    flipped[-100] ^= 4
    with pytest.raises(CorruptFileError):
        he.deserialize(bytes(flipped), "ciphertext")
    with pytest.raises(CorruptFileError):
        he.deserialize(data, "evaluation_keys")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = parameter_set("n16-bootstrap") if he.name == "desilo" else replace(party.parameters, scale_bits=38)
    with pytest.raises(ParameterError):
        get_backend(he.name, other).deserialize(data, "ciphertext")


# ---- refusals ----


def test_secret_keys_stay_where_they_are(party):
    key = party.secret
    assert isinstance(key, SecretKeyBase) and repr(key).count(key.key_id) == 1 and len(repr(key)) < 80
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pickled or copied"):
            leak(key)
    with pytest.raises(SecretKeyOnServerError, match="allow_secret"):
        party.backend.serialize(key)
    with pytest.raises(SecretKeyOnServerError, match="the server"):
        refuse_secret_key(key, "the server")
    refuse_secret_key(party.keys, "the server")


def test_mistakes_have_names(party):
    he, ct = party.backend, party.encrypt(party.values(2))
    low, product = he.drop_level(ct, 1), he.multiply(ct, ct)
    with pytest.raises(LevelError, match="match_level"):
        he.add(ct, low)
    with pytest.raises(LevelError, match="refresh"):
        he.rescale(he.drop_level(ct, 0))
    with pytest.raises(LevelError, match="refresh"):
        he.match_level(low, 2)
    with pytest.raises(LevelError, match="encode"):
        he.multiply_plain(low, he.encode(np.ones(4), 2))
    with pytest.raises(ScaleMismatchError, match="rescale"):
        he.add(ct, he.relinearize(product))
    with pytest.raises(ScaleMismatchError, match="rescale"):
        he.multiply(he.drop_level(ct, 0), he.drop_level(ct, 0))
    with pytest.raises(ShapeError, match="relinearize"):
        he.rotate(product, [1])
    with pytest.raises(ShapeError, match="power of two"):
        he.encode(np.ones(3), 1)
    with pytest.raises(ShapeError, match="NaN"):
        he.encode(np.full(4, np.nan), 1)
    with pytest.raises(ShapeError, match="NaN"):
        party.encrypt(np.full(party.parameters.slots, np.inf))
    with pytest.raises(ShapeError, match="values"):
        party.encrypt(np.ones(4))
    with pytest.raises(ShapeError, match="broadcast"):
        he.add(ct, party.encrypt(party.values(3)))
    with pytest.raises(ShapeError, match="2\\^25"):
        he.linear_combination(np.array([[2**25, 0]]), ct)


def test_keys_must_fit(party):
    he, ct = party.backend, party.encrypt(party.values())
    with pytest.raises(MissingKeyError, match="3"):
        he.rotate(ct, [3])
    stranger = he.generate_secret_key()
    with pytest.raises(WrongKeyError, match="keygen"):
        he.decrypt(ct, stranger)
    foreign = he.encrypt(party.values(), stranger)
    with pytest.raises(WrongKeyError):
        he.add(ct, foreign)
    with pytest.raises(WrongKeyError):
        he.rotate(foreign, [1])
    empty = get_backend(he.name, party.parameters)
    with pytest.raises(MissingKeyError, match="load_evaluation_keys"):
        empty.rotate(ct, [1])
    without = get_backend(he.name, party.parameters)
    without.load_evaluation_keys(replace(party.keys, conjugation=False))
    with pytest.raises(MissingKeyError, match="conjugation"):
        without.conjugate(ct)


def test_unknown_backends_are_named():
    with pytest.raises(BackendUnavailableError, match="simulator"):
        get_backend("cuda", toy_parameters())
    assert available_backends()["simulator"][0]
