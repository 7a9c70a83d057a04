"""The file that lets `trust_remote_code=True` load a checkpoint in a process that has not imported hf_he.

`AutoModel.from_pretrained(..., trust_remote_code=True)` downloads `modeling_hf_he.py`, which imports the classes from the installed
package; without the package, transformers tells the user to run `pip install hf_he`.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedConfig

SHIM_MODULE = "modeling_hf_he"

AUTO_CLASSES: dict[str, dict[str, str]] = {
    "he_bert": {
        "AutoConfig": "HEBertConfig",
        "AutoModel": "HEBertModel",
        "AutoModelForMaskedLM": "HEBertForMaskedLM",
        "AutoModelForSequenceClassification": "HEBertForSequenceClassification",
    },
    "he_gpt_neox": {
        "AutoConfig": "HEGPTNeoXConfig",
        "AutoModel": "HEGPTNeoXModel",
        "AutoModelForCausalLM": "HEGPTNeoXForCausalLM",
        "AutoModelForSequenceClassification": "HEGPTNeoXForSequenceClassification",
    },
    "he_llama": {
        "AutoConfig": "HELlamaConfig",
        "AutoModel": "HELlamaModel",
        "AutoModelForCausalLM": "HELlamaForCausalLM",
        "AutoModelForSequenceClassification": "HELlamaForSequenceClassification",
    },
}


def save_hub_shim(directory: str | os.PathLike, config: PreTrainedConfig) -> Path:
    """Write `modeling_hf_he.py` into `directory` and set `config.auto_map` to it; save the config afterwards.

    Returns:
        the path of the module.
    """
    classes = AUTO_CLASSES[config.model_type]
    config.auto_map = {auto: f"{SHIM_MODULE}.{name}" for auto, name in classes.items()}
    path = Path(directory) / f"{SHIM_MODULE}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(sorted(classes.values()))
    path.write_text(f'"""Classes of the hf-he package (pip install hf_he)."""\n\nfrom hf_he import {names}\n')
    return path
