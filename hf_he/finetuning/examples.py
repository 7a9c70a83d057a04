"""What the client trains on: data sets of any library as texts and labels, and which of them this model and its ranges can take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_he.client import Client
from hf_he.data import TextDataset
from hf_he.errors import DataError, RangeError


def accepted(client: Client, dataset: TextDataset, rows: Sequence[int]) -> tuple[list[int], str | None]:
    """Those of `rows` whose values stay in every fitted range of the client's model, and a line about the others. Raises RangeError when there are none."""
    sentences = client.prepare([dataset.first[row] for row in rows])
    kept = [row for row, sentence in zip(rows, sentences, strict=True) if sentence.refused is None]
    refused = [sentence.refused for sentence in sentences if sentence.refused is not None]
    if not kept:
        raise RangeError(f"every example of a step was refused; the first: {refused[0]}")
    return kept, f"{len(refused)} of {len(rows)} examples are left out ({refused[0]})" if refused else None


def as_text_dataset(dataset: Any, split: str) -> TextDataset:
    """A TextDataset as it is; of anything else with columns, text (or sentence) and label (or labels), which are still to be `labelled`. Raises DataError
    without them."""
    if isinstance(dataset, TextDataset):
        return dataset
    names = getattr(dataset, "column_names", None) or (list(dataset) if isinstance(dataset, dict) else [])
    text = next((name for name in ("text", "sentence") if name in names), None)
    label = next((name for name in ("label", "labels") if name in names), None)
    if text is None or label is None:
        raise DataError(f"a training set needs the columns text (or sentence) and label, this one has {', '.join(names) or 'none'}: rename them")
    labels = tuple(np.asarray(dataset[label]).tolist())
    return TextDataset("mr", split, tuple(map(str, dataset[text])), None, labels)


def check_examples(dataset: TextDataset) -> None:
    """Raise DataError for what the encrypted client cannot train on, sentence pairs."""
    if dataset.second is not None:
        raise DataError(f"the encrypted client takes single sentences, {dataset.task} has pairs: train on them without --encrypted")


def labelled(dataset: TextDataset, config: Any) -> TextDataset:
    """With labels that are outputs of the model with this `config`: any numbers for a single output, else classes, which integral floats and the names
    in `label2id` become. Raises DataError for others."""
    if config.num_labels == 1:
        wrong = [label for label in dataset.labels if not isinstance(label, (int, float)) or not math.isfinite(label)]
        task, labels, what = "stsb", dataset.labels, "no number to learn"
    else:
        named = [config.label2id.get(label, label) if isinstance(label, str) else label for label in dataset.labels]
        wrong = [label for label in named if label not in range(config.num_labels)]
        task, labels = "mr" if dataset.is_regression else dataset.task, () if wrong else tuple(map(int, named))
        what = f"none of the model's classes 0 to {config.num_labels - 1}" + (f", in config.label2id {', '.join(config.label2id)}" if config.label2id else "")
    if wrong:
        raise DataError(f"the label {wrong[0]!r} is {what}: drop such rows, or take a model with other outputs")
    return replace(dataset, task=task, labels=labels)
