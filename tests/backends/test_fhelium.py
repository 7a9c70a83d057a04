"""What the FHElium backend does the same on every device, against big integers and without FHElium: its matrix products, and which keys a card holds."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hf_he.backends import fhelium_matrix
from hf_he.backends.fhelium_keys import HOST, KeyResidency
from hf_he.backends.fhelium_matrix import residue_products
from hf_he.ckks.parameters import parameter_set

CARD = torch.device("meta")
"""A device that is not the host; torch has it everywhere."""


@pytest.mark.parametrize("most_pieces", [2, 4])
@pytest.mark.parametrize("bits", [1, 16, 24, 25])
@pytest.mark.parametrize("terms", [1, 17, 300, 2100])
def test_matrix_products_are_exact(bits, terms, most_pieces, monkeypatch):
    """With the largest residues (FHElium leaves up to 2 q) and weights: split into two, three and four pieces, and more terms than a float64 sum holds."""
    monkeypatch.setattr(fhelium_matrix, "MOST_PIECES", most_pieces)
    moduli = parameter_set("n16-bootstrap").moduli[:3]
    generator = np.random.default_rng(bits)
    residues = np.stack([generator.integers(0, 2 * q, (terms, 2, 5)) for q in moduli], axis=2)
    residues[: terms // 2 + 1] = 2 * np.array(moduli)[:, None] - 1
    weights = generator.integers(-(2**bits) + 1, 2**bits, (4, terms))
    weights[0], weights[1] = 2**bits - 1, 1 - 2**bits
    found = residue_products(weights, torch.from_numpy(residues), torch.tensor(moduli))
    expected = np.tensordot(weights.astype(object), residues.astype(object), axes=1) % np.array(moduli, dtype=object)[:, None]
    assert found.dtype == torch.int64 and found.transpose(0, 1).is_contiguous()
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.int64))


@dataclass(eq=False)
class Key:
    """What a key of FHElium shows of itself."""

    data: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def to(self, device: torch.device) -> "Key":
        return Key(self.data.to(device))


def keys(number: int) -> list[Key]:
    return [Key(torch.zeros(100, dtype=torch.int64)) for _ in range(number)]


def test_a_card_holds_the_keys_used_last():
    resident, (a, b, c) = KeyResidency(CARD, budget=1600), keys(3)
    first, second = resident(a), resident(b)
    assert first.device == CARD and (resident(a), resident(b)) == (first, second) and resident.held_bytes == 1600
    assert resident(a) is first
    resident(c)
    assert resident(a) is first, "b was used least recently"
    assert resident(b) is not second and resident.held_bytes == 1600
    assert {a.device, b.device, c.device} == {HOST}


def test_a_key_beyond_the_budget_is_copied_each_time():
    resident, (key,) = KeyResidency(CARD, budget=799), keys(1)
    assert resident(key).device == CARD and resident(key) is not resident(key) and resident.held_bytes == 0


def test_the_host_copies_nothing():
    resident, (key,) = KeyResidency(HOST), keys(1)
    assert resident(key) is key and resident.held_bytes == 0


def test_half_a_card_is_for_keys(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 24 * 2**30))
    assert KeyResidency(torch.device("cuda", 0)).budget == 12 * 2**30
