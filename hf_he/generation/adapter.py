"""LoRA adapters that stay encrypted: the server adds them to its decoder without seeing them.

A folder with `adapter.enc` (EncryptedLora) takes the place of a plain PEFT adapter in GenerationServer and GenerationClient. Its dense ciphertexts are those
of encrypted fine-tuning (hf_he.finetuning.adapter), so what was trained on ciphertexts goes into it as it is; `encrypt_adapter` makes one from a plain adapter.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from hf_he.backends import HEBackend
from hf_he.errors import CorruptFileError, ModelMismatchError, ParameterError
from hf_he.finetuning.adapter import AdapterLayout, EncryptedAdapter
from hf_he.generation.model import ENCRYPTED_ADAPTER_FILE as ADAPTER_FILE
from hf_he.keys import Keys
from hf_he.packing import Packing
from hf_he.peft import INITIALISERS, HELoraConfig, with_fresh_adapter
from hf_he.protocol import Identity, as_array, as_bytes
from hf_he.serialization import pack, read_file, unpack, write_file
from hf_he.tensor import EncryptedSession

ADAPTER_KIND = "encrypted_lora"
_MODULE = re.compile(r"[A-Za-z0-9_.]{1,64}")
_MERGE = "train it again without, or merge it into the model first (merge_and_unload), which the server then sees"
_NO_FORM = f"has no encrypted form: {_MERGE}"


@dataclass(frozen=True)
class EncryptedLora:
    """Dense ciphertexts of an adapter of public rank and target modules, for the model without it that `identity` names."""

    identity: Identity
    rank: int
    target_modules: tuple[str, ...]
    weights: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        metadata = {**self.identity.to_metadata(), "rank": str(self.rank), "target_modules": json.dumps(self.target_modules)}
        return pack(ADAPTER_KIND, {"weights": as_array(self.weights)}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedLora:
        """Raises CorruptFileError for anything but such a file."""
        arrays, metadata = unpack(data, ADAPTER_KIND)
        rank, again = metadata.get("rank", ""), "write it again with this version of hf_he"
        try:
            modules = json.loads(metadata.get("target_modules", ""))
        except (ValueError, RecursionError):
            modules = None
        if not (rank.isascii() and rank.isdigit() and len(rank) <= 2 and 1 <= int(rank) <= 64):
            raise CorruptFileError(f"the encrypted adapter's rank is not a number from 1 to 64: {again}")
        if not isinstance(modules, list) or not 1 <= len(modules) <= 16 or not all(isinstance(m, str) and _MODULE.fullmatch(m) for m in modules):
            raise CorruptFileError(f"the encrypted adapter does not name its target modules: {again}")
        return cls(Identity.from_metadata(metadata), int(rank), tuple(modules), as_bytes(arrays, "weights"))

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / ADAPTER_FILE
        write_file(path, self.to_bytes())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> EncryptedLora:
        return cls.from_bytes(read_file(Path(folder) / ADAPTER_FILE, "encrypted-adapter"))

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """`model` with fresh LoRA layers where this adapter belongs. Raises ModelMismatchError when it has no such modules."""
        try:
            return with_fresh_adapter(model, HELoraConfig(r=self.rank, target_modules=list(self.target_modules)))
        except ValueError as error:
            raise ModelMismatchError(f"this model has no modules {', '.join(self.target_modules)} to adapt: use the model the adapter was made for") from error

    def install(self, session: EncryptedSession, tuned: PeftModel, layout: AdapterLayout) -> None:
        """The ciphertexts as weights of `tuned`, of that layout. Raises CorruptFileError when they are not what encryption or training leaves."""
        dense = session.backend.deserialize(self.weights, "ciphertext")
        canonical = session.backend.parameters.scale_at(dense.level)
        if dense.batch_shape != (layout.count,) or dense.components != 2 or abs(dense.scale / canonical - 1) > 1e-9 or dense.key_id != self.identity.key_id:
            raise CorruptFileError(f"the encrypted adapter must be {layout.count} ciphertexts of the key it names, got {dense.batch_shape}: encrypt it again")
        EncryptedAdapter(session, tuned, layout, dense).install()

    def decrypt(self, model: PreTrainedModel, packing: Packing, backend: HEBackend, keys: Keys) -> PreTrainedModel:
        """`model` with the adapter merged in the clear: the client's own copy."""
        tuned = self.attach(model)
        layout = AdapterLayout.of(tuned, packing)
        layout.load(tuned, layout.unpack(backend.decrypt(backend.deserialize(self.weights, "ciphertext"), keys.secret)))
        return tuned.merge_and_unload().eval()


def lora_of(adapter: str | Path) -> HELoraConfig:
    """Rank and target modules of a plain PEFT adapter: what the keys for its encrypted form must cover.

    Raises ParameterError when it is more than matrices lora_A and lora_B of one rank in modules of these names.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise ParameterError(f"{adapter} is a {config.peft_type} adapter, which {_NO_FORM}")
    refused = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "bias": config.bias != "none",
        "rank_pattern": config.rank_pattern,
        "modules_to_save": config.modules_to_save,
        "init_lora_weights, which changes the model": config.init_lora_weights not in INITIALISERS,
        "target_modules as a regular expression": isinstance(config.target_modules, str),
    }
    wrong = [name for name, found in refused.items() if found]
    if wrong:
        raise ParameterError(f"the adapter in {adapter} has {', '.join(wrong)}, which {_NO_FORM}")
    return HELoraConfig(r=config.r, target_modules=sorted(config.target_modules))


def is_encrypted(adapter: str | Path | None) -> bool:
    """Whether a folder holds an encrypted adapter."""
    return adapter is not None and (Path(adapter) / ADAPTER_FILE).is_file()


def encrypt_adapter(model: PreTrainedModel, adapter: str | Path, identity: Identity, packing: Packing, backend: HEBackend, keys: Keys) -> EncryptedLora:
    """A plain PEFT adapter of `model` encrypted under the client's keys, each layer's scaling folded into its lora_B. `identity` names the model without it.

    Raises ParameterError as `lora_of`, and when the adapter changes anything else in the model.
    """
    config = lora_of(adapter)
    plain = PeftModel.from_pretrained(copy.deepcopy(model), adapter, local_files_only=True)
    lora = EncryptedLora(identity, config.r, tuple(sorted(config.target_modules)), b"")
    tuned = lora.attach(copy.deepcopy(model))
    layout = AdapterLayout.of(tuned, packing)
    if not _only_lora(plain, tuned):
        raise ParameterError(f"the adapter in {adapter} is not LoRA in every module of these names and nowhere else, which alone is encrypted: {_MERGE}")
    with torch.no_grad():
        values = {name: value * _scaling(plain, name) for name, value in layout.values(plain).items()}
    weights = backend.serialize(backend.encrypt(layout.pack(values), keys.secret))
    return EncryptedLora(identity, lora.rank, lora.target_modules, weights)


def _only_lora(plain: PeftModel, tuned: PeftModel) -> bool:
    """Whether a loaded adapter is what a fresh one in `tuned` can hold."""
    ours, theirs = ({name: value.shape for name, value in model.named_parameters()} for model in (tuned, plain))
    return ours == theirs and not any(getattr(module, "lora_variant", None) for module in plain.modules())


def _scaling(plain: PeftModel, name: str) -> float:
    """What PEFT multiplies the product of a layer's matrices with, as the factor of one of them."""
    layer, matrix, _ = name.partition(".lora_B.")
    return plain.get_submodule(layer).scaling["default"] if matrix else 1.0
