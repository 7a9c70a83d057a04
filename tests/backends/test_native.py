"""The native backend: what it says when its kernels are not compiled yet."""

import pytest

from hf_he.backends import native
from hf_he.ckks.parameters import parameter_set


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_use_says_that_it_compiles(compiled, monkeypatch, caplog):
    monkeypatch.setattr(native, "has_compiled", lambda: compiled)
    monkeypatch.setattr(native.SecretKey, "generate", lambda context: "key")
    assert native.NativeBackend(parameter_set("n13")).generate_secret_key() == "key"
    assert ("about a minute" in caplog.text) != compiled
