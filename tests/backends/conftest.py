"""Every backend that runs here, and the one-file example, each with keys of its own."""

import pytest
from party import Party, toy_parameters

from hf_he.backends import BACKENDS, available_backends
from hf_he.ckks.parameters import parameter_set

AVAILABLE = [name for name, (ok, _) in available_backends().items() if ok]
EXAMPLE = "fifth"


@pytest.fixture(scope="module")
def example():
    """tests/backends/fifth.py, one file, as a backend like the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, EXAMPLE, "fifth:FifthBackend")
        yield


@pytest.fixture(scope="module", params=[(name, size) for name in (*AVAILABLE, EXAMPLE) for size in ("toy", "n14")], ids=lambda p: f"{p[0]}-{p[1]}")
def party(request, example) -> Party:
    name, size = request.param
    if (name, size) == ("desilo", "toy"):
        pytest.skip("DESILO FHE chooses its own rings, none of them this small")
    if size == "toy":
        return Party(name, toy_parameters())
    return Party(name, parameter_set("n14-6" if name == "desilo" else size))
