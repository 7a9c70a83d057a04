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
