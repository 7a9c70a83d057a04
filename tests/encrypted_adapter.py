"""A small model with a real PEFT adapter whose trained parameters are encrypted leaves, and their gradients in the clear."""

import numpy as np
import peft
import torch
from torch import nn

from hf_he.ops import weights


def adapted(model: nn.Module, rank: int = 2, targets=("query", "key", "value")) -> nn.Module:
    """LoRA with scaling 1 on `targets`, random lora_B, and the classifier in modules_to_save; double precision."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), modules_to_save=["classifier"], task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(model, config).double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return wrapped


def periodic(lab, values: torch.Tensor):
    """[vectors] ciphertexts of a trained matrix or vector."""
    rows = weights.reference(values.detach().double().numpy(), lab.packing)
    return lab.backend.encrypt(np.tile(rows, lab.packing.slots // lab.packing.features), lab.secret)


def leaf(lab, values: torch.Tensor):
    """An encrypted weight or bias."""
    if values.ndim == 2:
        return lab.session.weight(periodic(lab, values), tuple(values.shape))
    return lab.session.bias(periodic(lab, values), values.shape[0])


def install(lab, model: nn.Module) -> dict:
    """Replace every parameter that requires a gradient by an encrypted leaf; the leaves by name."""
    leaves = {}
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            owner, attribute = name.rsplit(".", 1)
            module = model.get_submodule(owner)
            del module._parameters[attribute]
            leaves[name] = leaf(lab, parameter)
            setattr(module, attribute, leaves[name])
    return leaves


def decrypted(lab, weight) -> np.ndarray:
    """A weight-like EncryptedTensor as a matrix or vector; every lane must hold the same."""
    shape, c = tuple(weight.shape), lab.packing.features
    lanes = lab.backend.decrypt(weight.ciphertext, lab.secret).reshape(weight.ciphertext.count, -1, c)
    assert np.abs(lanes - lanes[:, :1]).max() <= 1e-3 * np.abs(lanes).max()
    if len(shape) == 1:
        return lanes[:, 0].reshape(-1)[: shape[0]]
    rows = lanes[:, 0].reshape(weights.count(shape), -1)[:, : max(shape)]
    return rows if weights.orientation(shape) == "rows" else rows.T


def relative_error(found: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected.numpy()))
