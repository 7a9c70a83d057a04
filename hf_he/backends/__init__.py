"""Backends by name. Adding one is one adapter file and one line in `BACKENDS`, or in the entry points of another package:

[project.entry-points."hf_he.backends"]
mine = "my_package.my_backend:MyBackend"

tests/backends/test_contract.py runs with every backend found either way; tests/backends/fifth.py is the smallest that passes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from hf_he.backends.base import Ciphertext, EvaluationKeys, HEBackend, Plaintext
from hf_he.backends.log import OperationLog
from hf_he.errors import BackendUnavailableError
from hf_he.secret_key import SecretKeyBase
from hf_he.serialization import quoted

if TYPE_CHECKING:
    from hf_he.ckks.parameters import CKKSParameters

BACKENDS = {
    "native": "hf_he.backends.native:NativeBackend",
    "simulator": "hf_he.backends.simulator:SimulatorBackend",
    "fhelium": "hf_he.backends.fhelium:FheliumBackend",
    "desilo": "hf_he.backends.desilo:DesiloBackend",
}
DEFAULT_BACKEND = "native"
ENTRY_POINTS = "hf_he.backends"

__all__ = [
    "BACKENDS",
    "Ciphertext",
    "EvaluationKeys",
    "HEBackend",
    "OperationLog",
    "Plaintext",
    "SecretKeyBase",
    "available_backends",
    "backend_class",
    "default_device",
    "get_backend",
    "set_default_device",
]

_default_device: str | None = None


def backend_class(name: str = "auto") -> type[HEBackend]:
    """The adapter class called `name` ("auto" = native). Raises BackendUnavailableError when it cannot be imported."""
    name = DEFAULT_BACKEND if name == "auto" else name
    known = BACKENDS if name in BACKENDS else _known()
    if name not in known:
        raise BackendUnavailableError(f"there is no backend called {quoted(name)}: choose one of auto, {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise BackendUnavailableError(f"the {name} backend cannot be imported ({error}): install what it needs, or choose another backend") from error


def _known() -> dict[str, str]:
    """Where each backend is, those of installed packages after ours, whose names they cannot take."""
    return BACKENDS | {point.name: point.value for point in entry_points(group=ENTRY_POINTS) if point.name not in BACKENDS}


def set_default_device(device: str | None) -> None:
    """Backends that are made from now on, here and in server processes started from here, run on `device`: "cpu", "cuda" or "cuda:N" (None: their own choice).

    Raises ParameterError for anything else; whether a backend runs there is known when it is made.
    """
    global _default_device
    if device is not None:
        HEBackend.check_device_name(device)
    _default_device = device


def default_device() -> str | None:
    """What `set_default_device` was given last."""
    return _default_device


def get_backend(name: str, parameters: CKKSParameters, device: str | None = None) -> HEBackend:
    """A backend of the given name for one parameter set, on `device` or the default one.

    Raises BackendUnavailableError with the reason when it cannot run here, or not on that device.
    """
    cls = backend_class(name)
    ok, reason = cls.availability()
    if not ok:
        raise BackendUnavailableError(f"the {cls.name} backend cannot run here: {reason}")
    device = device or _default_device
    if device is None:
        return cls(parameters)
    cls.check_device(device)
    return cls(parameters, device=device) if len(cls.devices) > 1 else cls(parameters)


def available_backends() -> dict[str, tuple[bool, str]]:
    """Each backend's name with whether it runs here, and why not."""
    found = {}
    for name in _known():
        try:
            found[name] = backend_class(name).availability()
        except BackendUnavailableError as error:
            found[name] = (False, str(error))
    return found
