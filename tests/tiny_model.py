"""A small random HEBert with a tokenizer and calibrated polynomials, saved like a trained checkpoint."""

from pathlib import Path

import torch
from transformers import BertTokenizer

from hf_he import Client, HEBertConfig, HEBertForSequenceClassification, RangeTracker

WORDS = [
    "a", "the", "film", "story", "is", "was", "not", "very", "good", "bad", "great", "dull", "funny",
    "sad", "and", "but", "with", "no", "of", "heart", "plot", "acting",
]  # fmt: skip
SENTENCES = [
    "a great film",
    "the plot was dull",
    "very funny and very good",
    "not a bad story",
    "the acting is sad but the heart of the film is great",
]


def save_tiny_model(directory: Path, seed: int = 0, **changes) -> Path:
    """One layer, hidden size 32, two heads; the fitted ranges cover SENTENCES with a small margin."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    config = HEBertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **names | shape | changes)
    model = HEBertForSequenceClassification(config).eval()
    tokens = tokenizer(SENTENCES, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(**tokens)
    model.set_approximations({name: _entry(observed) for name, observed in tracker.ranges.items()})
    model.set_mode("polynomial")
    model.save_pretrained(directory)
    return directory


def keyed_client(model: Path, **options) -> Client:
    """A client on the simulator, with keys of its own."""
    client = Client.from_pretrained(model, backend="simulator", **options)
    client.keygen()
    return client


def _entry(observed) -> dict:
    low, high = observed.minimum, observed.maximum
    margin = 0.05 * (high - low)
    if observed.statistic == "variance":
        return {"interval": [low * 0.85, high * 1.15], "degree": 7, "newton_steps": 1}
    if observed.statistic == "exponent":
        return {"interval": [low - margin, 0.0], "squarings": 6}
    if observed.statistic in ("power_mean", "kernel_mean"):
        return {"interval": [low / 2, 2 * high], "degree": 15, "goldschmidt_steps": 3}
    return {"interval": [low - margin, high + margin], "degree": 15}
