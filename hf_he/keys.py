"""Key files: what the client keeps, and what it gives to a server.

A key folder holds `secret.key` (mode 0600), `public.key`, `evaluation.keys` and possibly a folder `bootstrapping`. Only the last two go to a server.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_he.backends import EvaluationKeys, HEBackend, SecretKeyBase, get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import BackendUnavailableError, CorruptFileError, HEError, ParameterError, SecretKeyOnServerError, WrongKeyError
from hf_he.secret_key import refuse_secret_key
from hf_he.serialization import map_file, named, peek, read_file, unpack, write_file

SECRET_FILE, PUBLIC_FILE, EVALUATION_FILE = "secret.key", "public.key", "evaluation.keys"
BOOTSTRAPPING_FOLDER = "bootstrapping"

_BYTES = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ServerKeys:
    """Everything a server may hold: evaluation keys, and the backend and parameters they are for."""

    backend: str
    parameters: CKKSParameters
    evaluation: EvaluationKeys

    def __post_init__(self) -> None:
        refuse_secret_key(self.evaluation, "the set of keys for a server")

    @property
    def key_id(self) -> str:
        return self.evaluation.key_id

    def to_bytes(self) -> bytes:
        return get_backend(self.backend, self.parameters).serialize(self.evaluation)

    @classmethod
    def load(cls, source: str | Path | bytes | ServerKeys, what: str = "a server", bootstrapping: bool = False) -> ServerKeys:
        """Read an evaluation-key file (or its bytes), with `bootstrapping` also the folder next to the file.

        Raises SecretKeyOnServerError for a secret key, whatever its file is called, CorruptFileError for missing or damaged files.
        """
        if isinstance(source, ServerKeys):
            return source
        if isinstance(source, SecretKeyBase | Keys):
            raise SecretKeyOnServerError(f"{what} was handed a secret key: give it the evaluation keys (`keys.evaluation`, or the file {EVALUATION_FILE})")
        if not isinstance(source, str | Path | _BYTES):
            raise ParameterError(f"evaluation keys are a file, bytes or ServerKeys, got {type(source).__name__}: pass `keys.evaluation`")
        data = bytes(source) if isinstance(source, _BYTES) else map_file(source, "evaluation-key")
        kind, name, parameters = describe_key_file(data)
        if kind == "secret_key":
            raise SecretKeyOnServerError(f"{what} was handed a secret-key file: give it {EVALUATION_FILE} instead, and keep {SECRET_FILE} with the client")
        backend = get_backend(name, parameters)
        evaluation = backend.deserialize(data, "evaluation_keys")
        del data
        if bootstrapping and isinstance(source, str | Path) and backend.capabilities()["bootstrap"]:
            evaluation = backend.load_bootstrapping_keys(evaluation, Path(source).parent / BOOTSTRAPPING_FOLDER)
            period = getattr(evaluation.bootstrapping, "period", parameters.slots)
            if period != parameters.slots:
                raise ParameterError(
                    f"these bootstrapping keys are for vectors that repeat every {period} slots, models fill all {parameters.slots}: use others"
                )
        return cls(name, parameters, evaluation)


@dataclass(frozen=True)
class Keys:
    """A client's keys. `evaluation` is None when only the client's half was loaded."""

    backend: HEBackend
    secret: SecretKeyBase
    public: Any
    evaluation: ServerKeys | None = None

    def __repr__(self) -> str:
        return f"Keys(key_id={self.secret.key_id!r})"

    def __reduce__(self):
        raise TypeError("keys cannot be pickled or copied: write them with Keys.save to a folder only its owner reads")

    @property
    def key_id(self) -> str:
        return self.secret.key_id

    @classmethod
    def generate(
        cls,
        backend: HEBackend,
        rotations: Iterable[int] | Mapping[int, int],
        progress: Callable[[int, int], None] | None = None,
        *,
        bootstrapping: bool = False,
    ) -> Keys:
        """Fresh keys whose evaluation half covers `rotations` (steps, or steps with their highest level), and bootstrapping if asked for.

        `progress(done, total)` counts keys. Raises BackendUnavailableError when the backend or its parameters cannot bootstrap.
        """
        if bootstrapping:
            _check_bootstraps(backend)
        secret = backend.generate_secret_key()
        public = backend.generate_public_key(secret)
        options = {"bootstrapping": True} if bootstrapping else {}
        evaluation = backend.generate_evaluation_keys(secret, rotations, progress=progress, **options)
        return cls(backend, secret, public, ServerKeys(backend.name, backend.parameters, evaluation))

    def save(self, folder: str | Path, progress: Callable[[int, int], None] | None = None, *, bootstrapping: bool = False) -> dict[str, int]:
        """Write the key files; returns their sizes in bytes. The folder is created with mode 0700 and the secret key with 0600.

        With `bootstrapping`, keys that have none are completed on disk: made and written one after another, gigabytes that are never in memory.
        """
        folder = Path(folder)
        held = self.evaluation is not None and self.evaluation.evaluation.bootstrapping is not None
        if bootstrapping and not held:
            _check_bootstraps(self.backend)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        secret = self.backend.serialize(self.secret, allow_secret=True)
        write_file(folder / SECRET_FILE, secret, secret=True)
        public = self.backend.serialize(self.public)
        write_file(folder / PUBLIC_FILE, public)
        sizes = {SECRET_FILE: len(secret), PUBLIC_FILE: len(public)}
        if self.evaluation is not None:
            evaluation = self.backend.serialize(replace(self.evaluation.evaluation, bootstrapping=None))
            write_file(folder / EVALUATION_FILE, evaluation, mapped=True)
            sizes[EVALUATION_FILE] = len(evaluation)
            del evaluation
        if held:
            sizes[BOOTSTRAPPING_FOLDER] = self.backend.save_bootstrapping_keys(self.evaluation.evaluation, folder / BOOTSTRAPPING_FOLDER)
        elif bootstrapping:
            sizes[BOOTSTRAPPING_FOLDER] = self.backend.write_bootstrapping_keys(self.secret, folder / BOOTSTRAPPING_FOLDER, progress)
        return sizes

    @classmethod
    def load(cls, folder: str | Path, with_evaluation: bool = False) -> Keys:
        """The client's half of a key folder; with_evaluation=True reads the (large) evaluation keys too. Warns when others may read the secret key."""
        folder = Path(folder)
        data = read_file(folder / SECRET_FILE, "secret-key")
        if (mode := (folder / SECRET_FILE).stat().st_mode & 0o777) & 0o077:
            warnings.warn(
                f"{folder / SECRET_FILE} has mode {mode:04o}, so other users of this machine may have read it: chmod 600 it, or make new keys", stacklevel=2
            )
        with named(folder / SECRET_FILE):
            kind, name, parameters = describe_key_file(data)
        if kind != "secret_key":
            raise CorruptFileError(f"{folder / SECRET_FILE} holds no secret key: make a new key folder with `hf-he keygen`")
        backend = get_backend(name, parameters)
        secret = backend.deserialize(data, "secret_key")
        public = backend.deserialize(read_file(folder / PUBLIC_FILE, "public-key"), "public_key")
        if public.key_id != secret.key_id:
            raise WrongKeyError(f"{folder} mixes keys {secret.key_id} and {public.key_id}: make a new key folder with `hf-he keygen`")
        evaluation = ServerKeys.load(folder / EVALUATION_FILE) if with_evaluation else None
        if evaluation is not None and evaluation.key_id != secret.key_id:
            raise WrongKeyError(f"{folder} mixes keys {secret.key_id} and {evaluation.key_id}: make a new key folder with `hf-he keygen`")
        return cls(backend, secret, public, evaluation)


def _check_bootstraps(backend: HEBackend) -> None:
    if not backend.capabilities()["bootstrap"]:
        raise BackendUnavailableError(
            f"the {backend.name} backend does not bootstrap with these parameters: use --refresh client, or a parameter set that bootstraps (`hf-he env`)"
        )


def describe_key_file(data: bytes) -> tuple[str, str, CKKSParameters]:
    """Kind, backend name and parameters of a key file whose checksum has been verified."""
    kind, _ = peek(data)
    _, metadata = unpack(data, kind)
    try:
        parameters = CKKSParameters.from_dict(json.loads(metadata["parameters"]))
        return kind, metadata["backend"], parameters
    except (KeyError, ValueError, RecursionError) as error:
        if isinstance(error, HEError):
            raise
        raise CorruptFileError("this key file does not name its backend and parameters: generate the keys again with `hf-he keygen`") from None
