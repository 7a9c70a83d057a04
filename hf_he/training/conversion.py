"""From a stock BERT checkpoint to an HEBert, and from exact to polynomial mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import AutoConfig

from hf_he.checkpoints import reading
from hf_he.errors import DataError, UnsupportedModelError
from hf_he.models import HEBertForSequenceClassification, convert_bert
from hf_he.nn import LayerRange
from hf_he.training.range_penalty import Degrees, calibrate

_DECODERS = {"gpt_neox": "convert_gpt_neox", "llama": "convert_llama"}


def convert_checkpoint(source: str | Path, attention_kernel: str = "gaussian_kernel", num_labels: int | None = None) -> HEBertForSequenceClassification:
    """A stock BERT checkpoint as HEBert sequence classifier in exact mode, weights copied by name.

    A classifier keeps its head. Of any other BERT the encoder is taken, and pooler (unless it has one) and classifier start random with
    `num_labels` outputs. Raises UnsupportedModelError for anything but an encoder-only BERT, DataError when there is no model,
    CorruptFileError when its weights are absent or damaged.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DataError(f"{source} is neither a folder with a saved BERT nor a model that the Hub gives here ({type(error).__name__})") from None
    if config.model_type in _DECODERS:
        raise UnsupportedModelError(
            f"{source} holds a {config.model_type!r} model: convert, train and calibrate it in Python, with hf_he.{_DECODERS[config.model_type]} as in "
            "recipes/your_own/README.md"
        )
    with reading(source, "weights"):
        if "BertForSequenceClassification" in (config.architectures or []):
            if num_labels not in (None, config.num_labels):
                raise UnsupportedModelError(f"{source} has a head of {config.num_labels} labels: leave num_labels out, or convert its encoder.")
            return convert_bert(source, attention_kernel)
        return convert_bert(
            source,
            attention_kernel,
            target_class=HEBertForSequenceClassification,
            new_modules=("bert.pooler", "classifier"),
            num_labels=2 if num_labels is None else num_labels,
        )


def calibrated(model: nn.Module, ranges: Mapping[str, LayerRange], degrees: Degrees, margin: float = 0.25) -> nn.Module:
    """`model` in polynomial mode, its approximations fitted to `ranges` (see `range_penalty.track_ranges`) plus `margin`."""
    model.set_approximations(calibrate(model, ranges, degrees, margin))
    model.set_mode("polynomial")
    return model
