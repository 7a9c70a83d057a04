"""`hf-he publish`: a copy of a decrypted adapter that may leave the client."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_he.errors import CorruptFileError, ParameterError
from hf_he.flooding import flood, leaked_bits
from hf_he.generation.model import ADAPTER_FILES
from hf_he.scripts.display import console, print_json
from hf_he.serialization import read_file, write_file


def publish(adapter: Path, out: Path, precision: float, error: float | None, json_output: bool = False) -> None:
    """Write the PEFT adapter in `adapter` to `out` with Gaussian noise, of `precision` times the root mean square of each matrix.

    With a bound of the values' errors, say what the copy shows of them. Raises CorruptFileError for a folder without an adapter.
    """
    if out.resolve() == adapter.resolve():
        raise ParameterError(f"{out} holds the adapter itself: choose another --out")
    config_file, weights_file = ADAPTER_FILES
    config = read_file(adapter / config_file, "adapter")
    try:
        weights = load_file(adapter / weights_file)
    except (OSError, SafetensorError) as problem:
        raise CorruptFileError(f"{adapter / weights_file} is not readable ({type(problem).__name__}): save the adapter again") from None
    values = {name: value.double().numpy() for name, value in weights.items()}
    if not values or not all(value.any() and np.isfinite(value).all() for value in values.values()):
        raise CorruptFileError(f"{adapter} holds an adapter that was not trained, or is damaged: train it, or save it again")
    deviations = {name: precision * math.sqrt(np.square(value).mean()) for name, value in values.items()}
    flooded = {name: torch.from_numpy(flood(value, deviations[name])).to(weights[name].dtype) for name, value in values.items()}
    write_file(out / config_file, config)
    save_file(flooded, out / weights_file)
    count = sum(value.size for value in values.values())
    bits = None if error is None else sum(leaked_bits(error, value.size, deviations[name]) for name, value in values.items())
    if json_output:
        print_json({"adapter": str(out), "values": count, "precision": precision, "error": error, "bits": bits})
        return
    console.print(f"{count} values with noise of {precision:g} of their size: {out}")
    if bits is not None:
        console.print(f"at most {bits:.2g} bits about errors of up to {error:g}, and so about the secret key")
