"""Decoders for generation: loading one in polynomial mode, with a plain PEFT adapter merged into it, and the fingerprint of both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_he.checkpoints import load_polynomial, model_fingerprint
from hf_he.errors import CorruptFileError, DataError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ENCRYPTED_ADAPTER_FILE = "adapter.enc"


def load_decoder(directory: str | Path, adapter: str | Path | None = None) -> PreTrainedModel:
    """A causal language model in eval and polynomial mode, float32; `adapter`: a plain PEFT adapter, merged.

    Raises DataError when a folder holds none, CorruptFileError for a damaged one. Weights are read from safetensors only.
    """
    model = load_polynomial(AutoModelForCausalLM, directory, "ForCausalLM", "decoder")
    return model if adapter is None else _with_adapter(model, Path(adapter))


def is_decoder(directory: str | Path) -> bool:
    """Whether a folder with a saved model holds a causal language model. Raises DataError or CorruptFileError as `model_fingerprint`."""
    model_fingerprint(directory)
    architectures = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    return any(str(name).endswith("ForCausalLM") for name in architectures)


def decoder_fingerprint(directory: str | Path, adapter: str | Path | None = None) -> str:
    """16 hex digits over model and adapter; client and server must agree on them."""
    fingerprint = model_fingerprint(directory)
    if adapter is None:
        return fingerprint
    hashed = hashlib.sha256(fingerprint.encode())
    for path in _adapter_files(Path(adapter)):
        hashed.update(hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()[:16]


def _with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

    _adapter_files(adapter)
    try:
        return PeftModel.from_pretrained(model, adapter, local_files_only=True).merge_and_unload().eval()
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{adapter} holds no adapter for this model ({type(error).__name__}): save it again with save_pretrained") from error


def _adapter_files(adapter: Path) -> list[Path]:
    if (adapter / ENCRYPTED_ADAPTER_FILE).is_file():
        return [adapter / ENCRYPTED_ADAPTER_FILE]
    files = [adapter / name for name in ADAPTER_FILES]
    if not all(path.is_file() for path in files):
        raise DataError(f"{adapter} holds no PEFT adapter: give a folder with {' and '.join(ADAPTER_FILES)}")
    return files
