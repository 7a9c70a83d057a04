"""Where each feature, token and sequence sits in the slots of a ciphertext.

Slot = (token * B + sequence) * c + feature, with c features innermost, B sequences, T tokens outermost, and T * B * c = n: every slot is
used, so rotations by whole tokens are cyclic over the tokens. A hidden state [B, T, F] is ceil(F / c) ciphertexts (feature blocks).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from hf_he.errors import ParameterError, ShapeError

TOKEN_BABY_STEPS = 8


def is_power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


@dataclass(frozen=True)
class Packing:
    """`features` c per ciphertext, `tokens` T and `sequences` B, all powers of two with c * T * B = slots."""

    slots: int
    features: int
    tokens: int
    sequences: int

    def __post_init__(self) -> None:
        for name, value in (("features", self.features), ("tokens", self.tokens), ("sequences", self.sequences)):
            if not is_power_of_two(value):
                raise ShapeError(f"packing needs a power of two for {name}, got {value}: pad it to {1 << max(value - 1, 0).bit_length()}")
        if self.features * self.tokens * self.sequences != self.slots:
            raise ShapeError(
                f"{self.features} features x {self.tokens} tokens x {self.sequences} sequences do not fill {self.slots} slots: "
                "build the packing with Packing.fit, which chooses the number of sequences"
            )

    @classmethod
    def fit(cls, slots: int, features: int, tokens: int) -> Packing:
        """The packing of `tokens`-token sequences of `features` features; the sequences per batch follow from the slots."""
        for name, value in (("features", features), ("tokens", tokens)):
            if not is_power_of_two(value):
                raise ShapeError(f"packing needs a power of two for {name}, got {value}: pad it to {1 << max(value - 1, 0).bit_length()}")
        if features * tokens > slots:
            raise ShapeError(
                f"{tokens} tokens x {features} features need {features * tokens} slots, these parameters have {slots}: "
                f"use at most {max(slots // features, 1)} tokens, or a parameter set with ring degree >= {2 * features * tokens}"
            )
        return cls(slots, features, tokens, slots // (features * tokens))

    @property
    def token_stride(self) -> int:
        """Slots between one token and the next of the same sequence."""
        return self.sequences * self.features

    def blocks(self, features: int) -> int:
        """Ciphertexts that `features` features fill."""
        return -(-features // self.features)

    @cached_property
    def first_token(self) -> np.ndarray:
        """[slots] 0/1: ones on token 0 of every sequence."""
        mask = np.zeros((self.tokens, self.token_stride))
        mask[0] = 1.0
        return mask.reshape(-1)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class ScoreLayout:
    """Where attention scores sit: diagonal j = g * babies + a of head m is feature m * head_dim + (j mod head_dim) of score ciphertext j // head_dim.

    In the lane of token t the entry is the score of query token t - g * babies with key token t + a (both mod T): un-aligned, so that
    no rotation is spent on lining queries up before the kernel.
    """

    packing: Packing
    heads: int

    def __post_init__(self) -> None:
        if self.packing.features % self.heads or not is_power_of_two(self.packing.features // self.heads):
            raise ShapeError(f"{self.heads} heads do not divide {self.packing.features} features into power-of-two heads: choose a power of two of heads")

    @property
    def head_dim(self) -> int:
        return self.packing.features // self.heads

    @property
    def babies(self) -> int:
        return min(TOKEN_BABY_STEPS, self.packing.tokens, self.head_dim)

    @property
    def giants(self) -> int:
        return self.packing.tokens // self.babies

    @property
    def windows(self) -> int:
        """Baby windows one head of one score ciphertext holds."""
        return self.head_dim // self.babies

    @property
    def ciphertexts(self) -> int:
        return -(-self.packing.tokens // self.head_dim)

    def window(self, giant: int) -> int:
        return giant % self.windows

    def ciphertext(self, giant: int) -> int:
        return giant // self.windows


def _lanes(array: np.ndarray, packing: Packing) -> np.ndarray:
    """[B', T', ...] to [T, B, ...]: tokens first, unused sequence lanes filled with copies of the given sequences."""
    count, tokens = array.shape[:2]
    if count < 1 or count > packing.sequences or tokens != packing.tokens:
        raise ShapeError(f"this packing takes 1 to {packing.sequences} sequences of {packing.tokens} tokens, got {count} of {tokens}: pad or split the batch")
    filled = array[np.arange(packing.sequences) % count]
    return np.moveaxis(filled, 1, 0)


def pack_embeddings(embeddings: np.ndarray, packing: Packing) -> np.ndarray:
    """[B', T, F] -> [ceil(F / c), slots]. Missing features are zero, unused sequence lanes repeat the given ones (real data, so ranges hold)."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    if embeddings.ndim != 3:
        raise ShapeError(f"embeddings must be [sequences, tokens, features], got shape {embeddings.shape}")
    blocks = packing.blocks(embeddings.shape[-1])
    lanes = _lanes(embeddings, packing)
    padded = np.zeros((packing.tokens, packing.sequences, blocks * packing.features))
    padded[..., : embeddings.shape[-1]] = lanes
    blocked = padded.reshape(packing.tokens, packing.sequences, blocks, packing.features)
    return np.ascontiguousarray(np.moveaxis(blocked, 2, 0)).reshape(blocks, packing.slots)


def unpack_state(slots: np.ndarray, packing: Packing, features: int, sequences: int | None = None) -> np.ndarray:
    """[ceil(F / c), slots] -> [B', T, F], the inverse of `pack_embeddings`."""
    slots = np.asarray(slots).reshape(-1, packing.tokens, packing.sequences, packing.features)
    merged = np.moveaxis(slots, 0, 2).reshape(packing.tokens, packing.sequences, -1)
    return np.moveaxis(merged, 0, 1)[: packing.sequences if sequences is None else sequences, :, :features]


def pack_attention_mask(mask: np.ndarray, packing: Packing, power: int | None = None) -> np.ndarray:
    """Key mask [B', T] of 0/1 -> [1, slots], every feature of a token holding its 0 or 1.

    Encrypting it keeps the lengths private. It multiplies the values (of the Gaussian kernel) or scores (of the power softmax), which is exact: a
    masked key contributes nothing. With `power`, ones become n^(-1 / power) for a sequence of n: what a bidirectional power softmax that
    divides its rows by their number of valid keys takes; a causal one counts keys by their position, and wants its padding on the right.

    Raises ShapeError for another shape, ParameterError for other values.
    """
    mask = np.asarray(mask, dtype=np.float64)
    if mask.ndim != 2:
        raise ShapeError(f"the attention mask must be [sequences, tokens], got shape {mask.shape}")
    if not np.isin(mask, (0.0, 1.0)).all():
        raise ParameterError("an attention mask holds 1 for a token and 0 for padding, nothing else")
    if power is not None:
        mask = mask * np.maximum(mask.sum(-1, keepdims=True), 1.0) ** (-1.0 / power)
    return np.repeat(_lanes(mask, packing)[..., None], packing.features, axis=-1).reshape(1, packing.slots)


def unpack_logits(slots: np.ndarray, packing: Packing, num_labels: int, sequences: int | None = None) -> np.ndarray:
    """[blocks, slots] of pooled features (on token 0) -> [B', num_labels]."""
    return unpack_state(slots, packing, num_labels, sequences)[:, 0]
