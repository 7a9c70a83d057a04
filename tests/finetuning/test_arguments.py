"""EncryptedTrainingArguments: what has a meaning on ciphertexts is used, everything else is refused by name."""

import dataclasses

import pytest
from transformers import TrainingArguments

from hf_he.errors import ParameterError
from hf_he.finetuning.arguments import SUPPORTED, EncryptedTrainingArguments

CALIBRATED = {"divisor": 1.0, "eps": 0.02, "loss_bound": 12.0}


def test_defaults_and_settings(tmp_path):
    args = EncryptedTrainingArguments(str(tmp_path), max_steps=10, lora_rank=4, weight_decay=0.1)
    settings = args.settings(1000, **CALIBRATED)
    assert (settings.rank, settings.steps, settings.sequences, settings.optimizer, settings.weight_decay) == (4, 10, 16, "adamw", 0.1)
    assert args.parameter_set_name == "n14" and args.device.type == "cpu"
    assert EncryptedTrainingArguments(str(tmp_path), refresh="bootstrap").parameter_set_name == "n16-bootstrap"


def test_schedule(tmp_path):
    args = EncryptedTrainingArguments(str(tmp_path), num_train_epochs=2, warmup_steps=0.25, lr_scheduler_type="linear", optim="sgd", momentum=0.5)
    settings = args.settings(33, **CALIBRATED)
    assert (settings.steps, settings.warmup_steps, settings.schedule, settings.optimizer, settings.momentum) == (6, 2, "linear", "sgd", 0.5)


def test_given_ranges_win_over_calibrated_ones(tmp_path):
    settings = EncryptedTrainingArguments(str(tmp_path), divisor=3.0, loss_bound=9.0).settings(1, **CALIBRATED)
    assert (settings.divisor, settings.eps, settings.loss_bound) == (3.0, 0.02, 9.0)


def test_a_bootstrap_needs_a_larger_eps(tmp_path):
    client, bootstrap = (EncryptedTrainingArguments(str(tmp_path), eps_ratio=1e-4, refresh=refresh) for refresh in ("client", "bootstrap"))
    assert (client.calibrated_eps_ratio, bootstrap.calibrated_eps_ratio) == (1e-4, 1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp16": True}, "fp16 has no meaning in encrypted training"),
        ({"gradient_accumulation_steps": 2}, "micro-batches by itself"),
        ({"max_grad_norm": 1.0}, "not known to the server"),
        ({"optim": "adafactor"}, "has no encrypted form"),
        ({"adam_epsilon": 1e-6}, "eps inside the root"),
        ({"save_strategy": "steps"}, "after every step"),
        ({"lr_scheduler_type": "polynomial"}, "schedule must be one of"),
        ({"refresh": "never"}, "refresh must be"),
        ({"optimizer_location": "cloud"}, "optimizer_location must be one of"),
        ({"lora_rank": 0}, "rank must be"),
        ({"processes": 0}, "processes"),
        ({"eps_ratio": 0.0}, "eps_ratio"),
        ({"dataloader_num_workers": 3}, "dataloader_num_workers"),
        ({"push_to_hub": True}, "push_to_hub"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(ParameterError, match=message):
        EncryptedTrainingArguments(str(tmp_path), **values)


def test_supported_names_exist():
    assert {entry.name for entry in dataclasses.fields(TrainingArguments)} >= SUPPORTED
