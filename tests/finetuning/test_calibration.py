"""Calibration: ranges of the optimiser and of the loss, and one scale per parameter."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_run import DATA
from transformers import AutoTokenizer

from hf_he.checkpoints import load_classifier
from hf_he.errors import ParameterError
from hf_he.evaluation import encode_texts
from hf_he.finetuning.calibration import LATE_MARGIN, calibrate
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import PolynomialTraining
from hf_he.finetuning.step import adapted_model

SETTINGS = TrainingSettings(learning_rate=1e-2, steps=6, sequences=5, target_modules=("query", "value"))
BATCHES = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def squares(tiny, steps):
    """Largest squared gradient of each parameter along `steps` steps of torch's AdamW."""
    torch.manual_seed(0)
    model = adapted_model(load_classifier(tiny).double(), SETTINGS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, 1e-2, weight_decay=0.0), []
    for rows in BATCHES[:steps]:
        batch = DATA.select(rows)
        optimizer.zero_grad()
        model(**encode_texts(AutoTokenizer.from_pretrained(tiny), batch), labels=torch.tensor(batch.labels)).loss.backward()
        found.append([float(parameter.grad.abs().max()) ** 2 for parameter in trained])
        optimizer.step()
    return np.array(found)


def test_scales_bring_every_parameter_to_one_size(tiny):
    found = calibrate(tiny, AutoTokenizer.from_pretrained(tiny), DATA, SETTINGS, BATCHES)
    seen = squares(tiny, 3)
    largest = seen.max(0) * np.where(seen[0] == 0.0, LATE_MARGIN, 1.0)
    assert (seen[0] == 0.0).any() and largest.min() > 0.0 and largest.max() > 100 * largest.min()
    scaled = largest * np.square(found.gradient_scales)
    assert scaled.min() >= 0.5 - 1e-9 and scaled.max() <= 2.0 + 1e-9 < found.divisor < 40.0
    assert all(np.log2(scale) == round(np.log2(scale)) for scale in found.gradient_scales)
    assert found.eps == pytest.approx(1e-3 * found.divisor)
    smaller = calibrate(tiny, AutoTokenizer.from_pretrained(tiny), DATA, SETTINGS, BATCHES, eps_ratio=1e-4)
    assert smaller.eps == pytest.approx(1e-4 * smaller.divisor) and smaller.gradient_scales == found.gradient_scales


def test_sgd_is_not_scaled(tiny):
    found = calibrate(tiny, AutoTokenizer.from_pretrained(tiny), DATA, dataclasses.replace(SETTINGS, optimizer="sgd"), BATCHES[:1])
    assert found.gradient_scales == ()
    with pytest.raises(ParameterError, match="learning rates of sgd"):
        dataclasses.replace(SETTINGS, optimizer="sgd", gradient_scales=(1.0,))


def test_the_twin_follows_torch_adamw_where_one_eps_would_not(tiny):
    """Movement of the LoRA matrices over a few steps: close to AdamW's with scales, a fraction of it without."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    found = calibrate(tiny, tokenizer, DATA, SETTINGS, BATCHES)

    def moved(settings):
        torch.manual_seed(0)
        training = PolynomialTraining(adapted_model(load_classifier(tiny).double(), settings), settings)
        start = training.adapter
        for rows in BATCHES * 2:
            batch = DATA.select(rows)
            training.step(encode_texts(tokenizer, batch), batch.labels)
        return sum(float((values - start[name]).abs().sum()) for name, values in training.adapter.items() if "lora_B" in name)

    raw = float(squares(tiny, 3).max())
    ours = moved(dataclasses.replace(SETTINGS, **dataclasses.asdict(found)))
    shared = moved(dataclasses.replace(SETTINGS, divisor=16 * raw, eps=0.016 * raw))
    assert ours > 2 * shared


def test_settings_with_scales_travel(tiny):
    settings = dataclasses.replace(SETTINGS, gradient_scales=(0.5, 4.0))
    assert TrainingSettings.from_bytes(settings.to_bytes()) == settings
    with pytest.raises(ParameterError, match="gradient_scales"):
        dataclasses.replace(SETTINGS, gradient_scales=(0.0,))
