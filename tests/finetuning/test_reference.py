"""The plaintext twin against stock torch training, up to its polynomials."""

import numpy as np
import pytest
import torch
from tiny_model import SENTENCES, save_tiny_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_he.errors import RangeError
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import PolynomialTraining
from hf_he.finetuning.schedule import learning_rate

LABELS = np.array([1, 0, 1, 1, 0])
STEPS = 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def adapted(directory):
    from peft import get_peft_model

    from hf_he.peft import HELoraConfig

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    model.set_mode("polynomial")
    return get_peft_model(model, HELoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))


def inputs(directory):
    return dict(AutoTokenizer.from_pretrained(directory)(SENTENCES, padding="max_length", max_length=32, return_tensors="pt"))


def run(directory, settings):
    training = PolynomialTraining(adapted(directory), settings)
    for _ in range(STEPS):
        training.step(inputs(directory), LABELS)
    return training


def exact(directory, settings):
    """Stock autograd and cross-entropy, SGD or AdamW with eps inside the root."""
    model = adapted(directory).double().eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    moments = {name: [torch.zeros_like(parameter), torch.zeros_like(parameter)] for name, parameter in trained.items()}
    losses = []
    for step in range(1, STEPS + 1):
        loss = F.cross_entropy(model(**inputs(directory)).logits, torch.from_numpy(LABELS))
        losses.append(float(loss.detach()))
        rate = learning_rate(settings.schedule, settings.learning_rate, step, settings.steps)
        scales = settings.gradient_scales or [1.0] * len(trained)
        for (name, parameter), gradient, scale in zip(trained.items(), torch.autograd.grad(loss, list(trained.values())), scales, strict=True):
            m, v = moments[name]
            with torch.no_grad():
                if settings.optimizer == "sgd":
                    m.mul_(settings.momentum).add_(gradient)
                    parameter -= rate * m
                else:
                    m.mul_(settings.beta1).add_(gradient, alpha=1 - settings.beta1)
                    v.mul_(settings.beta2).add_(gradient.square(), alpha=1 - settings.beta2)
                    m_hat, v_hat = m / (1 - settings.beta1**step), v / (1 - settings.beta2**step)
                    parameter -= rate * m_hat / (v_hat + settings.eps / scale**2).sqrt()
    return losses, {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (TrainingSettings(optimizer="sgd", learning_rate=0.1, steps=STEPS, loss_degree=31), 1e-3),
        (TrainingSettings(optimizer="adamw", learning_rate=1e-2, steps=STEPS, divisor=4.0, eps=0.08, loss_degree=31), 1e-2),
        (
            TrainingSettings(
                optimizer="adamw",
                learning_rate=1e-2,
                steps=STEPS,
                divisor=4.0,
                eps=0.02,
                loss_degree=31,
                gradient_scales=tuple(2.0 ** (i % 4) for i in range(6)),
            ),
            1e-2,
        ),
    ],
    ids=["sgd", "adamw", "adamw with scales"],
)
def test_training_is_stock_training_up_to_its_polynomials(directory, settings, tolerance):
    training = run(directory, settings)
    losses, expected = exact(directory, settings)
    start = {name: parameter.detach() for name, parameter in adapted(directory).double().named_parameters() if parameter.requires_grad}
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert moved > 1e-2
    assert training.losses[-1] < training.losses[0]
    np.testing.assert_allclose(training.losses, losses, atol=1e-3)
    for name, values in training.adapter.items():
        torch.testing.assert_close(values, expected[name], atol=tolerance * moved, rtol=0)


def test_a_range_that_does_not_hold_is_an_error(directory):
    with pytest.raises(RangeError, match="optimizer"):
        run(directory, TrainingSettings(divisor=1e-6, eps=1e-8, steps=STEPS))


def test_regression(directory):
    model = adapted(directory)
    model.get_base_model().classifier.modules_to_save["default"] = torch.nn.Linear(32, 1)
    model.config.num_labels = 1
    training = PolynomialTraining(model, TrainingSettings(optimizer="sgd", learning_rate=0.05, steps=STEPS, momentum=0.0))
    losses = [training.step(inputs(directory), LABELS.astype(float)) for _ in range(STEPS)]
    assert losses == training.losses
    assert losses[-1] < losses[0]
