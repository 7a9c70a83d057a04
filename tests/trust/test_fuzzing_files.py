"""Every reader of key, ciphertext and parameter files under seeded mutations: typed errors only, bounded memory, and what is accepted is sound."""

import json
import resource
import shutil
import tracemalloc
import warnings

import numpy as np
import pytest
from mutation import NUMBERS, STRINGS, Outcomes, damaged, generator, json_value, seal, sealed, table_of

from hf_he.backends import get_backend
from hf_he.checkpoints import model_fingerprint
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.ckks.vector import packed_width
from hf_he.keys import Keys, ServerKeys
from hf_he.serialization import pack, peek, unpack, unpack_residues, write_file

KINDS = ("ciphertext", "evaluation_keys", "public_key", "secret_key")
SEALED, DAMAGED = 700, 600


@pytest.fixture(autouse=True)
def bounded_memory():
    """No test of this file may raise the peak of the process by more than 400 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def toy_parameters(levels=2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CKKSParameters.from_bits(10, first_bits=50, scale_bits=40, levels=levels, special_bits=50, special_count=2, insecure=True)


@pytest.fixture(scope="module", params=["native", "simulator"])
def party(request):
    """A backend and one file of every kind, ciphertexts in all three forms: with seeds, without, with three components."""
    backend = get_backend(request.param, toy_parameters())
    secret = backend.generate_secret_key()
    keys = backend.generate_evaluation_keys(secret, [1, 5], conjugation=True)
    fresh = backend.encrypt(np.random.default_rng(0).uniform(-1, 1, (2, 1, backend.parameters.slots)), secret)
    files = {
        "ciphertext": [backend.serialize(ct) for ct in (fresh, backend.add(fresh, fresh), backend.multiply(fresh, fresh))],
        "evaluation_keys": [backend.serialize(keys)],
        "public_key": [backend.serialize(backend.generate_public_key(secret))],
        "secret_key": [backend.serialize(secret, allow_secret=True)],
    }
    return backend, files, secret


def check_sound(backend, item, kind):
    """What a reader accepts must serialise, and be read again, without surprises."""
    data = backend.serialize(item, allow_secret=True)
    again = backend.deserialize(data, kind)
    assert again.key_id == item.key_id and len(item.key_id) == 16
    if kind == "ciphertext":
        assert again.batch_shape == item.batch_shape and again.scale == item.scale and 0 <= item.level <= backend.parameters.max_level
        assert np.isfinite(item.payload.values).all()
    if kind == "evaluation_keys":
        assert all(0 < step < backend.parameters.slots for step in item.rotations)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_never_pass(party, kind):
    backend, files, _ = party
    rng, outcomes = generator(backend.name, kind, "damaged"), Outcomes()
    others = tuple(data for group in files.values() for data in group)
    for _ in range(DAMAGED):
        how, data = damaged(rng.choice(files[kind]), rng, others)
        with outcomes.expect(f"{backend.name} {kind} {how}", must_fail=True):
            backend.deserialize(data, kind)
    assert outcomes["inputs"] == DAMAGED


@pytest.mark.parametrize("kind", KINDS)
def test_forged_files_with_a_right_checksum_are_refused_or_sound(party, kind):
    backend, files, _ = party
    rng, outcomes = generator(backend.name, kind, "sealed"), Outcomes()
    for _ in range(SEALED):
        how, data = sealed(rng.choice(files[kind]), kind, rng)
        with outcomes.expect(f"{backend.name} {kind} {how}"):
            check_sound(backend, backend.deserialize(data, kind), kind)
    assert outcomes["CorruptFileError"] > SEALED / 4


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_another_kind_backend_or_parameter_set_never_pass(party, kind):
    backend, files, _ = party
    stranger = get_backend("simulator" if backend.name == "native" else "native", backend.parameters)
    wider = get_backend(backend.name, toy_parameters(levels=3))
    outcomes = Outcomes()
    for reader, wanted in [(stranger, kind), (wider, kind), *((backend, other) for other in KINDS if other != kind), (backend, "nonsense")]:
        for data in files[kind]:
            with outcomes.expect(f"{kind} as {wanted} of {reader.name}", must_fail=True):
                reader.deserialize(data, wanted)


def packed_last(value, width):
    """The last lane of eight packed residues of a key (see vector.ld_packed): [(bytes from the end of the eight, part)]."""
    parts, end = [], 8 * width
    for size in {4: (4,), 6: (4, 2), 7: (4, 2, 1)}[width]:
        low = (value + (1 << 8 * size - 1)) % (1 << 8 * size) - (1 << 8 * size - 1)
        parts.append((end - 7 * size, low.to_bytes(size, "little", signed=True)))
        value, end = (value - low) >> 8 * size, end - 8 * size
    return parts


def forged_residues(parameters, arrays):
    """(array, copy whose last residue of a modulus is out of range): an array per modulus, or a key with one modulus after another."""
    moduli = (*parameters.moduli, *parameters.special_moduli)
    digits = -(-len(parameters.moduli) // parameters.digit_size)
    for name, array in arrays.items():
        if name.startswith("residues."):
            modulus, width = moduli[int(name.removeprefix("residues."))], array.shape[-1]
            for value in (modulus, modulus + 1, 2 ** (8 * width) - 1):
                forged = array.copy()
                forged.reshape(-1)[-width:] = list(value.to_bytes(width, "little"))
                yield name, forged
        elif name.startswith("key."):
            end = 0
            for modulus in moduli:
                width = packed_width(modulus)
                end += digits * parameters.ring_degree * width
                for value in (modulus // 2 + 2, -(modulus // 2) - 2, modulus, (1 << 8 * width - 1) - 2**34 if width > 4 else 2**31 - 1):
                    forged = array.copy()
                    for before, part in packed_last(value, width):
                        forged[end - before : end - before + len(part)] = list(part)
                    yield name, forged
            assert end == array.size


def test_out_of_range_residues_are_refused_behind_a_right_checksum(party):
    backend, files, _ = party
    if backend.name == "simulator":
        pytest.skip("the simulator stores values, not residues")
    outcomes = Outcomes()
    for kind in ("ciphertext", "evaluation_keys", "public_key"):
        for data in files[kind]:
            arrays, metadata = unpack(data, kind)
            for name, forged in forged_residues(backend.parameters, arrays):
                table, body = table_of(arrays | {name: forged})
                with outcomes.expect(f"{kind} {name}", must_fail=True):
                    backend.deserialize(seal(kind, table, body, metadata), kind)
    assert outcomes["CorruptFileError"] == outcomes["inputs"] > 40


def test_containers():
    """`unpack` and `peek` themselves: damage never passes, forged tables give typed errors or the arrays they describe."""
    rng, outcomes = generator("container"), Outcomes()
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(5, dtype=np.uint8), "c": np.zeros((0, 4), np.int64), "d": np.array(1.5, np.float32)}
    data = pack("anything", arrays, {"key": "value", "level": "3"})
    for _ in range(3000):
        how, bad = damaged(data, rng)
        with outcomes.expect(f"container {how}", must_fail=True):
            unpack(bad, "anything")
    for _ in range(3000):
        how, bad = sealed(data, "anything", rng)
        with outcomes.expect(f"container {how}"):
            found, metadata = unpack(bad, "anything")
            assert all(array.nbytes <= len(bad) for array in found.values()) and all(type(value) is str for value in metadata.values())
    for _ in range(1000):
        how, bad = damaged(data, rng)
        with outcomes.expect(f"peek {how}"):
            peek(bad)
    assert outcomes["inputs"] == 7000


def test_huge_declarations_allocate_nothing(party):
    """Readers stay within a small multiple of the file's own size, whatever sizes it declares."""
    backend, files, _ = party
    rng, outcomes = generator(backend.name, "huge"), Outcomes()
    huge = ([2**40], [2**20, 2**20], [2**62, 0], [2**70, 0], [2**31] * 8, [0, 2**60], [2**63 - 1])
    backend.deserialize(files["ciphertext"][0], "ciphertext")
    for _ in range(150):
        kind = rng.choice(KINDS)
        data = rng.choice(files[kind])
        arrays, metadata = unpack(data, kind)
        table, body = table_of(arrays)
        name = rng.choice([*sorted(table), "x"])
        count = rng.choice((0, len(body), 2**40, 2**62))
        table[name] = {"dtype": rng.choice(("U8", "F64", "I64")), "shape": rng.choice(huge), "data_offsets": [0, count]}
        tracemalloc.start()
        with outcomes.expect(f"{backend.name} {kind} {table[name]}"):
            backend.deserialize(seal(kind, table, body, metadata), kind)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * len(data) + 2**21, f"{kind} {table[name]}: {peak} bytes for a file of {len(data)}"
    assert outcomes["accepted"] == 0


@pytest.mark.parametrize("name", ["native", "simulator"])
@pytest.mark.filterwarnings("ignore:CKKS parameters")
def test_bootstrapping_key_folders(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = get_backend(name, CKKSParameters.from_bits(10, 50, 40, 2, 50, 4, insecure=True, bootstrap=True))
    keys = backend.generate_evaluation_keys(backend.generate_secret_key(), [1], bootstrapping=True)
    backend.save_bootstrapping_keys(keys, tmp_path)
    path = min(tmp_path.iterdir())
    right, kind, rng, outcomes = path.read_bytes(), peek(path.read_bytes())[0], generator(name, "bootstrapping"), Outcomes()
    for _ in range(120):
        must_fail = rng.random() < 0.5
        how, data = damaged(right, rng) if must_fail else sealed(right, kind, rng)
        write_file(path, data)
        with outcomes.expect(f"{name} {path.name} {how}", must_fail=must_fail):
            loaded = backend.load_bootstrapping_keys(keys, tmp_path)
            assert loaded.key_id == keys.key_id and loaded.bootstrapping is not None
    path.unlink()
    path.mkdir()
    with outcomes.expect("a folder in place of a key", must_fail=True):
        backend.load_bootstrapping_keys(keys, tmp_path)


def test_packed_residues():
    rng, outcomes = generator("residues"), Outcomes()
    for _ in range(1500):
        modulus = rng.choice((17, 2**20 - 3, 2**40 - 87, 2**50 - 27))
        width = (modulus.bit_length() + 7) // 8
        shape = rng.choice(((3, width), (width,), (0, width), (2, 3, width), (3, width + 1), (3,), (), (2**3, 0)))
        packed = np.frombuffer(rng.randbytes(int(np.prod(shape))), np.uint8).reshape(shape).astype(rng.choice((np.uint8, np.uint8, np.int8, np.float64)))
        with outcomes.expect(f"residues {packed.dtype} {shape} modulo {modulus}"):
            values = unpack_residues(packed, modulus)
            assert values.shape == shape[:-1] and (np.abs(values) <= modulus // 2).all()
    assert outcomes["accepted"] and outcomes["CorruptFileError"]


@pytest.mark.filterwarnings("ignore:CKKS parameters")
def test_parameter_dictionaries():
    """`from_dict` on mutated JSON: sound parameters inside the 128-bit table, or a ParameterError; never an insecure set."""
    rng, outcomes = generator("parameters"), Outcomes()
    sets = [json.loads(json.dumps(parameter_set(name).to_dict())) for name in ("n13", "n14", "n16-bootstrap")] + [toy_parameters().to_dict()]
    for _ in range(2500):
        data = rng.choice(sets)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = json_value(data, rng)
        with outcomes.expect(f"parameters {str(data)[:300]}"):
            parameters = CKKSParameters.from_dict(data)
            assert parameters.security_bits == 128 and CKKSParameters.from_dict(parameters.to_dict()) == parameters
    for data in (*NUMBERS, *STRINGS[:20], {"moduli": range(10**9)}, {"moduli": [2] * 10**6}):
        with outcomes.expect(f"parameters {str(data)[:300]}", must_fail=True):
            CKKSParameters.from_dict(data)
    assert outcomes["accepted"] < 0.5 * outcomes["inputs"]


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    Keys.generate(get_backend("simulator", parameter_set("n13")), {1, 2}).save(folder)
    return folder


def test_key_folders(key_folder, tmp_path):
    """`Keys.load` and `ServerKeys.load` (which also read the backend's name and the parameters from the file)."""
    files = {path.name: path.read_bytes() for path in key_folder.iterdir()}
    kinds = {"secret.key": "secret_key", "public.key": "public_key", "evaluation.keys": "evaluation_keys"}
    rng, outcomes = generator("folder"), Outcomes()
    shutil.copytree(key_folder, tmp_path, dirs_exist_ok=True)
    for _ in range(800):
        name = rng.choice(sorted(kinds))
        if rng.random() < 0.3:
            how, data = damaged(files[name], rng)
        elif rng.random() < 0.15:
            how, data = "another key file", files[rng.choice(sorted(set(kinds) - {name}))]
        else:
            how, data = sealed(files[name], kinds[name], rng)
        write_file(tmp_path / name, data)
        with outcomes.expect(f"key folder {name} {how}"):
            Keys.load(tmp_path, with_evaluation=True)
        with outcomes.expect(f"server keys {name} {how}"):
            ServerKeys.load(data)
        write_file(tmp_path / name, files[name])
    for name in kinds:
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with outcomes.expect(f"folder in place of {name}", must_fail=True):
            Keys.load(tmp_path, with_evaluation=True)
        (tmp_path / name).rmdir()
        write_file(tmp_path / name, files[name])


def test_model_fingerprints(tmp_path):
    """The fingerprint of a model folder whose configuration is damaged: typed errors, or another fingerprint."""
    rng, outcomes = generator("fingerprint"), Outcomes()
    config = {"model_type": "he_bert", "hidden_size": 32, "id2label": {"0": "negative", "1": "positive"}, "approximations": {"a": {"interval": [0.0, 1.0]}}}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(json.dumps(config))
    right = model_fingerprint(tmp_path)
    for _ in range(300):
        changed = json_value(config, rng)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with outcomes.expect(f"config {changed}"):
            assert (model_fingerprint(tmp_path) == right) == (json.dumps(changed, sort_keys=True) == json.dumps(config, sort_keys=True))
    for raw in (b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"null", b'"x"', json.dumps(config).encode()[:-1]):
        (tmp_path / "config.json").write_bytes(raw)
        with outcomes.expect(f"config {raw[:40]}", must_fail=True):
            model_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.safetensors").mkdir()
    with outcomes.expect("a folder in place of weights", must_fail=True):
        model_fingerprint(tmp_path)
