"""Loss terms see only the rows that carry their target; teacher logits keep the order of the texts."""

import pytest
import torch
from tiny_model import SENTENCES, save_tiny_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_he.data import TextDataset
from hf_he.training.distillation import (
    NO_LABEL,
    build_dataset,
    hidden_loss,
    label_loss,
    predict_logits,
    random_sequences,
    soft_loss,
)

ROWS = TextDataset("mr", "train", tuple(SENTENCES), None, (1, 0, 1, 1, 0))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_label_loss_ignores_rows_without_label():
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]])
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([1, 0]))
    torch.testing.assert_close(label_loss(logits, torch.tensor([1, NO_LABEL, 0])), expected)


def test_label_loss_of_a_regression_is_the_squared_error():
    logits = torch.tensor([[1.0], [3.0]])
    torch.testing.assert_close(label_loss(logits, torch.tensor([0.0, float("nan")])), torch.tensor(1.0))


def test_soft_loss_is_the_scaled_divergence_and_zero_at_the_teacher():
    teacher = torch.tensor([[2.0, -1.0], [float("nan")] * 2, [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]])
    p, q = (values[0].div(2.0).softmax(-1) for values in (teacher, student))
    expected = 4.0 * (p * (p / q).log()).sum() / 2
    torch.testing.assert_close(soft_loss(student, teacher, 2.0), expected)
    torch.testing.assert_close(soft_loss(teacher + 3.0, teacher, 2.0), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_batches_without_targets_give_a_zero_that_has_a_gradient():
    logits = torch.ones(2, 2, requires_grad=True)
    loss = label_loss(logits, torch.full((2,), NO_LABEL)) + soft_loss(logits, torch.full((2, 2), float("nan")), 2.0)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros(2, 2))


def test_hidden_loss_ignores_scale_embeddings_and_masked_positions():
    states = [torch.randn(2, 3, 8) for _ in range(3)]
    scaled = [torch.randn(2, 3, 8), 2.0 * states[1], states[2] + 1.0]
    keep = torch.ones(2, 3)
    assert float(hidden_loss(states, scaled, keep)) < 1e-6
    scaled[1] = scaled[1].clone()
    scaled[1][0, 2] = torch.randn(8)
    assert float(hidden_loss(states, scaled, keep)) > 0.01
    keep[0, 2] = 0
    assert float(hidden_loss(states, scaled, keep)) < 1e-6


def test_dataset_rows_carry_their_own_targets(tokenizer):
    logits = torch.arange(14.0).reshape(7, 2)
    rows = build_dataset(tokenizer, ROWS, ("great acting", "no heart"), teacher_logits=logits, repeats=2, random_rows=3, max_length=16)
    assert len(rows) == 2 * 5 + 2 + 3
    assert rows.labels.tolist() == [1, 0, 1, 1, 0] * 2 + [NO_LABEL] * 5
    torch.testing.assert_close(rows.teacher_logits[:12], torch.cat([logits[:5], logits]))
    assert rows.teacher_logits[12:].isnan().all()
    item = rows[10]
    assert tokenizer.decode(item["input_ids"], skip_special_tokens=True) == "great acting"
    assert item["input_ids"].shape == (16,)


def test_random_sequences_look_like_tokenized_text(tokenizer):
    batch = random_sequences(tokenizer, 200, 16, seed=0)
    lengths = batch["attention_mask"].sum(1)
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert (batch["input_ids"].gather(1, lengths[:, None] - 1) == tokenizer.sep_token_id).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert (int(lengths.min()), int(lengths.max())) == (2, 16)


def test_teacher_logits_come_back_in_the_order_of_the_texts(directory, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    model.set_mode("exact")
    together = predict_logits(model, tokenizer, ROWS, max_length=16, batch_size=2, progress=False)
    for row, text in enumerate(ROWS.first):
        with torch.no_grad():
            alone = model(**tokenizer([text], return_tensors="pt")).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)
