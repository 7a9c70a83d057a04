"""Saved models: loading one in polynomial mode, and the fingerprint by which client and server recognise it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_he.errors import CorruptFileError, DataError, HEError

DEFAULT_MODEL = "he-bert-tiny-mr"
DEFAULT_DECODER = "he-gpt-neox-tiny"
MODEL_CARDS = Path(__file__).resolve().parent.parent / "model_cards"

_CONVERTED_BY = {"bert": "`hf-he convert {} --out FOLDER --calibrate TEXT`", "gpt_neox": "hf_he.convert_gpt_neox", "llama": "hf_he.convert_llama"}
_VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def default_model() -> Path:
    """The classifier that comes with a clone. Raises DataError outside of one."""
    return _shipped(DEFAULT_MODEL)


def default_decoder(attention_kernel: str = "gaussian_kernel") -> Path:
    """The decoder with that kernel (gaussian_kernel, normalized_gaussian_kernel or power_softmax) that comes with a clone. Raises DataError outside of one."""
    return _shipped(f"{DEFAULT_DECODER}/{attention_kernel}")


def find_model(name: str | Path) -> Path:
    """The folder called `name` or, where that holds no model, the one of that name in model_cards of this clone."""
    shipped = MODEL_CARDS / name
    return shipped if not (Path(name) / "config.json").is_file() and (shipped / "config.json").is_file() else Path(name)


def check_architecture(directory: Path, suffix: str, needed: str) -> None:
    """Raises DataError when the folder's configuration names other architectures than those that end in `suffix`, say ForCausalLM, CorruptFileError
    when it cannot be read.

    transformers would load such weights with a new, random head.
    """
    architectures = _read_config(directory).get("architectures") or []
    if architectures and not any(str(name).endswith(suffix) for name in architectures):
        raise DataError(f"{directory} holds {architectures[0]}, and this needs {needed}: give the folder of a model that ends in {suffix}")


def _check_folder(directory: Path) -> None:
    if not directory.is_dir():
        raise DataError(f"there is no folder {directory}: give that of a saved model, or the name of one in model_cards")


def _read_config(directory: Path) -> dict[str, Any]:
    _check_folder(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise DataError(f"{directory} holds no config.json: give the folder of a saved model as --model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} is not readable JSON: copy the model again")
    return found


def _shipped(name: str) -> Path:
    directory = MODEL_CARDS / name
    if not (directory / "config.json").is_file():
        raise DataError(f"the model {name} comes with a clone of the repository and is not at {directory}: give a folder with --model")
    return directory


def model_fingerprint(directory: str | Path) -> str:
    """16 hex digits over the configuration and all weight files of a saved model; client and server must agree on it.

    Raises DataError when `directory` holds no saved model.
    """
    directory = Path(directory)
    _check_folder(directory)
    config, weights = directory / "config.json", sorted(directory.glob("*.safetensors"))
    if not config.is_file() or not weights:
        raise DataError(f"{directory} holds no model: give a folder with config.json and model.safetensors (make one with `hf-he convert` or `hf-he train`)")
    described = {key: value for key, value in _read_config(directory).items() if key not in _VOLATILE_CONFIG}
    hashed = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in weights:
        try:
            with path.open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CorruptFileError(f"cannot read {path} ({error.strerror}): copy the model again") from None
    return hashed.hexdigest()[:16]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of transformers in here: client, planner and calibration read the same small model several times."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_classifier(directory: str | Path) -> PreTrainedModel:
    """A sequence classifier in eval and polynomial mode, float32; see `load_polynomial`."""
    return load_polynomial(AutoModelForSequenceClassification, directory, "ForSequenceClassification", "classifier")


def load_polynomial(auto_class: Any, directory: str | Path, suffix: str, what: str) -> PreTrainedModel:
    """The model of a folder in eval and polynomial mode, float32. Raises DataError when the folder holds none, CorruptFileError for a damaged one.

    Weights are read from safetensors only: those the fingerprint covers, and nothing that unpickling could execute.
    """
    model_fingerprint(directory)
    with quiet_loading():
        return load_in_mode(auto_class, directory, suffix, what, "polynomial", use_safetensors=True)


def load_in_mode(auto_class: Any, directory: str | Path, suffix: str, what: str, mode: str, **options: Any) -> PreTrainedModel:
    """The model of a folder in eval mode, float32, in `mode` exact or polynomial; stock models have only the first. Errors as of `load_polynomial`."""
    directory = Path(directory)
    with reading(directory, what):
        check_architecture(directory, suffix, f"a {what}")
        stock = str(_read_config(directory).get("model_type"))
        if mode != "exact" and stock in _CONVERTED_BY:
            how = _CONVERTED_BY[stock].format(directory)
            raise DataError(f"{directory} holds a stock {stock}, which has no {mode} mode: convert it by {how}, and give the folder of the result")
        model = auto_class.from_pretrained(directory, dtype=torch.float32, local_files_only=True, **options).eval()
        if hasattr(model, "set_mode"):
            model.set_mode(mode)
        elif mode != "exact":
            raise DataError(f"{type(model).__name__} has no {mode} mode: take a BERT, GPT-NeoX or Llama, which can be converted")
    return model


@contextmanager
def reading(source: str | Path, what: str) -> Iterator[None]:
    """What a damaged model makes transformers raise in here becomes a CorruptFileError; typed errors pass."""
    try:
        yield
    except HEError:
        raise
    except (AttributeError, IndexError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{source} holds no usable {what} ({type(error).__name__}): copy or convert the model again") from error


def load_tokenizer(source: str | Path, *, local_files_only: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or, not `local_files_only`, of the Hub. Raises DataError when there is none that can be read.

    transformers makes one of special tokens alone, for which every word is unknown, where the files are missing.
    """
    if local_files_only:
        _check_folder(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
    except Exception as error:  # that of tokenizers for a damaged file is an Exception itself
        raise DataError(f"{source} holds no usable tokenizer ({type(error).__name__}): save one beside the model with tokenizer.save_pretrained") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DataError(f"{source} holds no tokenizer files: save them beside the model with tokenizer.save_pretrained")
    return tokenizer
