"""Key and ciphertext files: halved by seeds, exact, and safe to read from a stranger."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from ckks_reference import toy_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.backends.native import NativeBackend
from hf_he.ckks.jit import kernel
from hf_he.ckks.parameters import parameter_set
from hf_he.ckks.vector import ld, ld_packed, packed_width, st_packed
from hf_he.ckks.vector import st as st_store
from hf_he.errors import CorruptFileError, HEError, MissingKeyError, ParameterError, SecretKeyOnServerError
from hf_he.serialization import map_file, pack, unpack, write_file


@pytest.fixture(scope="module")
def party():
    backend = NativeBackend(toy_parameters(10, levels=3))
    secret = backend.generate_secret_key()
    keys = backend.generate_evaluation_keys(secret, [1, 4, -1], conjugation=True)
    backend.load_evaluation_keys(keys)
    values = np.random.default_rng(0).uniform(-1, 1, (2, backend.parameters.slots))
    return backend, secret, keys, values, backend.encrypt(values, secret)


def repacked(data, kind, change):
    arrays, metadata = unpack(data, kind)
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(arrays, metadata)
    return pack(kind, arrays, metadata)


def test_seeded_ciphertexts_are_half_size_and_exact(party):
    backend, _, _, _, ct = party
    data = backend.serialize(ct)
    n, q = backend.context.ring_degree, backend.parameters.moduli
    stored = 2 * n * sum((m.bit_length() + 7) // 8 for m in q)
    assert stored < len(data) < 1.1 * stored
    back = backend.deserialize(data, "ciphertext")
    assert np.array_equal((back.payload.values - ct.payload.values) % np.array(q, dtype=float)[:, None], np.zeros_like(ct.payload.values))
    computed = backend.serialize(backend.add(ct, ct))
    assert len(computed) > 1.9 * stored


def test_seeds_follow_views_of_fresh_ciphertexts(party):
    backend, secret, _, values, ct = party
    for view, wanted in (
        (backend.take(ct, 1), values[1]),
        (backend.drop_level(ct, 1), values),
        (backend.reshape(ct, (2, 1)), values[:, None]),
        (backend.take(ct, slice(0, 1)), values[:1]),
    ):
        assert view.payload.seeds is not None
        back = backend.deserialize(backend.serialize(view), "ciphertext")
        assert np.allclose(backend.decrypt(back, secret), wanted, atol=1e-6)
    assert backend.negate(ct).payload.seeds is None


def test_key_sizes_at_n14():
    """A key of n14 takes 4.1 MB, so that 60 rotations stay well below 400 MB."""
    backend = NativeBackend(parameter_set("n14"))
    secret = backend.generate_secret_key()
    sizes = [len(backend.serialize(backend.generate_evaluation_keys(secret, steps))) for steps in ((1,), (1, 2))]
    assert 60 * (sizes[1] - sizes[0]) + sizes[0] < 260e6


def test_keys_can_be_dropped_before_sending(party):
    backend, secret, keys, values, ct = party
    fewer = backend.deserialize(backend.serialize(replace(keys, rotations=frozenset([4]), conjugation=False)), "evaluation_keys")
    assert fewer.rotations == {4} and not fewer.conjugation and len(fewer.payload) == 2
    server = NativeBackend(backend.parameters)
    server.load_evaluation_keys(fewer)
    assert np.allclose(backend.decrypt(server.rotate(ct, [4]), secret)[0], np.roll(values, -4, axis=-1), atol=1e-6)


def test_copies_of_keys_read_their_own_halves(party):
    backend, secret, keys, values, ct = party
    for copied in (copy.deepcopy(keys), pickle.loads(pickle.dumps(keys))):
        addresses = copied.payload.table.halves
        assert not np.isin(addresses, keys.payload.table.halves).any()
        assert np.array_equal(addresses, [[half.ctypes.data for half in halves] for halves in copied.payload.halves])
        server = NativeBackend(backend.parameters)
        server.load_evaluation_keys(copied)
        assert np.allclose(backend.decrypt(server.rotate(ct, [4]), secret)[0], np.roll(values, -4, axis=-1), atol=1e-6)


def test_keys_are_mapped_from_their_file(party, tmp_path):
    """A server's keys lie in the file, not in its memory, whether the file is replaced or deleted meanwhile."""
    backend, secret, keys, values, ct = party
    path = tmp_path / "evaluation.keys"
    write_file(path, backend.serialize(keys), mapped=True)
    assert path.stat().st_mode & 0o777 == 0o444
    loaded = backend.deserialize(map_file(path, "evaluation-key"), "evaluation_keys")
    assert all(not b.flags.writeable and a.flags.writeable for b, a in loaded.payload.halves)
    other = backend.serialize(backend.generate_evaluation_keys(backend.generate_secret_key(), [1, 4, -1], conjugation=True))
    for change in (lambda: write_file(path, other, mapped=True), path.unlink):
        change()
        server = NativeBackend(backend.parameters)
        server.load_evaluation_keys(loaded)
        assert np.allclose(backend.decrypt(server.rotate(ct, [4]), secret)[0], np.roll(values, -4, axis=-1), atol=1e-6)


def test_servers_refuse_secret_and_foreign_keys(party):
    backend, secret, keys, _, _ = party
    with pytest.raises(SecretKeyOnServerError):
        NativeBackend(backend.parameters).load_evaluation_keys(secret)
    with pytest.raises(ParameterError, match="other CKKS parameters"):
        NativeBackend(toy_parameters(10, levels=2)).load_evaluation_keys(keys)


def test_secret_coefficients_never_show(party):
    backend, secret, _, _, _ = party
    assert repr(secret) == str(secret) == f"SecretKey(key_id={secret.key_id!r})"
    assert b"coefficients" not in backend.serialize(party[2]) + backend.serialize(party[4])


@pytest.mark.parametrize(
    "change",
    [
        lambda a, m: a.pop("residues.0"),
        lambda a, m: a.update({"residues.9": a["residues.0"]}),
        lambda a, m: a.update({"residues.1": a["residues.1"][..., :4]}),
        lambda a, m: a["residues.1"].fill(255),
        lambda a, m: a.update(seeds=a["seeds"][:1]),
        lambda a, m: m.update(level="99"),
        lambda a, m: m.update(level="-1"),
        lambda a, m: m.update(scale="nan"),
        lambda a, m: m.update(scale=(2.0**500).hex()),
        lambda a, m: m.update(components="3"),
        lambda a, m: m.update(components="1000000"),
        lambda a, m: m.update(key_id="../../etc"),
        lambda a, m: m.pop("scale"),
    ],
)
def test_inconsistent_ciphertexts_are_refused(party, change):
    with pytest.raises(CorruptFileError, match="again"):
        party[0].deserialize(repacked(party[0].serialize(party[4]), "ciphertext", change), "ciphertext")


@pytest.mark.parametrize(
    "change",
    [
        lambda a, m: a.update(rotations=np.array([4, 1, 511], dtype=np.int64)),
        lambda a, m: a.update(rotations=np.array([0, 1, 4], dtype=np.int64)),
        lambda a, m: a.update(rotations=np.array([1, 4, 512], dtype=np.int64)),
        lambda a, m: a.update(rotations=np.arange(1, 400, dtype=np.int64)),
        lambda a, m: a.update(rotations=a["rotations"].astype(np.float64)),
        lambda a, m: a.update(seeds=a["seeds"][:-1]),
        lambda a, m: a["key.00002"].fill(127),
        lambda a, m: a.pop("key.00004"),
        lambda a, m: m.update(conjugation="yes"),
    ],
)
def test_inconsistent_evaluation_keys_are_refused(party, change):
    with pytest.raises(CorruptFileError, match="again"):
        party[0].deserialize(repacked(party[0].serialize(party[2]), "evaluation_keys", change), "evaluation_keys")


@pytest.mark.parametrize("fill", [2, -2, 0])
def test_inconsistent_secret_keys_are_refused(party, fill):
    data = party[0].serialize(party[1], allow_secret=True)
    with pytest.raises(CorruptFileError):
        party[0].deserialize(repacked(data, "secret_key", lambda a, m: a["coefficients"].fill(fill)), "secret_key")


def test_other_backends_files_are_named(party):
    data = repacked(party[0].serialize(party[4]), "ciphertext", lambda a, m: m.update(backend="simulator"))
    with pytest.raises(ParameterError, match="simulator"):
        party[0].deserialize(data, "ciphertext")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 255), st.sampled_from(["flip", "cut", "header"]), st.sampled_from(["ciphertext", "evaluation_keys", "secret_key"]))
def test_mutated_files_give_typed_errors(mutable_files, position, value, how, kind):
    backend, files = mutable_files
    data = bytearray(files[kind])
    if how == "cut":
        data = data[: position % len(data)]
    else:
        data[position % (len(data) if how == "flip" else 600)] ^= value or 1
    with pytest.raises(HEError):
        backend.deserialize(bytes(data), kind)


@pytest.fixture(scope="module")
def mutable_files(party):
    backend, secret, keys, _, ct = party
    return backend, {
        "ciphertext": backend.serialize(backend.drop_level(backend.take(ct, 0), 0)),
        "evaluation_keys": backend.serialize(keys),
        "secret_key": backend.serialize(secret, allow_secret=True),
    }


def test_keys_for_lower_levels_are_smaller_and_work_there_only(party):
    backend, secret, _, values, ct = party
    top = backend.parameters.max_level
    whole = backend.generate_evaluation_keys(secret, [1, 4])
    keys = backend.generate_evaluation_keys(secret, {1: 1, 4: top, -4: 0, backend.parameters.slots - 4: 2})
    data = backend.serialize(keys)
    assert keys.levels == {1: 1, backend.parameters.slots - 4: 2} and len(data) < 1.3 * len(backend.serialize(whole))
    loaded = backend.deserialize(data, "evaluation_keys")
    assert (loaded.rotations, loaded.levels) == (keys.rotations, keys.levels)
    for mine, theirs in zip(loaded.payload.halves, keys.payload.halves, strict=True):
        assert all(map(np.array_equal, mine, theirs))
    server = NativeBackend(backend.parameters)
    server.load_evaluation_keys(loaded)
    for level in range(top + 1):
        low = backend.drop_level(ct, level)
        for step, highest in ((1, 1), (4, top), (-4, 2)):
            if level > highest:
                with pytest.raises(MissingKeyError, match="lower levels"):
                    server.rotate(low, [step])
            else:
                assert np.allclose(backend.decrypt(server.rotate(low, [step]), secret)[0], np.roll(values, -step, axis=-1), atol=1e-5)
    with pytest.raises(MissingKeyError, match="limbs"):
        server._evaluator.rotate(ct.payload.values, loaded.payload, [1])
    low = backend.drop_level(ct, 1)
    together = server.sum_rotated(backend.stack([low, low, low]), [1, 0, 4])
    expected = np.roll(values, -1, axis=-1) + values + np.roll(values, -4, axis=-1)
    assert np.allclose(backend.decrypt(together, secret), expected, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([28, 31, 33, 40, 46, 47, 49, 50]), st.integers(0, 2**32))
def test_packed_residues_of_keys_are_exact(bits, seed):
    """Every width of `ld_packed`, up to the largest centred residue of a modulus."""
    modulus = 2**bits - 1
    half = modulus // 2
    values = np.random.default_rng(seed).integers(-half, half + 1, 64).astype(np.float64)
    values[:4] = half, -half, 0, 2.0**31 if half >= 2**31 else half
    width = packed_width(modulus)
    packed, back = np.zeros(64 * width, dtype=np.uint8), np.empty(64)
    packed_round_trip(values, packed.ctypes.data, back, width)
    assert np.array_equal(values, back)


@kernel
def packed_round_trip(values, packed, back, width):
    for c in range(0, values.size, 8):
        st_packed(packed + c * width, width, ld(values, c))
    for c in range(0, values.size, 8):
        st_store(back, c, ld_packed(packed + c * width, width))
