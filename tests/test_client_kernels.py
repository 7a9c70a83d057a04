"""Classifiers whose attention divides by the number of valid keys: the client puts those counts into the encrypted masks."""

import pytest
from tiny_model import SENTENCES, save_tiny_model

from hf_he.client import Client
from hf_he.errors import ParameterError
from hf_he.handlers.attention import mask_power
from hf_he.server import Server

KERNELS = {
    "power softmax": {"attention_kernel": "power_softmax", "power_softmax_eps": 0.5},
    "normalized gaussian": {"attention_kernel": "normalized_gaussian_kernel", "power_softmax_eps": 0.05},
}


def client_of(directory, kernel, **changes):
    model = save_tiny_model(directory, power_softmax_length_agnostic=True, **KERNELS[kernel], **changes)
    return Client.from_pretrained(model, backend="simulator")


@pytest.mark.parametrize("kernel", KERNELS)
def test_padded_sentences(tmp_path, kernel):
    client = client_of(tmp_path, kernel)
    server = Server(tmp_path, client.keygen().evaluation)
    result = client.infer(server, SENTENCES)
    assert result.max_logit_error < 1e-3
    assert result.agreement == 1.0


def test_layers_that_need_different_masks(tmp_path):
    model = client_of(tmp_path, "normalized gaussian", num_hidden_layers=2).model
    entries = {name: dict(entry) for name, entry in model.config.approximations.items()}
    next(entry for entry in entries.values() if "squarings" in entry)["squarings"] = 7
    model.set_approximations(entries)
    with pytest.raises(ParameterError, match="same squarings"):
        mask_power(model)
