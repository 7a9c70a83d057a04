"""The trainer with a range penalty: its loss, its log, gradient accumulation."""

import pytest
import torch
from datasets import Dataset
from tiny_model import SENTENCES, save_tiny_model
from transformers import AutoTokenizer, TrainingArguments

from hf_he import HEBertForSequenceClassification, RangedTrainer, RangePenalty, RangeTargets, collect_ranges


@pytest.fixture
def tiny(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    encoded = AutoTokenizer.from_pretrained(folder)(SENTENCES[:4], padding="max_length", max_length=32, truncation=True)
    return HEBertForSequenceClassification.from_pretrained(folder), Dataset.from_dict({**encoded, "labels": [1, 0, 1, 0]})


def trained(model, rows, penalty, folder, **options):
    fixed = {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    args = TrainingArguments(str(folder), **fixed, **options, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = RangedTrainer(model=model, args=args, train_dataset=rows, penalty=penalty, penalty_weight=0.5)
    trainer.train()
    return trainer


def test_loss_and_step_are_those_of_model_and_penalty(tiny, tmp_path):
    model, rows = tiny
    batch = {name: torch.tensor(rows[name]) for name in rows.column_names}
    penalty = RangePenalty.for_model(model, {k: v for k, v in batch.items() if k != "labels"}, RangeTargets(exponent=-0.5))
    with collect_ranges(model) as statistics:
        label = model.eval()(**batch).loss
    extra = penalty(statistics)
    gradient = torch.autograd.grad(label + 0.5 * extra, model.classifier.weight, retain_graph=True)[0]
    inner = model.bert.encoder.layer[0].output.dense.weight
    inner_gradient = torch.autograd.grad(label + 0.5 * extra, inner)[0]
    expected, inner_expected = (model.classifier.weight - 0.05 * gradient).detach(), (inner - 0.05 * inner_gradient).detach()
    trainer = trained(model, rows, penalty, tmp_path, per_device_train_batch_size=4)
    log = trainer.state.log_history[0]
    assert float(extra.detach()) > 0.0
    assert (log["label_loss"], log["penalty_loss"]) == pytest.approx((float(label.detach()), float(extra.detach())), rel=1e-5)
    torch.testing.assert_close(model.classifier.weight.detach(), expected)
    torch.testing.assert_close(inner.detach(), inner_expected)


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, tmp_path):
    model, rows = tiny
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = {name: value.clone() for name, value in trained(model, rows, None, tmp_path, per_device_train_batch_size=4).model.state_dict().items()}
    model.load_state_dict(start)
    parts = trained(model, rows, None, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2).model.state_dict()
    assert not torch.equal(whole["classifier.weight"], start["classifier.weight"])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
