"""Train a classifier on labels, on a teacher's logits and on its hidden states, with the range penalty on top."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hf_he.data import TextDataset
from hf_he.evaluation import encode_texts, predictions_from_logits, score
from hf_he.nn import collect_ranges
from hf_he.training.ranged_trainer import RangedTrainer

NO_LABEL = -100
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


@dataclass
class LossWeights:
    """Weights of the terms of the loss; the label term sees labelled rows, the soft and hidden terms rows with teacher logits.

    label: cross-entropy (mean squared error for regression). soft: KL divergence from the teacher at `temperature`, times its square
    (Hinton et al., 2015). hidden: mean squared error of the normalised hidden states of every layer, at attended positions.
    penalty: `RangePenalty`, on every row.
    """

    label: float = 1.0
    soft: float = 0.0
    hidden: float = 0.0
    penalty: float = 0.0
    temperature: float = 2.0


class DistillationDataset(Dataset):
    """Rows of token tensors, all padded to one length, with a label (or NO_LABEL) and the teacher's logits (or NaN)."""

    def __init__(self, encoded: Mapping[str, torch.Tensor], labels: torch.Tensor, teacher_logits: torch.Tensor):
        self.encoded = {name: encoded[name] for name in _INPUTS if name in encoded}
        self.labels = labels
        self.teacher_logits = teacher_logits

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        index = torch.as_tensor(rows)
        columns = {name: tensor[index] for name, tensor in self.encoded.items()}
        columns |= {"labels": self.labels[index], "teacher_logits": self.teacher_logits[index]}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(rows))]

    def batch(self, rows: slice) -> dict[str, torch.Tensor]:
        """Model inputs of some rows, without labels."""
        return {name: tensor[rows] for name, tensor in self.encoded.items()}

    def batches(self, rows: int, size: int = 256) -> Iterator[dict[str, torch.Tensor]]:
        """Model inputs of about `rows` rows at equal distances, `size` at a time."""
        step = max(1, len(self) // rows)
        return (self.batch(slice(start, start + size * step, step)) for start in range(0, len(self), size * step))


def build_dataset(
    tokenizer,
    labelled: TextDataset,
    unlabelled: Sequence[str] = (),
    *,
    teacher_logits: torch.Tensor | None = None,
    num_outputs: int = 2,
    repeats: int = 1,
    random_rows: int = 0,
    max_length: int = 32,
    seed: int = 0,
) -> DistillationDataset:
    """Labelled rows `repeats` times, then unlabelled texts, then `random_rows` sequences of random tokens that only the penalty sees.

    `teacher_logits` [labelled + unlabelled, outputs] comes from `predict_logits` on the same texts in the same order.
    """
    encoded = encode_texts(tokenizer, labelled, max_length)
    count = len(labelled)
    if unlabelled:
        extra = encode_texts(tokenizer, TextDataset(labelled.task, "train", tuple(unlabelled), None, ()), max_length)
        encoded = {name: torch.cat([encoded[name], extra[name]]) for name in encoded}
    if teacher_logits is None:
        teacher_logits = torch.full((count + len(unlabelled), num_outputs), float("nan"))
    order = torch.cat([torch.arange(count).repeat(repeats), torch.arange(count, count + len(unlabelled))])
    encoded = {name: tensor[order] for name, tensor in encoded.items()}
    blank = float("nan") if labelled.is_regression else NO_LABEL
    labels = torch.tensor(labelled.labels, dtype=torch.float32 if labelled.is_regression else torch.int64)
    labels = torch.cat([labels.repeat(repeats), labels.new_full((len(unlabelled) + random_rows,), blank)])
    teacher_logits = torch.cat([teacher_logits[order], torch.full((random_rows, teacher_logits.shape[1]), float("nan"))])
    if random_rows:
        noise = random_sequences(tokenizer, random_rows, max_length, seed)
        encoded = {name: torch.cat([encoded[name], noise[name]]) for name in _INPUTS if name in encoded}
    return DistillationDataset(encoded, labels, teacher_logits)


def random_sequences(tokenizer, rows: int, max_length: int, seed: int) -> dict[str, torch.Tensor]:
    """Uniformly random tokens between [CLS] and [SEP], of random lengths from none to full: far outside any text a user would send."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(tokenizer), (rows, max_length), generator=generator)
    lengths = torch.randint(2, max_length + 1, (rows, 1), generator=generator)
    positions = torch.arange(max_length)
    ids[:, 0] = tokenizer.cls_token_id
    ids = ids.masked_fill(positions >= lengths, tokenizer.pad_token_id).scatter(1, lengths - 1, tokenizer.sep_token_id)
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": (positions < lengths).long()}


@torch.no_grad()
def predict_logits(model: nn.Module, tokenizer, texts: TextDataset, *, max_length: int, batch_size: int = 64, progress: bool = True) -> torch.Tensor:
    """Logits [rows, outputs] in the order of `texts`; rows of similar length share a batch, which is padded only as far as needed."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda row: len(texts.joined[row]) if texts.second else len(texts.first[row]))
    logits = torch.empty(len(texts), model.config.num_labels)
    for start in tqdm(range(0, len(order), batch_size), desc="teacher logits", disable=not progress):
        rows = order[start : start + batch_size]
        second = [texts.second[row] for row in rows] if texts.second else None
        batch = tokenizer([texts.first[row] for row in rows], second, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        logits[rows] = model(**batch.to(model.device)).logits.float().cpu()
    return logits


class DistillationTrainer(RangedTrainer):
    """transformers' Trainer with the loss of `LossWeights`.

    `penalty` needs an hf_he model. `hidden_teacher` is a frozen classifier with the student's depth and width, run on the fly.
    """

    def __init__(self, *args: Any, weights: LossWeights, hidden_teacher: nn.Module | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weights = weights
        self.hidden_teacher = hidden_teacher.to(self.args.device).eval() if hidden_teacher is not None else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, teacher_logits = inputs["labels"], inputs.get("teacher_logits")
        tokens = {name: inputs[name] for name in _INPUTS if name in inputs}
        with collect_ranges(model) as statistics:
            outputs = model(**tokens, output_hidden_states=self.hidden_teacher is not None)
        weights, terms = self.weights, {}
        if weights.label:
            terms["label"] = label_loss(outputs.logits, labels)
        if teacher_logits is not None and weights.soft:
            terms["soft"] = soft_loss(outputs.logits, teacher_logits, weights.temperature)
        if self.hidden_teacher is not None and weights.hidden and model.training:
            with torch.no_grad():
                target = self.hidden_teacher(**tokens, output_hidden_states=True).hidden_states
            rows = teacher_logits.isfinite().all(-1)
            terms["hidden"] = hidden_loss(outputs.hidden_states, target, tokens["attention_mask"] * rows[:, None])
        if self.penalty is not None and weights.penalty:
            terms["penalty"] = self.penalty(statistics)
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        if model.training:
            self.record_terms(terms)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over rows with a label, mean squared error for float labels; 0 when a batch has none."""
    if labels.is_floating_point():
        known = labels.isfinite()
        return F.mse_loss(logits[known, 0], labels[known]) if known.any() else logits.sum() * 0.0
    return F.cross_entropy(logits, labels, ignore_index=NO_LABEL) if (labels != NO_LABEL).any() else logits.sum() * 0.0


def soft_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """temperature^2 KL(teacher || student) over rows with finite teacher logits; squared error for a single output."""
    known = teacher_logits.isfinite().all(-1)
    if not known.any():
        return logits.sum() * 0.0
    logits, teacher_logits = logits[known], teacher_logits[known]
    if logits.shape[-1] == 1:
        return F.mse_loss(logits, teacher_logits)
    student, teacher = (F.log_softmax(values / temperature, -1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def hidden_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """Mean over layers and kept positions of the squared error between hidden states [B, T, d], each normalised to unit variance."""
    total = keep.sum().clamp(min=1)
    losses = [
        ((F.layer_norm(ours, ours.shape[-1:]) - F.layer_norm(theirs, theirs.shape[-1:])).square().mean(-1) * keep).sum() / total
        for ours, theirs in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack(losses).mean()


def metric_function(dataset: TextDataset):
    """`compute_metrics` for Trainer: the task's own metric."""

    def compute(prediction) -> dict[str, float]:
        logits = prediction.predictions
        return {dataset.metric: score(dataset.metric, prediction.label_ids, predictions_from_logits(dataset, logits))}

    return compute
