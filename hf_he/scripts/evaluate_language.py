"""`hf-he evaluate --task lm`: perplexity of a decoder on held-out text, and the ranges it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_he.checkpoints import load_in_mode, load_tokenizer
from hf_he.corpora import load_documents
from hf_he.errors import DataError
from hf_he.perplexity import evaluate_perplexity
from hf_he.training.language_data import token_blocks

BLOCK = 64


def evaluate_language(directory: Path, split: str, mode: str, data_dir: Path | None, limit: int | None, block: int, batch_size: int) -> dict[str, Any]:
    """The JSON of the command: perplexity per token and bits per byte of `limit` blocks (at equal distances) of `split`.

    Raises DataError for a folder without a model, a stock model in polynomial mode, or blocks longer than the model's context.
    """
    model, tokenizer = load_decoder(directory, mode)
    if block > model.config.max_position_embeddings:
        raise DataError(f"blocks of {block} tokens exceed the model's context of {model.config.max_position_embeddings}: lower --max-length.")
    blocks = spread_blocks(tokenizer, split, data_dir, block, limit)
    result = evaluate_perplexity(model, blocks, batch_size=batch_size, progress=True)
    size = sum(len(text.encode()) for text in tokenizer.batch_decode(blocks[:, 1:]))
    scores = {"task": "lm", "split": split, "blocks": len(blocks), "block": block, "bits_per_byte": result.bits_per_token * result.tokens / size}
    return scores | result.to_dict()


def load_decoder(directory: Path, mode: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in `mode` and its tokenizer. Raises DataError for a folder without a model, or a stock model in another mode than exact."""
    model = load_in_mode(AutoModelForCausalLM, directory, "ForCausalLM", "decoder", mode)
    return model, load_tokenizer(directory)


def spread_blocks(tokenizer: PreTrainedTokenizerBase, split: str, data_dir: Path | None, length: int, limit: int | None) -> torch.Tensor:
    """Token ids [rows, length] of `limit` blocks, at equal distances, of a split."""
    blocks = token_blocks(tokenizer, load_documents(split, data_dir=data_dir), length)
    if limit is not None and limit < len(blocks):
        blocks = blocks[[row * len(blocks) // limit for row in range(limit)]]
    return blocks
