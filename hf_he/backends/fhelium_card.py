"""Errors of a CUDA device as typed ones that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import isfunction
from typing import Any

import torch

from hf_he.errors import BackendUnavailableError, DeviceMemoryError

NO_CODE = "no kernel image"
"""What CUDA says of a library without code for the card's architecture."""


def typed_card_errors(cls: type) -> type:
    """A class decorator: every method raises DeviceMemoryError where the card's memory does not suffice, and BackendUnavailableError where FHElium was
    compiled for other cards. Instances have a `device`."""
    for name, method in list(vars(cls).items()):
        if isfunction(method):
            setattr(cls, name, _typed(method))
    return cls


def _typed(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self.device)
            raise DeviceMemoryError(
                f"the memory of {self.device} does not suffice, {free / 1e9:.1f} of {total / 1e9:.1f} GB are free: end other programs on it, take a smaller "
                "batch or parameter set, divide the model over several cards (recipes/backends), or use --device cpu"
            ) from None
        except torch.AcceleratorError as error:
            if NO_CODE not in str(error):
                raise
            major, minor = torch.cuda.get_device_capability(self.device)
            raise BackendUnavailableError(
                f"FHElium was compiled for other cards than {self.device}: `make install-fhelium FHELIUM_BACKENDS=CPU+CUDA CUDAARCHS={major}{minor}`"
            ) from None

    return run
