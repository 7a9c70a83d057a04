"""EncryptedTensor: a torch.Tensor without values, standing for ciphertexts, that flows through unmodified transformers models.

Functions with an encrypted form have a handler (`hf_he.handlers`): linear layers, `hf_he.nn.layer_norm`, `hf_he.nn.activation`, Gaussian-kernel
attention, sums and products, the reshapes around attention heads, the first token. Everything else raises UnsupportedEncryptedOperation:
nothing is decrypted, nothing falls back.

    session = EncryptedSession(backend, packing, ClientRefresh(callback))
    hidden = session.hidden_state(embeddings_ciphertext)
    mask = session.attention_mask(mask_ciphertext)
    logits = model(embedding_output=hidden, attention_mask=mask).logits.ciphertext

Encrypted weights (`session.weight`, `session.bias`) are leaves of torch's autograd: `loss.backward()` leaves encrypted gradients in their `.grad`
(hf_he.autograd). Plaintext parameters are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.overrides import resolve_name

from hf_he.backends.base import Ciphertext, HEBackend
from hf_he.errors import ParameterError, ShapeError, UnsupportedEncryptedOperation
from hf_he.ops import required_rotations, weights
from hf_he.ops.context import OperationContext
from hf_he.ops.operand import Operand
from hf_he.packing import Packing
from hf_he.refresh import RefreshPolicy

__all__ = ["EncryptedSession", "EncryptedTensor", "handler", "required_rotations", "state_operand", "state_tensor", "unsupported"]

HIDDEN, POOLED, SPLIT, HEADS, MASK = "hidden state", "pooled state", "split heads", "attention heads", "attention mask"
WEIGHT, BIAS, LABELS, LOSS, KEPT = "weight", "bias", "labels", "loss", "kept for the backward"

_HANDLERS: dict[Any, Callable] = {}


def handler(*functions: Callable) -> Callable[[Callable], Callable]:
    """Decorator: what it decorates is the encrypted form of these torch or hf_he functions, called with their arguments whenever one of
    the tensors among them is an EncryptedTensor. It refuses what it cannot do with `unsupported`."""

    def register(function: Callable) -> Callable:
        _HANDLERS.update(dict.fromkeys(functions, function))
        return function

    return register


class EncryptedTensor(torch.Tensor):
    """Logical shape [B, T, F] (a hidden state), [B, F] (its first token), [B, T, heads, head_dim] and [B, heads, T, head_dim] (the same
    ciphertexts, split into heads), [B, 1, T, T] (an attention mask), [B] (labels) or [] (a loss), B being the packing's sequences; or the
    shape of a trained parameter."""

    operand: Operand
    kind: str

    @staticmethod
    def __new__(cls, operand: Operand, shape: tuple[int, ...], kind: str, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> EncryptedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu", requires_grad=requires_grad)
        tensor.operand = operand
        tensor.kind = kind
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def ciphertext(self) -> Ciphertext:
        """The batched ciphertext [blocks]; computes a linear map that was still waiting."""
        return self.operand.ciphertext

    @property
    def session(self) -> EncryptedSession:
        return self.operand.context

    @property
    def level(self) -> int:
        return self.operand.level

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            level = "" if self.kind in (LOSS, KEPT) else f"level {self.level}, "
            return f"EncryptedTensor({self.kind} {tuple(self.shape)}, {level}{self.session.backend.name})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        encrypted = _HANDLERS.get(func)
        if encrypted is None:
            raise unsupported(func)
        result = encrypted(*args, **kwargs)
        if torch.is_grad_enabled() and _detached(result) and any(t.requires_grad for t in _encrypted((*args, *kwargs.values()))):
            raise unsupported(func, " that can be differentiated: train with operations that have a backward (hf_he.autograd), or use torch.no_grad()")
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        encrypted = _HANDLERS.get(func)
        if encrypted is None:
            raise unsupported(func)
        return encrypted(*args, **(kwargs or {}))


def _encrypted(values: Any) -> Iterator[EncryptedTensor]:
    """The encrypted tensors among `values` and in the lists and tuples among them."""
    for value in values:
        if isinstance(value, EncryptedTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _encrypted(value)


def _detached(result: Any) -> bool:
    return any(tensor.is_floating_point() and not tensor.requires_grad for tensor in _encrypted((result,)))


class Labels(Operand):
    """What a loss compares the logits with: `one_hot` and `weights` [1], both zero outside of the features < labels of first tokens. `loss` has
    the polynomials (hf_he.finetuning.loss); None where its gradient comes from elsewhere."""

    def __init__(self, context: OperationContext, features: int, one_hot: Ciphertext, weights: Ciphertext, loss: Any = None) -> None:
        super().__init__(context, features, one_hot, pooled=True)
        self.weights = weights
        self.loss = loss

    @property
    def one_hot(self) -> Ciphertext:
        return self.ciphertext


class EncryptedSession(OperationContext):
    """Backend, packing and refresh policy of one server; makes EncryptedTensors out of the ciphertexts it receives.

    `activations` says what a forward that will be differentiated leaves in memory. "keep": what the backward multiplies with (per layer and
    block of c features: q, k, v, kernel and slopes of attention, the centred state and two statistics of each LayerNorm, the wide
    input of the activation). "recompute": the states between the layers' parts, q, k, v and the scores; the rest is computed again from
    them. Two layers of 128 features with rank 2: 131 and 100 MB at N = 2^14, 0.79 and 0.63 GB at 2^16 (0.06 and 0.40 GB of that are the weights),
    and a sixth more rotations in the backward. transformers' gradient checkpointing (use_reentrant=False) works with either and keeps nothing
    within a layer (70 MB and 0.49 GB), at the price of a second forward. For bootstrapping give sequence weights of 16 or so: gradients then stay
    well above its error.
    """

    def __init__(self, backend: HEBackend, packing: Packing, refresh: RefreshPolicy | None = None, activations: Literal["keep", "recompute"] = "keep") -> None:
        if activations not in ("keep", "recompute"):
            raise ParameterError(f"activations must be keep or recompute, got {activations!r}")
        super().__init__(backend, packing, refresh)
        self.activations = activations

    def hidden_state(self, ciphertext: Ciphertext, features: int | None = None) -> EncryptedTensor:
        """[blocks] ciphertexts from `pack_embeddings` as a hidden state [B, T, features] (default: all features of the blocks)."""
        features = ciphertext.count * self.packing.features if features is None else features
        if ciphertext.batch_shape != (self.packing.blocks(features),):
            raise ShapeError(f"a state of {features} features is {self.packing.blocks(features)} ciphertexts, got a batch of {ciphertext.batch_shape}")
        return state_tensor(Operand(self, features, ciphertext))

    def attention_mask(self, ciphertext: Ciphertext) -> EncryptedTensor:
        """[1] ciphertext from `pack_attention_mask` as a mask [B, 1, T, T]."""
        packing = self.packing
        if ciphertext.batch_shape != (1,):
            raise ShapeError(f"an attention mask is a batch of one ciphertext, got a batch of {ciphertext.batch_shape}")
        return EncryptedTensor(Operand(self, packing.features, ciphertext), (packing.sequences, 1, packing.tokens, packing.tokens), MASK)

    def weight(self, ciphertext: Ciphertext, shape: tuple[int, int]) -> EncryptedTensor:
        """[vectors] periodic ciphertexts as a trained matrix [out, in], a leaf of autograd: its rows or columns, see `hf_he.ops.weights`."""
        expected = (weights.vectors(shape, self.packing),)
        if ciphertext.batch_shape != expected:
            raise ShapeError(f"a trained matrix of shape {tuple(shape)} is {expected[0]} ciphertexts, got a batch of {ciphertext.batch_shape}")
        return EncryptedTensor(Operand(self, shape[1], ciphertext), tuple(shape), WEIGHT, requires_grad=True)

    def bias(self, ciphertext: Ciphertext, features: int) -> EncryptedTensor:
        """[blocks] periodic ciphertexts as a trained vector [features], a leaf of autograd."""
        if ciphertext.batch_shape != (self.packing.blocks(features),):
            raise ShapeError(f"a bias of {features} features is {self.packing.blocks(features)} ciphertexts, got a batch of {ciphertext.batch_shape}")
        return EncryptedTensor(Operand(self, features, ciphertext), (features,), BIAS, requires_grad=True)

    def labels(self, targets: Ciphertext, sequence_weights: Ciphertext, num_labels: int, dtype: torch.dtype = torch.int64, loss: Any = None) -> EncryptedTensor:
        """Labels [B], or [B, num_labels] numbers to predict (dtype float32): [blocks] with a one-hot vector or the numbers on each sequence's first
        token, and [1] with the sequence's weight in the same places; zero elsewhere. Blocks of several features hold all labels in the first.

        With `loss`, a CrossEntropy or MeanSquaredError of hf_he.finetuning.loss, `model(..., labels=labels).loss.backward()` works.
        """
        blocks, c = self.packing.blocks(num_labels), self.packing.features
        if c > 1 and blocks > 1:
            raise ShapeError(f"labels are one ciphertext of at most {c} features, got {num_labels}: use a packing with more")
        for ciphertext, count in ((targets, blocks), (sequence_weights, 1)):
            if ciphertext.batch_shape != (count,):
                raise ShapeError(f"{num_labels} labels are {blocks} ciphertexts and one of weights, got a batch of {ciphertext.batch_shape}")
        shape = (self.packing.sequences,) if dtype is torch.int64 else (self.packing.sequences, num_labels)
        return EncryptedTensor(Labels(self, num_labels, targets, sequence_weights, loss), shape, LABELS, dtype=dtype)


def state_tensor(operand: Operand) -> EncryptedTensor:
    """A hidden state [B, T, F], or [B, F] when the operand is pooled."""
    packing = operand.context.packing
    if operand.pooled:
        return EncryptedTensor(operand, (packing.sequences, operand.features), POOLED)
    return EncryptedTensor(operand, (packing.sequences, operand.context.tokens, operand.features), HIDDEN)


def unsupported(func: Any, why: str = "") -> UnsupportedEncryptedOperation:
    """The error of a function without an encrypted form (for what `why` says)."""
    name = resolve_name(func) or getattr(func, "__qualname__", None) or str(func)
    return UnsupportedEncryptedOperation(f"{name} has no encrypted form{why or ': use an HE model (hf_he.models), whose operations all have one'}")


def state_operand(tensor: Any, func: Callable) -> Operand:
    """The operand of a hidden or pooled state; anything else cannot be an input of `func`."""
    if not isinstance(tensor, EncryptedTensor):
        raise unsupported(func, " with a plaintext tensor here: encrypt it first")
    if tensor.kind not in (HIDDEN, POOLED):
        raise unsupported(func, f" on {tensor.kind}: it takes a state [B, T, F] or [B, F]")
    return tensor.operand


_METADATA = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "grad", "is_leaf", "is_sparse", "is_quantized", "_version")
    ),
    *(getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(getattr(torch.Tensor, name) for name in ("is_floating_point", "is_complex", "size", "dim", "numel", "requires_grad_", "retain_grad", "register_hook")),
}

import hf_he.handlers  # noqa: E402, F401
