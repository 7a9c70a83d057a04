"""Encrypted gradients beside torch's."""

import torch
from encrypted_adapter import decrypted, leaf, relative_error

from hf_he.ops.operand import Operand
from hf_he.tensor import state_tensor

TOLERANCE = 1e-3


def encrypted_gradient(lab, values: torch.Tensor, pooled: bool):
    """Upstream gradients [B, T, F], or [B, F] of pooled states."""
    if not pooled:
        return lab.encrypt(values)
    spread = torch.zeros(lab.packing.sequences, lab.packing.tokens, values.shape[-1], dtype=torch.float64)
    spread[:, 0] = values
    return state_tensor(Operand(lab.session, values.shape[-1], lab.encrypt(spread).ciphertext, pooled=True))


def check(lab, function, *values, level=None, tolerance=TOLERANCE):
    """`function` of encrypted states [B, T, F], trained matrices [out, in] and vectors [features]: gradients of all of them."""
    plain = [value.clone().requires_grad_() for value in values]
    states = [lab.encrypt(value, level).requires_grad_() if value.ndim == 3 else leaf(lab, value) for value in values]
    expected, found = function(*plain), function(*states)
    assert found.shape == expected.shape
    upstream = lab.random(*expected.shape)
    expected.backward(upstream)
    torch.autograd.backward([found], [encrypted_gradient(lab, upstream, expected.ndim == 2)])
    for tensor, state in zip(plain, states, strict=True):
        if tensor.ndim == 3:
            gradient = lab.decrypt(state.grad.ciphertext, tensor.shape[-1]).numpy()
            assert abs(state.grad.ciphertext.scale / lab.backend.parameters.scale_at(state.grad.level) - 1) < 1e-9
        else:
            gradient = decrypted(lab, state.grad)
            assert state.grad.level >= 1
        assert relative_error(gradient, tensor.grad) <= tolerance


def in_polynomial_mode(module, entry):
    module.layer_name = "layer"
    module.configure("polynomial", entry)
    return module.double()


def encrypted_labels(lab, targets, weights, **settings):
    """[B, labels] targets and [B] weights."""
    slots = [torch.zeros(lab.packing.sequences, lab.packing.tokens, targets.shape[1], dtype=torch.float64) for _ in range(2)]
    slots[0][:, 0], slots[1][:, 0] = targets, weights[:, None]
    return lab.session.labels(*(lab.encrypt(values).ciphertext for values in slots), targets.shape[1], **settings)
