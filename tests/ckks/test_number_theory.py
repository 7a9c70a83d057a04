"""Powers modulo a prime against Python integers."""

from hypothesis import given
from hypothesis import strategies as st

from hf_he.ckks.number_theory import centred, powers


@given(st.integers(2, 2**50 - 1), st.integers(0, 2**50), st.integers(0, 2**50), st.integers(1, 40))
def test_powers(modulus, base, start, count):
    expected = [centred(start * pow(base, i, modulus), modulus) for i in range(count)]
    assert powers(base % modulus, count, modulus, start).tolist() == expected


def test_the_largest_modulus():
    q = 2**50 - 27
    assert powers(q - 1, 5, q, q - 2).tolist() == [-2.0, 2.0, -2.0, 2.0, -2.0]
