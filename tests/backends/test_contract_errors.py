"""Every backend reads back what it wrote, and refuses the same mistakes."""

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
from party import TOLERANCE, toy_parameters

from hf_he.backends import available_backends, get_backend
from hf_he.ckks.parameters import parameter_set
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
from hf_he.secret_key import SecretKeyBase, refuse_secret_key

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
    stranger = get_backend(he.name, other)
    with pytest.raises(ParameterError):
        stranger.deserialize(data, "ciphertext")
    with pytest.raises(ParameterError, match="generate_evaluation_keys"):
        stranger.load_evaluation_keys(party.public)
    if he.evaluation_key_type is not None:
        with pytest.raises(ParameterError, match="other CKKS parameters"):
            stranger.load_evaluation_keys(party.keys)
        with pytest.raises(ParameterError, match="another backend"):
            he.load_evaluation_keys(replace(party.keys, payload=object()))


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
    for call in (he.drop_level, he.match_level, lambda ct, level: he.encode(np.ones(4), level)):
        for level in (0.5, -1):
            with pytest.raises(LevelError, match="integer"):
                call(ct, level)
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


def test_sums_and_stacks_of_nothing_have_names(party):
    he, ct = party.backend, party.encrypt(party.values(2))
    empty = he.take(ct, slice(0, 0))
    with pytest.raises(ShapeError, match="at least one entry"):
        he.sum(empty)
    with pytest.raises(ShapeError, match="at least one entry"):
        he.sum_rotated(empty, ())
    with pytest.raises(ShapeError, match="at least one ciphertext"):
        he.stack([])
    with pytest.raises(ShapeError, match="at least one step"):
        he.rotate(ct, ())
    with pytest.raises(ShapeError, match="whole number of slots"):
        he.rotate(ct, [1.7])
    with pytest.raises(ShapeError, match="whole number of slots"):
        he.generate_evaluation_keys(party.secret, [1.7])
    with pytest.raises(ShapeError, match="at least 1"):
        he.linear_combination(np.zeros((2, 0), dtype=np.int64), empty)
    with pytest.raises(ShapeError, match="at least 1"):
        he.linear_combination(np.zeros((0, 2), dtype=np.int64), ct)
    with pytest.raises(ShapeError, match="at least 1"):
        he.multiply_plain_sum(replace(he.encode(np.ones((1, 1, 4)), ct.level), batch_shape=(2, 0)), empty)
    with pytest.raises(ShapeError, match="reshape"):
        he.reshape(ct, (-1, -2))


@pytest.mark.parametrize("index", [3, -4, np.int64(5)])
def test_positions_outside_the_batch_are_refused(party, index):
    with pytest.raises(ShapeError, match=r"axis of 3: take 0\.\.2"):
        party.backend.take(party.encrypt(party.values(3)), index)


@pytest.mark.parametrize("index", [1.0, [1], "1", None])
def test_positions_are_integers_or_slices(party, index):
    with pytest.raises(ShapeError, match="integer or a slice"):
        party.backend.take(party.encrypt(party.values(3)), index)


def test_slots_are_real(party):
    he, ct = party.backend, party.encrypt(party.values())
    z = np.full(party.parameters.slots, 1 + 1j)
    for key in (party.secret, party.public):
        with pytest.raises(ShapeError, match="slots are real"):
            he.encrypt(z, key)
    with pytest.raises(ShapeError, match="slots are real"):
        he.encode(z, 2)
    for scalar in (1j, np.complex64(1 + 1j), np.complex128(1 + 1j)):
        with pytest.raises(ParameterError, match="real"):
            he.add_scalar(ct, scalar)
        with pytest.raises(ParameterError, match="real"):
            he.multiply_scalar(ct, scalar)
    with pytest.raises(ShapeError, match="single number"):
        he.encode(np.array(3.0), 2)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0, -1.0])
def test_scales_are_positive_and_finite(party, scale):
    he, ct = party.backend, party.encrypt(party.values(1))
    for call in (
        lambda: he.encode(np.zeros(4), 2, scale),
        lambda: he.multiply_scalar(ct, 1.0, scale),
        lambda: he.linear_combination(np.ones((1, 1), dtype=np.int64), ct, scale),
    ):
        with pytest.raises(ParameterError, match="positive and finite"):
            call()


def test_factors_beyond_half_the_modulus_are_refused(party):
    he, ct = party.backend, party.encrypt(party.values(), 1)
    limit = 2.0 ** (party.parameters.log2_modulus(1) - 1 - 10)
    for value in (2.0**120, 1.01 * limit, -1.01 * limit):
        with pytest.raises(ScaleMismatchError, match="does not fit the modulus of level 1"):
            he.multiply_scalar(ct, value, 2.0**10)
    assert he.multiply_scalar(party.encrypt(party.values(), 3), 1.01 * limit, 2.0**10).level == 3


@pytest.mark.parametrize("weight", [2**25, -(2**25), -(2**31)])
def test_weights_stay_below_their_limit(party, weight):
    with pytest.raises(ShapeError, match="2\\^25"):
        party.backend.linear_combination(np.array([[weight]], dtype=np.int32), party.encrypt(party.values(1)))


@pytest.mark.parametrize("slots", [0, 8])
def test_parameters_without_bootstrapping_moduli_have_no_bootstrapping_keys(party, slots):
    with pytest.raises(BackendUnavailableError, match="bootstrap"):
        party.backend.generate_evaluation_keys(party.secret, (), bootstrapping=True, bootstrapping_slots=slots)


def test_backends_without_periodic_bootstraps_say_so():
    he = get_backend("simulator", parameter_set("n16-bootstrap"))
    for slots in (0, he.parameters.slots):
        he._check_bootstraps_all_slots(slots)
    with pytest.raises(BackendUnavailableError, match="leave bootstrapping_slots out"):
        he._check_bootstraps_all_slots(64)


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
