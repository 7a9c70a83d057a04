"""A small random decoder in polynomial mode, saved with a word-level tokenizer like a trained checkpoint."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_he import HEGPTNeoXConfig, HEGPTNeoXForCausalLM, HELlamaConfig, HELlamaForCausalLM, RangeTracker

WORDS = [
    "<eos>", "<unk>", "the", "a", "old", "sea", "ship", "wind", "sailed", "sank", "rose", "and", "to", "on", "by", "night",
    "day", "cold", "dark", "long", "far", "home",
]  # fmt: skip
KERNELS = {
    "gaussian": {"attention_kernel": "gaussian_kernel"},
    "power": {"attention_kernel": "power_softmax", "power_softmax_eps": 0.5},
    "normalized": {"attention_kernel": "normalized_gaussian_kernel", "power_softmax_eps": 0.05, "power_softmax_length_agnostic": True},
    "divisor": {"attention_kernel": "power_softmax", "power_softmax_shift": 1.0, "power_softmax_divisor": 4000.0},
}


ARCHITECTURES = {
    "neox": (HEGPTNeoXConfig, HEGPTNeoXForCausalLM, {"num_attention_heads": 2, "rotary_pct": 0.5}),
    "llama": (HELlamaConfig, HELlamaForCausalLM, {"num_attention_heads": 4, "num_key_value_heads": 2}),
}


def tiny_decoder(
    kernel: str = "gaussian", length: int = 16, seed: int = 0, architecture: str = "neox", **overrides
) -> HEGPTNeoXForCausalLM | HELlamaForCausalLM:
    """Hidden size 16, one layer unless told otherwise; the fitted ranges hold for sequences of up to `length` tokens, with a margin."""
    torch.manual_seed(seed)
    config_class, model_class, own = ARCHITECTURES[architecture]
    settings = {"num_hidden_layers": 1, "intermediate_size": 32, "initializer_range": 0.4} | own | KERNELS[kernel] | overrides
    config = config_class(vocab_size=len(WORDS), hidden_size=16, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, **settings)
    model = model_class(config).eval()
    tokens = torch.randint(0, config.vocab_size, (64, length))
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(tokens)
    model.set_approximations({name: _entry(observed) for name, observed in tracker.ranges.items()})
    model.set_mode("polynomial")
    return model


def save_tiny_decoder(directory: Path, **options) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>").save_pretrained(directory)
    tiny_decoder(**options).save_pretrained(directory)
    return directory


def _entry(observed) -> dict:
    low, high = observed.minimum, observed.maximum
    margin = 0.3 * max(abs(low), abs(high))
    return {
        "variance": {"interval": [low / 2, 2 * high], "degree": 7, "newton_steps": 2},
        "input": {"interval": [min(low, -high) - margin, max(high, -low) + margin], "degree": 15},
        "exponent": {"interval": [low - margin, 0.0], "squarings": 6},
        "power_mean": {"interval": [low / 2, 2 * high], "degree": 15, "goldschmidt_steps": 3},
        "kernel_mean": {"interval": [low / 2, 2 * high], "degree": 15, "goldschmidt_steps": 3},
        "score": {"interval": [low - margin, high + margin]},
    }[observed.statistic]
