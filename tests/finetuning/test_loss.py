"""Loss gradients on ciphertexts against their twins, and the twins against torch's autograd."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_he.errors import ParameterError, RangeError, ShapeError
from hf_he.finetuning.loss import CrossEntropy, MeanSquaredError, rotations
from hf_he.ops.operand import Operand
from hf_he.tensor import Labels


def on_first_tokens(lab, values, level=None):
    """[B, k] -> a ciphertext [1] with these on the features of each sequence's first token."""
    slots = np.zeros((lab.packing.tokens, lab.packing.sequences, lab.packing.features))
    slots[0, : len(values), : values.shape[1]] = values
    return lab.backend.encrypt(slots.reshape(1, -1), lab.secret, level)


def encrypted_gradient(lab, loss, logits, targets, weights, level=None):
    """[B, k] from the first tokens; every other slot must be zero."""
    k = logits.shape[1]
    labels = Labels(lab.session, k, on_first_tokens(lab, targets), on_first_tokens(lab, np.repeat(weights[:, None], k, axis=1)))
    out = loss.gradient(lab.session, Operand(lab.session, k, on_first_tokens(lab, logits, level), pooled=True), labels)
    assert out.pooled
    found = lab.backend.decrypt(out.ciphertext, lab.secret).reshape(lab.packing.tokens, lab.packing.sequences, lab.packing.features)
    assert np.abs(found[1:]).max() < 1e-5
    assert np.abs(found[..., k:]).max() < 1e-5
    return found[0, :, :k]


def example(lab, k, spread, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.uniform(-0.5, 0.5, (lab.packing.sequences, k)) * spread
    labels = rng.integers(k, size=lab.packing.sequences)
    weights = np.ones(lab.packing.sequences)
    weights[-2:] = 0.0
    return logits, labels, weights


@pytest.mark.parametrize(("k", "bound", "tolerance"), [(2, 8.0, 2e-3), (3, 6.0, 1e-2), (5, 4.0, 1e-2)])
@pytest.mark.parametrize("level", [7, 2, 0])
def test_encrypted_cross_entropy(lab, k, bound, tolerance, level):
    loss = CrossEntropy(k, bound)
    logits, labels, weights = example(lab, k, bound)
    found = encrypted_gradient(lab, loss, logits, np.eye(k)[labels], weights, level)
    np.testing.assert_allclose(found, loss.reference(logits, labels, weights), atol=2e-5 * np.exp(bound / 2))
    tensor = torch.tensor(logits, requires_grad=True)
    (F.cross_entropy(tensor, torch.from_numpy(labels), reduction="none") * torch.from_numpy(weights)).sum().backward()
    np.testing.assert_allclose(found, tensor.grad.numpy(), atol=tolerance)
    assert found[-2:] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("bound", "degree", "error"), [(12.0, 15, 6.2e-3), (12.0, 23, 8e-4), (12.0, 31, 1e-4), (8.0, 15, 9e-4)])
def test_two_classes_cost_the_error_of_the_sigmoid(bound, degree, error):
    loss = CrossEntropy(bound=bound, degree=degree)
    logits = np.stack([np.zeros(1001), np.linspace(-bound, bound, 1001)], axis=1)
    labels = np.arange(1001) % 2
    tensor = torch.tensor(logits, requires_grad=True)
    F.cross_entropy(tensor, torch.from_numpy(labels), reduction="sum").backward()
    worst = np.abs(loss.reference(logits, labels) - tensor.grad.numpy()).max()
    assert 0.8 * error < worst < error


@pytest.mark.parametrize(("k", "bound"), [(3, 12.0), (4, 8.0), (10, 6.0)])
def test_more_classes_stay_within_the_bound_of_the_reciprocal(k, bound):
    loss = CrossEntropy(k, bound)
    rng = np.random.default_rng(k)
    logits = rng.normal(size=(500, k)) * bound / 4
    logits = np.clip(logits - logits.mean(1, keepdims=True), -0.9 * bound, 0.9 * bound)
    logits -= logits.mean(1, keepdims=True)
    labels = rng.integers(k, size=500)
    tensor = torch.tensor(logits, requires_grad=True)
    F.cross_entropy(tensor, torch.from_numpy(labels), reduction="sum").backward()
    np.testing.assert_allclose(loss.reference(logits, labels), tensor.grad.numpy(), atol=2e-3)


def test_two_classes_take_six_levels_and_two_rotations(lab):
    loss = CrossEntropy()
    logits, labels, weights = example(lab, 2, 8.0)
    lab.backend.log.reset()
    lab.backend.rotations_used.clear()
    encrypted_gradient(lab, loss, logits, np.eye(2)[labels], weights)
    assert lab.session.refresh.count == 0
    assert lab.backend.log.operations()["rotate"] == 2
    assert set(lab.backend.rotations_used) == rotations(lab.packing, 2)


def test_mean_squared_error(lab):
    rng = np.random.default_rng(0)
    predictions, targets = rng.normal(size=(2, lab.packing.sequences, 1))
    weights = np.ones(lab.packing.sequences)
    weights[0] = 0.0
    found = encrypted_gradient(lab, MeanSquaredError(), predictions, targets, weights)
    np.testing.assert_allclose(found, MeanSquaredError().reference(predictions, targets[:, 0], weights), atol=1e-5)
    tensor = torch.tensor(predictions, requires_grad=True)
    (F.mse_loss(tensor, torch.from_numpy(targets), reduction="none") * torch.from_numpy(weights)[:, None]).sum().backward()
    np.testing.assert_allclose(found, tensor.grad.numpy(), atol=1e-5)


def test_logits_beyond_the_bound_are_an_error_in_the_clear():
    with pytest.raises(RangeError, match="loss: logits spread by 13"):
        CrossEntropy().reference(np.array([[0.0, 13.0]]), np.array([1]))


def test_calibration_leaves_room():
    assert CrossEntropy.calibrated(np.array([[-0.5, 0.5]])).bound == 8.0
    assert CrossEntropy.calibrated(np.array([[-4.0, 4.0]])).bound == 12.0
    assert CrossEntropy.calibrated(np.array([[6.0, 0.0, 0.0, 0.0]])).num_labels == 4


def test_too_wide_a_softmax_of_many_classes_names_the_way_out():
    with pytest.raises(ParameterError, match=r"3 classes whose logits spread by up to 20 .*--loss-location client"):
        _ = CrossEntropy(3, 20.0).reciprocal


def test_wrong_settings_and_models(lab):
    with pytest.raises(ShapeError, match="of 1 output"):
        encrypted_gradient(lab, MeanSquaredError(), np.zeros((4, 2)), np.zeros((4, 2)), np.ones(4))
    with pytest.raises(ParameterError, match="MeanSquaredError"):
        CrossEntropy(num_labels=1)
    with pytest.raises(ParameterError, match="bound"):
        CrossEntropy(bound=float("inf"))
    logits, labels, weights = example(lab, 3, 2.0)
    with pytest.raises(ShapeError, match="2 classes"):
        encrypted_gradient(lab, CrossEntropy(), logits, np.eye(3)[labels], weights)
