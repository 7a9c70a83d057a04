"""Typed errors. Every message says what happened and what to do about it; none carries key material or plaintext values."""


class HEError(Exception):
    """Base class of every error hf_he raises on purpose."""


class ParameterError(HEError, ValueError):
    """A parameter is malformed, or two objects were made for different CKKS parameters."""


class InsecureParametersError(ParameterError):
    """log2(QP) exceeds the 128-bit classical row for this ring dimension, or the sparse secret of bootstrapping has no estimates for it."""


class ShapeError(HEError, ValueError):
    """A tensor, batch or packing shape does not fit."""


class LevelError(HEError):
    """A ciphertext has too few levels left, or two operands sit at different levels."""


class ScaleMismatchError(HEError):
    """Two operands carry different scales, or an operation would overflow the modulus."""


class MissingKeyError(HEError, KeyError):
    """The evaluation keys lack the key this operation needs."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class WrongKeyError(HEError):
    """A ciphertext or key belongs to another secret key."""


class SecretKeyOnServerError(HEError):
    """Something tried to hand a secret key to a server object."""


class CorruptFileError(HEError):
    """A file or message is truncated, tampered with, of another kind or of an unknown version."""


class ModelMismatchError(HEError):
    """Encrypted data was prepared for another model."""


class ApproximationError(HEError, ValueError):
    """No polynomial within the allowed degree meets the requested error."""


class RangeError(HEError):
    """A value left the interval its polynomial was fitted on; the message names the layer."""


class UnsupportedEncryptedOperation(HEError, TypeError):
    """An operation has no encrypted form. Nothing is decrypted or approximated silently."""


class UnsupportedModelError(HEError, TypeError):
    """A model cannot use the requested attention (it ignores the name, or leaks future tokens)."""


class BackendUnavailableError(HEError, RuntimeError):
    """A backend or a capability of it is not available here; the message says why."""


class DeviceMemoryError(HEError, RuntimeError):
    """The memory of an accelerator does not suffice; the message says how much is free and what takes less."""


class RefreshError(HEError):
    """A refresh (client round trip or bootstrap) could not be done."""


class DataError(HEError):
    """A data set is missing or is not the pinned version."""


class DownloadError(DataError):
    """A pinned package could not be fetched at all; a package that came but is not the pinned one is a plain DataError."""


class CheckpointError(HEError):
    """A training checkpoint could not be written, read or shared; the message says which one is intact."""


class TrainingError(HEError):
    """A training message does not fit the run the server holds: another run, another data order, or a step out of turn."""


class GenerationError(HEError):
    """A generation is unknown to the server, out of step, or has no room for another token."""
