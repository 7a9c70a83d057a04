"""HEGPTNeoX: the contract for every kernel, polynomial mode, and conversion from stock GPT-NeoX, old head names included."""

from dataclasses import replace

import pytest
import torch
from contract import CausalContract, Family
from decoder_polynomial_mode import DecoderPolynomialMode
from decoders import scaled, tokens
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
)

from hf_he import HEGPTNeoXConfig, HEGPTNeoXForCausalLM, HEGPTNeoXForSequenceClassification, HEGPTNeoXModel, convert_gpt_neox
from hf_he.errors import ShapeError, UnsupportedModelError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
TINY = HEGPTNeoXConfig(**SIZES, tie_word_embeddings=True)
FAMILY = Family(
    TINY,
    HEGPTNeoXModel,
    HEGPTNeoXForCausalLM,
    HEGPTNeoXForSequenceClassification,
    {AutoModel: HEGPTNeoXModel, AutoModelForCausalLM: HEGPTNeoXForCausalLM, AutoModelForSequenceClassification: HEGPTNeoXForSequenceClassification},
    frozenset({"query_key_value"}),
    {"hidden_dropout": 0.0, "attention_dropout": 0.0},
)
PAIRS = [
    (GPTNeoXModel, HEGPTNeoXModel),
    (GPTNeoXForCausalLM, HEGPTNeoXForCausalLM),
    (GPTNeoXForSequenceClassification, HEGPTNeoXForSequenceClassification),
]
LAYOUTS = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False},
    "tied": {"tie_word_embeddings": True},
    "full-rotary-no-bias": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}, "attention_bias": False},
}


def variant(**overrides):
    return replace(FAMILY, config=HEGPTNeoXConfig(**{**TINY.to_dict(), **overrides}))


class TestGaussianKernel(CausalContract):
    family = FAMILY


class TestPowerSoftmax(CausalContract):
    family = variant(attention_kernel="power_softmax")


class TestSoftmax(CausalContract):
    family = variant(attention_kernel="softmax", use_parallel_residual=False)


class TestPolynomialMode(DecoderPolynomialMode):
    model_class = HEGPTNeoXForCausalLM
    classifier = HEGPTNeoXForSequenceClassification
    config = TINY


def stock(model_class=GPTNeoXForCausalLM, **overrides):
    torch.manual_seed(0)
    return scaled(model_class(GPTNeoXConfig(**{**SIZES, **overrides})))


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
class TestConversion:
    @pytest.mark.parametrize("source_class, target_class", PAIRS, ids=lambda c: c.__name__)
    def test_with_softmax_the_function_is_the_same(self, source_class, target_class):
        source = stock(source_class)
        converted = convert_gpt_neox(source, attention_kernel="softmax")
        assert type(converted) is target_class and converted.config.model_type == "he_gpt_neox"
        torch.testing.assert_close(converted(tokens())[0], source(tokens())[0], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
    def test_every_layout_and_left_padding(self, layout):
        source = stock(**layout)
        converted = convert_gpt_neox(source, attention_kernel="softmax")
        mask = torch.ones_like(tokens())
        mask[0, :3] = 0
        theirs, ours = source(tokens(), attention_mask=mask).logits, converted(tokens(), attention_mask=mask).logits
        assert ((ours - theirs) * mask[..., None]).abs().max() <= 1e-4
        assert (converted.lm_head.weight is converted.gpt_neox.embed_in.weight) == layout.get("tie_word_embeddings", False)

    @pytest.mark.parametrize("kernel", ["softmax", "gaussian_kernel", "power_softmax"])
    def test_from_a_directory_and_back_from_disk(self, kernel, tmp_path):
        source = stock()
        source.save_pretrained(tmp_path / "stock")
        converted = convert_gpt_neox(tmp_path / "stock", attention_kernel=kernel)
        theirs, ours = source.state_dict(), converted.state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
        converted.save_pretrained(tmp_path / "converted")
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (type(loaded), loaded.config.attention_kernel) == (HEGPTNeoXForCausalLM, kernel)
        assert torch.equal(loaded(tokens()).logits, converted(tokens()).logits)

    def test_old_checkpoints_name_the_head_embed_out(self, tmp_path):
        """transformers renames embed_out to lm_head for the class GPTNeoXForCausalLM only; here the head must not stay random."""
        source = stock()
        source.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        head = weights.pop("lm_head.weight", None)
        if head is not None:
            weights["embed_out.weight"] = head
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
        converted = convert_gpt_neox(tmp_path, attention_kernel="softmax")
        torch.testing.assert_close(converted(tokens()).logits, source(tokens()).logits, atol=1e-4, rtol=0)
        direct, report = HEGPTNeoXForCausalLM.from_pretrained(tmp_path, config=HEGPTNeoXConfig(**SIZES), output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert torch.equal(direct.lm_head.weight, source.lm_head.weight)

    def test_rotary_frequencies_of_16_bit_models_stay_in_float32(self, tmp_path):
        stock(max_position_embeddings=800).to(torch.bfloat16).save_pretrained(tmp_path)
        source, converted = GPTNeoXForCausalLM.from_pretrained(tmp_path), convert_gpt_neox(tmp_path, attention_kernel="softmax")
        ours, theirs = converted.gpt_neox.rotary_emb.inv_freq, source.gpt_neox.rotary_emb.inv_freq
        assert converted.dtype == torch.bfloat16 and ours.dtype == torch.float32 and torch.equal(ours, theirs)
        converted.save_pretrained(tmp_path / "converted")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
        assert torch.equal(loaded(tokens(2, 700)).logits, converted(tokens(2, 700)).logits)

    def test_generation_of_the_stock_model(self):
        source = stock(eos_token_id=7)
        source.generation_config.max_new_tokens = 6
        converted = convert_gpt_neox(source, attention_kernel="softmax")
        assert converted.generation_config.max_new_tokens == 6 and converted.generation_config is not source.generation_config
        assert torch.equal(converted.generate(tokens(), do_sample=False), source.generate(tokens(), do_sample=False))

    def test_no_layer_is_lost(self):
        for source in (stock(), stock(GPTNeoXModel)):
            with pytest.raises(UnsupportedModelError, match=r"has no place for .*layers\.1\."):
                convert_gpt_neox(source, num_hidden_layers=1)

    def test_a_new_head_must_be_asked_for(self):
        with pytest.raises(UnsupportedModelError, match=r"no weights for score\.weight.*new_modules"):
            convert_gpt_neox(stock(), target_class=HEGPTNeoXForSequenceClassification)
        converted = convert_gpt_neox(stock(), target_class=HEGPTNeoXForSequenceClassification, new_modules=("score",), num_labels=4)
        assert converted.score.weight.shape == (4, 16)

    def test_activations_without_a_polynomial(self):
        with pytest.raises(UnsupportedModelError, match="hidden_act='gelu_fast'; pass the closest of gelu"):
            convert_gpt_neox(stock(hidden_act="gelu_fast"))
        assert convert_gpt_neox(stock(hidden_act="gelu_fast"), hidden_act="gelu").config.hidden_act == "gelu"


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_kernel": "linear"},
        {"mode": "encrypted"},
        {"hidden_act": "mish"},
        {"num_attention_heads": 3},
        {"power_softmax_degree": 3},
        {"power_softmax_eps": 0.0},
        {"power_softmax_divisor": -1.0},
        {"hidden_size": "16"},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_config_rejects_wrong_fields(wrong):
    with pytest.raises((ValueError, StrictDataclassError)):
        HEGPTNeoXConfig(**{**TINY.to_dict(), **wrong})


def test_exactly_one_input():
    model = HEGPTNeoXModel(HEGPTNeoXConfig(**SIZES))
    for bad in ({}, {"input_ids": tokens(), "inputs_embeds": torch.zeros(4, 8, 16)}):
        with pytest.raises(ShapeError, match="exactly one"):
            model(**bad)
