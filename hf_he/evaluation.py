"""Score a sequence classifier on a task, with the range of every approximated quantity and with baselines computed on the spot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_he.data import TextDataset
from hf_he.errors import DataError
from hf_he.nn import RangeTracker

MAX_LENGTH = 32


@dataclass
class EvaluationResult:
    """Logits [rows, classes] of one run, the task's metric, and the ranges RangeTracker saw (padding positions included)."""

    task: str
    split: str
    mode: str
    metric: str
    score: float
    logits: np.ndarray = field(repr=False)
    ranges: dict[str, dict[str, Any]]

    @property
    def out_of_range(self) -> int:
        """Number of values outside their fitted interval, over all layers and rows."""
        return sum(entry["out_of_range"] for entry in self.ranges.values())

    def to_dict(self) -> dict[str, Any]:
        """The stable part of `hf-he evaluate --json`, without baselines."""
        return {
            "task": self.task,
            "split": self.split,
            "mode": self.mode,
            "rows": len(self.logits),
            "metric": self.metric,
            "score": self.score,
            "out_of_range": self.out_of_range,
            "ranges": self.ranges,
        }


def encode_texts(tokenizer, dataset: TextDataset, max_length: int = MAX_LENGTH) -> dict[str, torch.Tensor]:
    """Token tensors [rows, max_length], every row padded to `max_length` because that is what the encrypted client sends."""
    second = None if dataset.second is None else list(dataset.second)
    encoded = tokenizer(list(dataset.first), second, truncation=True, max_length=max_length, padding="max_length", return_tensors="pt")
    return dict(encoded)


def score(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """accuracy, f1 (of class 1), matthews_correlation or pearson. A constant predictor scores 0 in the last two."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if metric == "accuracy":
        return float(np.mean(labels == predictions))
    if metric == "f1":
        true_positive = float(np.sum((labels == 1) & (predictions == 1)))
        denominator = float(np.sum(labels == 1) + np.sum(predictions == 1))
        return 2.0 * true_positive / denominator if denominator else 0.0
    if metric in ("matthews_correlation", "pearson"):
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(np.corrcoef(labels, predictions)[0, 1])
    raise DataError(f"unknown metric {metric!r}: accuracy, f1, matthews_correlation and pearson are known.")


def predictions_from_logits(dataset: TextDataset, logits: np.ndarray) -> np.ndarray:
    """Classes [rows] (argmax), or the single output as a score for regression tasks. Logits that are not finite are a wrong class, or 0."""
    finite = np.isfinite(logits).all(-1)
    if dataset.is_regression:
        return np.where(finite, logits[:, 0], 0.0)
    return np.where(finite, logits.argmax(-1), (np.asarray(dataset.labels) + 1) % logits.shape[-1])


def check_labels(model: nn.Module, dataset: TextDataset) -> None:
    """Raise DataError when the checkpoint's head cannot belong to this task."""
    expected = 1 if dataset.is_regression else max(2, len(set(dataset.labels)))
    if model.config.num_labels != expected:
        raise DataError(
            f"the checkpoint has {model.config.num_labels} output(s), task {dataset.task} needs {expected}: "
            "evaluate a checkpoint that was trained on this task (hf-he train --task)."
        )


def evaluate_model(
    model: nn.Module, tokenizer, dataset: TextDataset, *, max_length: int = MAX_LENGTH, batch_size: int = 256, progress: bool = False
) -> EvaluationResult:
    """Run `model` in the mode it is in ("exact" or "polynomial") over `dataset` and count values outside the fitted intervals.

    A model without approximated layers (a stock softmax classifier) reports no ranges. Raises DataError on a head of another size.
    """
    check_labels(model, dataset)
    encoded = encode_texts(tokenizer, dataset, max_length)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits = []
    with torch.no_grad(), RangeTracker(model) as tracker:
        for start in tqdm(range(0, len(dataset), batch_size), desc=f"{dataset.task} {dataset.split}", disable=not progress):
            batch = {name: tensor[start : start + batch_size].to(device) for name, tensor in encoded.items()}
            logits.append(model(**batch).logits.float().cpu())
    model.train(was_training)
    values = torch.cat(logits).numpy()
    result = score(dataset.metric, np.asarray(dataset.labels), predictions_from_logits(dataset, values))
    return EvaluationResult(dataset.task, dataset.split, getattr(model.config, "mode", "exact"), dataset.metric, result, values, tracker.to_dict())


@lru_cache(maxsize=1)
def _bag_of_words(train: TextDataset) -> tuple[Any, Any]:
    """Vectorizer and regressor fitted on `train`, once for several splits."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression, Ridge
    except ImportError as error:
        raise DataError("the TF-IDF baseline needs scikit-learn: pip install scikit-learn, or pass --no-baselines.") from error

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    features = vectorizer.fit_transform(train.joined)
    regressor = Ridge() if train.is_regression else LogisticRegression(C=10.0, max_iter=1000)
    return vectorizer, regressor.fit(features, np.asarray(train.labels))


def baselines(train: TextDataset, evaluated: TextDataset) -> dict[str, float]:
    """Scores of two predictors trained on `train` here and now, in the task's metric.

    `majority`: the most frequent class (the mean score for regression). `tfidf_logistic_regression`: word unigrams and bigrams weighted by
    TF-IDF, then logistic regression, C = 10 (ridge regression for scores); the best of 48 settings on the MR dev half. Raises DataError
    without scikit-learn.
    """
    labels = np.asarray(evaluated.labels)
    vectorizer, regressor = _bag_of_words(train)
    if evaluated.is_regression:
        constant = np.full(len(evaluated), float(np.mean(train.labels)))
    else:
        constant = np.full(len(evaluated), Counter(train.labels).most_common(1)[0][0])
    return {
        "majority": score(evaluated.metric, labels, constant),
        "tfidf_logistic_regression": score(evaluated.metric, labels, regressor.predict(vectorizer.transform(evaluated.joined))),
    }
