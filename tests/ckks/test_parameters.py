"""The 128-bit table is enforced, prime chains are sound, and parameters read from files are not trusted."""

import json
import math

import pytest
from ckks_reference import toy_parameters

from hf_he.ckks.context import Context
from hf_he.ckks.number_theory import is_prime, nearest_prime, primitive_root_of_unity
from hf_he.ckks.parameters import MAX_LOG2_QP, PARAMETER_SETS, CKKSParameters, parameter_set
from hf_he.errors import InsecureParametersError, ParameterError


@pytest.mark.parametrize("name", PARAMETER_SETS)
def test_named_sets_are_inside_the_table(name):
    p = parameter_set(name)
    assert p.log2_qp <= MAX_LOG2_QP[p.ring_degree] and p.security_bits == 128
    assert p.slots == p.ring_degree // 2 and len(p.moduli) == p.max_level + 1
    for q in (*p.moduli, *p.special_moduli):
        assert is_prime(q) and q % (2 * p.ring_degree) == 1 and q < 2**50


@pytest.mark.parametrize("name", PARAMETER_SETS)
def test_canonical_scales_stay_next_to_the_target(name):
    p = parameter_set(name)
    assert p.scale_at(p.max_level) == 2.0**p.scale_bits
    for level in range(p.max_level, 0, -1):
        assert p.scale_at(level - 1) == p.scale_at(level) * p.scale_at(level) / p.moduli[level]
        assert abs(math.log2(p.scale_at(level - 1)) - p.scale_bits) < 1e-3


def test_n14_is_the_documented_set():
    p = parameter_set("n14")
    assert (p.ring_degree, p.max_level, p.digit_size, len(p.special_moduli)) == (2**14, 7, 2, 2)
    assert 427 < p.log2_qp <= 430


@pytest.mark.parametrize("log2_degree", [10, 11, 12])
def test_small_rings_are_refused(log2_degree):
    with pytest.raises(InsecureParametersError, match="larger ring"):
        CKKSParameters.from_bits(log2_degree, 30, 30, 0, 30, 1)


def test_one_modulus_too_many_is_refused():
    with pytest.raises(InsecureParametersError, match="430"):
        CKKSParameters.from_bits(14, first_bits=50, scale_bits=40, levels=8, special_bits=50, special_count=2)


def test_insecure_parameters_warn_and_show():
    with pytest.warns(UserWarning, match="protect nothing"):
        p = CKKSParameters.from_bits(10, 50, 40, 1, 50, 1, insecure=True)
    assert p.security_bits == 0


def test_the_sparse_secret_of_bootstrapping_is_held_to_its_estimates():
    """At N = 2^15 the chain is within the dense table."""
    with pytest.raises(InsecureParametersError, match=r"N = 2\^16 and larger only, not for N = 32768: use n16-bootstrap"):
        CKKSParameters.from_bits(15, 50, 40, 0, 50, 2, bootstrap=True)
    with pytest.raises(InsecureParametersError, match=r"at most 99 bits, not 100\.0"):
        CKKSParameters.from_bits(16, 50, 40, 12, 50, 8, bootstrap=True)
    with pytest.raises(InsecureParametersError, match="2\\^16 and larger"):
        CKKSParameters.from_dict(insecure_bootstrapping() | {"insecure": False})
    assert CKKSParameters.from_bits(17, 49, 40, 13, 50, 8, bootstrap=True).security_bits == 128


def insecure_bootstrapping():
    with pytest.warns(UserWarning, match="protect nothing"):
        return CKKSParameters.from_bits(15, 50, 40, 0, 50, 2, insecure=True, bootstrap=True).to_dict()


def test_round_trip_through_json():
    p = parameter_set("n14")
    again = CKKSParameters.from_dict(json.loads(json.dumps(p.to_dict())))
    assert again == p and again.fingerprint == p.fingerprint and len(p.fingerprint) == 16
    assert p.fingerprint != parameter_set("n13").fingerprint


def test_files_cannot_smuggle_in_insecure_parameters():
    with pytest.raises(InsecureParametersError):
        CKKSParameters.from_dict(toy_parameters().to_dict())
    honest = toy_parameters().to_dict() | {"insecure": False}
    with pytest.raises(InsecureParametersError):
        CKKSParameters.from_dict(honest)


@pytest.mark.parametrize(
    "change",
    [
        {"ring_degree": 16383},
        {"moduli": []},
        {"moduli": [15] * 8},
        {"special_moduli": [2**70]},
        {"digit_size": 0},
        {"scale_bits": 40.5},
        {"moduli": None},
        {"insecure": 1},
    ],
)
def test_malformed_parameters_are_named(change):
    with pytest.raises(ParameterError):
        CKKSParameters.from_dict(parameter_set("n14").to_dict() | change)


def test_special_moduli_must_cover_a_digit():
    p = toy_parameters()
    with pytest.raises(ParameterError, match="special moduli"):
        CKKSParameters(p.ring_degree, p.moduli[:3], p.moduli[3:4], 40, 1, insecure=True)


def test_number_theory():
    assert [n for n in range(60) if is_prime(n)] == [n for n in range(2, 60) if all(n % d for d in range(2, n))]
    q = nearest_prime(2.0**40, 2048, set())
    root = primitive_root_of_unity(2048, q)
    assert pow(root, 1024, q) == q - 1


def test_the_native_engine_refuses_more_digits_than_it_adds_exactly():
    with pytest.raises(ParameterError, match="more than the 10 digits"):
        Context(toy_parameters(levels=10, special_count=1))
