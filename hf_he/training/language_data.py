"""From documents to batches of a language model: byte-level BPE, packed blocks, and blocks unlike any text for the range penalty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from hf_he.corpora import Document
from hf_he.errors import DataError

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
NO_LABEL = -100
_LONGEST_CYCLE = 8


def train_tokenizer(documents: Sequence[Document], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al., ACL 2016) of `vocabulary` entries, two of them special. It can encode any text.

    Raises DataError for a vocabulary that is too small for the 256 bytes, or texts too few to fill it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise DataError(f"the texts give a vocabulary of {tokenizer.get_vocab_size()} entries, not {vocabulary}: change `vocabulary` in the recipe.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING, model_max_length=max_length, padding_side="left"
    )


def token_blocks(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], length: int) -> torch.Tensor:
    """Token ids [blocks, length] of the documents, each closed by the end-of-text token, packed one after the other; the last, partial block is left out."""
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])
    blocks = len(tokens) // length
    if not blocks:
        raise DataError(f"the texts have {len(tokens)} tokens, fewer than one block of {length}: give longer texts.")
    return tokens[: blocks * length].view(blocks, length)


def stress_blocks(vocabulary: int, rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [rows, length] far outside any text: by turns uniformly random tokens and short random cycles repeated to the end, as in a
    generation that has got stuck."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(vocabulary, (rows, length), generator=generator)
    cycles = torch.randint(1, _LONGEST_CYCLE + 1, (rows, 1), generator=generator)
    cycles[::2] = length
    return blocks.gather(1, torch.arange(length) % cycles)


@dataclass(frozen=True)
class BlockDataset(Dataset):
    """Rows of `texts` in order, `text_rows` at a time, each time followed by `stress_rows` of `stress` (used again from the start when it
    ends), which carry no labels. With batches of both counts together, every batch has its share of each."""

    texts: torch.Tensor
    stress: torch.Tensor
    text_rows: int
    stress_rows: int

    def __len__(self) -> int:
        return len(self.texts) // self.text_rows * (self.text_rows + self.stress_rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        batch, place = divmod(row, self.text_rows + self.stress_rows)
        if place < self.text_rows:
            block = self.texts[batch * self.text_rows + place]
            return {"input_ids": block, "labels": block}
        block = self.stress[(batch * self.stress_rows + place - self.text_rows) % len(self.stress)]
        return {"input_ids": block, "labels": torch.full_like(block, NO_LABEL)}


def batches(blocks: torch.Tensor, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs, `size` rows at a time."""
    return ({"input_ids": rows} for rows in blocks.split(size))
