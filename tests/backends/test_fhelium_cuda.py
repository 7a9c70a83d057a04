"""The FHElium backend on a CUDA device, as far as it goes without one: torch's fake tensors have a device and a shape and no values, so an operation that
meets a tensor of the host beside one of the card, or waits for a value of the card, raises an error."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_he.backends import fhelium
from hf_he.backends.base import Ciphertext, EvaluationKeys
from hf_he.backends.fhelium_card import typed_card_errors
from hf_he.backends.fhelium_keys import FheliumKeys
from hf_he.ckks.parameters import parameter_set
from hf_he.errors import BackendUnavailableError, DeviceMemoryError

CARD = torch.device("cuda", 0)
PARAMETERS = parameter_set("n13")
TOP = PARAMETERS.max_level


@pytest.fixture(scope="module")
def fake():
    """One mode for all tests: FHElium keeps tables by device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@pytest.fixture
def backend(fake, monkeypatch):
    """With evaluation keys on the host, in fake tensors; the random words that encoding rounds with come from a kernel that runs on a card only."""
    pytest.importorskip("fhelium", reason="FHElium is not installed")
    if torch.cuda.is_available():
        pytest.skip("the contract suite runs on the card itself")
    from fhelium import ConjugationKey, RelinearizationKey, RotationKey
    from fhelium.native import runtime
    from triton_csprng import chacha20

    monkeypatch.setattr(runtime, "_NATIVE_STATUS", replace(runtime.native_status(), backends=("cpu", "cuda")))
    monkeypatch.setattr(chacha20, "chacha20_blocks", torch.zeros_like)
    monkeypatch.setattr(fhelium, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**34))
    chain = len(PARAMETERS.moduli) + len(PARAMETERS.special_moduli)
    digits = -(-len(PARAMETERS.moduli) // PARAMETERS.digit_size)

    def key(kind, **options):
        return kind(data=torch.zeros(digits, 2, chain, PARAMETERS.ring_degree, dtype=torch.int64), prime_ids=tuple(range(chain)), **options)

    with fake:
        made = fhelium.FheliumBackend(PARAMETERS, "cuda:0")
        rotations = {step: key(RotationKey, rotation_step=-step % PARAMETERS.slots) for step in (1, 2)}
        held = FheliumKeys(key(RelinearizationKey), rotations, key(ConjugationKey), fingerprint=PARAMETERS.fingerprint)
        made.load_evaluation_keys(EvaluationKeys(held, "key", frozenset(rotations), True))
        yield made


def ciphertext(*batch: int, components: int = 2) -> Ciphertext:
    data = torch.zeros(components, *batch, TOP + 1, PARAMETERS.ring_degree, dtype=torch.int64, device=CARD)
    return Ciphertext(data, batch, TOP, PARAMETERS.scale_at(TOP), "key", components)


OPERATIONS = {
    "add": lambda b, a: b.add(a, a),
    "subtract": lambda b, a: b.subtract(a, b.take(a, 1)),
    "negate": lambda b, a: b.negate(a),
    "sum": lambda b, a: b.sum(a),
    "multiply": lambda b, a: b.multiply(a, a),
    "relinearize": lambda b, a: b.relinearize(ciphertext(3, 4, components=3)),
    "rescale": lambda b, a: b.rescale(a),
    "multiply_scalar": lambda b, a: b.multiply_scalar(a, 0.3),
    "linear_combination": lambda b, a: b.linear_combination(np.full((5, 3), 2**22), a, 2.0**20),
    "drop_level": lambda b, a: b.drop_level(a, 1),
    "rotate": lambda b, a: b.rotate(a, (0, 1, 2)),
    "sum_rotated": lambda b, a: b.sum_rotated(a, (0, 1, 2)),
    "conjugate": lambda b, a: b.conjugate(a),
    "stack": lambda b, a: b.stack([a, a]),
    "reshape": lambda b, a: b.reshape(a, (12,)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_stay_on_the_card_and_wait_for_nothing(backend, name):
    result = OPERATIONS[name](backend, ciphertext(3, 4))
    assert result.payload.device == CARD and result.payload.dtype == torch.int64
    assert result.payload.shape == (result.components, *result.batch_shape, result.level + 1, PARAMETERS.ring_degree)


@pytest.mark.parametrize("period", [1, 8, PARAMETERS.slots])
@pytest.mark.parametrize("name", ["add_plain", "multiply_plain"])
def test_periodic_plaintexts_are_on_the_card(backend, period, name):
    plain = backend.encode(np.ones((4, period)), TOP)
    assert getattr(backend, name)(ciphertext(3, 4), plain).payload.device == CARD


def test_diagonal_products_stay_on_the_card(backend):
    plain = backend.encode(np.ones((2, 3, 8)), TOP)
    result = backend.multiply_plain_sum(plain, ciphertext(3, 4))
    assert (result.payload.device, result.batch_shape) == (CARD, (2, 4))


def test_scalars_are_added_on_the_card(backend):
    """The constant one in Montgomery form is a value of the card, fetched once."""
    backend.__dict__["_one"] = [1] * (TOP + 1)
    assert backend.add_scalar(ciphertext(3, 4), 0.25).payload.device == CARD


class Failing:
    """What fails on a card, as torch says it."""

    device = CARD

    def __init__(self) -> None:
        self.made = True

    def fill(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def launch(self, message: str) -> None:
        raise torch.AcceleratorError(message)


def test_errors_of_a_card_say_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    failing = typed_card_errors(Failing)()
    assert failing.made
    with pytest.raises(DeviceMemoryError, match=r"cuda:0 does not suffice, 1.0 of 24.0 GB are free: .*smaller batch.*--device cpu"):
        failing.fill()
    with pytest.raises(BackendUnavailableError, match=r"other cards than cuda:0: `make install-fhelium FHELIUM_BACKENDS=CPU.CUDA CUDAARCHS=89`"):
        failing.launch("CUDA error: no kernel image is available for execution on the device")
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        failing.launch("CUDA error: an illegal memory access was encountered")


def test_the_backend_has_typed_errors():
    for method in (fhelium.FheliumBackend._multiply, fhelium.FheliumBackend.generate_evaluation_keys, fhelium.FheliumBackend.deserialize):
        assert method.__wrapped__ is not None
