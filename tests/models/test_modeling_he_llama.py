"""HELlama: the contract for every kernel, grouped heads, polynomial mode, and conversion from stock Llama."""

from dataclasses import replace

import pytest
import torch
from contract import CausalContract, Family
from decoder_polynomial_mode import DecoderPolynomialMode
from decoders import scaled, tokens
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from hf_he import HELlamaConfig, HELlamaForCausalLM, HELlamaForSequenceClassification, HELlamaModel, convert_llama
from hf_he.errors import ShapeError, UnsupportedModelError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
TINY = HELlamaConfig(**SIZES, tie_word_embeddings=True)
FAMILY = Family(
    TINY,
    HELlamaModel,
    HELlamaForCausalLM,
    HELlamaForSequenceClassification,
    {AutoModel: HELlamaModel, AutoModelForCausalLM: HELlamaForCausalLM, AutoModelForSequenceClassification: HELlamaForSequenceClassification},
    frozenset({"q_proj", "v_proj"}),
    {"attention_dropout": 0.0},
)
PAIRS = [(LlamaModel, HELlamaModel), (LlamaForCausalLM, HELlamaForCausalLM), (LlamaForSequenceClassification, HELlamaForSequenceClassification)]
LAYOUTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one-key-value-head": {"num_key_value_heads": 1},
    "ungrouped-biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "own-head-dim": {"head_dim": 8},
    "scaled-rotary": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
}


def variant(**overrides):
    return replace(FAMILY, config=HELlamaConfig(**{**TINY.to_dict(), **overrides}))


class TestGaussianKernel(CausalContract):
    family = FAMILY


class TestPowerSoftmax(CausalContract):
    family = variant(attention_kernel="power_softmax", power_softmax_length_agnostic=True)


class TestSoftmax(CausalContract):
    family = variant(attention_kernel="softmax")


class TestPolynomialMode(DecoderPolynomialMode):
    model_class = HELlamaForCausalLM
    classifier = HELlamaForSequenceClassification
    config = TINY


def stock(model_class=LlamaForCausalLM, **overrides):
    torch.manual_seed(0)
    return scaled(model_class(LlamaConfig(**{**SIZES, **overrides})))


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
class TestConversion:
    @pytest.mark.parametrize("source_class, target_class", PAIRS, ids=lambda c: c.__name__)
    def test_with_softmax_the_function_is_the_same(self, source_class, target_class):
        source = stock(source_class)
        converted = convert_llama(source, attention_kernel="softmax")
        assert type(converted) is target_class and converted.config.model_type == "he_llama"
        torch.testing.assert_close(converted(tokens())[0], source(tokens())[0], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
    def test_every_layout_and_left_padding(self, layout):
        source = stock(**layout)
        converted = convert_llama(source, attention_kernel="softmax")
        mask = torch.ones_like(tokens())
        mask[0, :3] = 0
        theirs, ours = source(tokens(), attention_mask=mask).logits, converted(tokens(), attention_mask=mask).logits
        assert ((ours - theirs) * mask[..., None]).abs().max() <= 1e-4
        assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == layout.get("tie_word_embeddings", False)

    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("kernel", ["softmax", "gaussian_kernel", "power_softmax"])
    def test_from_a_directory_and_back_from_disk(self, kernel, tied, tmp_path):
        source = stock(tie_word_embeddings=tied)
        source.save_pretrained(tmp_path / "stock")
        converted = convert_llama(tmp_path / "stock", attention_kernel=kernel)
        theirs, ours = source.state_dict(), converted.state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
        converted.save_pretrained(tmp_path / "converted")
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (type(loaded), loaded.config.attention_kernel) == (HELlamaForCausalLM, kernel)
        assert torch.equal(loaded(tokens()).logits, converted(tokens()).logits)

    def test_rotary_frequencies_of_16_bit_models_stay_in_float32(self, tmp_path):
        stock(max_position_embeddings=800).to(torch.bfloat16).save_pretrained(tmp_path)
        source, converted = LlamaForCausalLM.from_pretrained(tmp_path), convert_llama(tmp_path, attention_kernel="softmax")
        ours, theirs = converted.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq
        assert converted.dtype == torch.bfloat16 and ours.dtype == torch.float32 and torch.equal(ours, theirs)
        converted.save_pretrained(tmp_path / "converted")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
        assert torch.equal(loaded(tokens(2, 700)).logits, converted(tokens(2, 700)).logits)

    def test_generation_of_the_stock_model(self):
        source = stock(eos_token_id=7)
        source.generation_config.max_new_tokens = 6
        converted = convert_llama(source, attention_kernel="softmax")
        assert converted.generation_config.max_new_tokens == 6 and converted.generation_config is not source.generation_config
        assert torch.equal(converted.generate(tokens(), do_sample=False), source.generate(tokens(), do_sample=False))

    def test_no_layer_is_lost(self):
        for source in (stock(), stock(LlamaModel)):
            with pytest.raises(UnsupportedModelError, match=r"has no place for .*layers\.1\."):
                convert_llama(source, num_hidden_layers=1)

    def test_a_new_head_must_be_asked_for(self):
        with pytest.raises(UnsupportedModelError, match=r"no weights for score\.weight.*new_modules"):
            convert_llama(stock(), target_class=HELlamaForSequenceClassification)
        converted = convert_llama(stock(), target_class=HELlamaForSequenceClassification, new_modules=("score",), num_labels=4)
        assert converted.score.weight.shape == (4, 16)

    def test_other_models_are_refused(self, tmp_path):
        other = GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}))
        other.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match="'gpt_neox' model; HELlama is converted from a 'llama' one"):
            convert_llama(tmp_path)
        with pytest.raises(UnsupportedModelError, match="GPTNeoXForCausalLM is not a 'llama' model"):
            convert_llama(other)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["softmax", "gaussian_kernel", "power_softmax"])
def test_grouped_heads_equal_repeated_ones(kernel):
    """Two heads of keys and values for four of queries compute what four heads with the same weights twice compute."""
    torch.manual_seed(0)
    grouped = scaled(HELlamaForCausalLM(HELlamaConfig(**SIZES, attention_kernel=kernel)))
    repeated = HELlamaForCausalLM(HELlamaConfig(**{**SIZES, "num_key_value_heads": 4}, attention_kernel=kernel)).eval()
    weights = grouped.state_dict()
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name].view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
    repeated.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens()).logits, repeated(tokens()).logits)


def test_config_rejects_wrong_fields():
    for wrong in ({"attention_kernel": "linear"}, {"num_key_value_heads": 3}, {"power_softmax_degree": 5}, {"hidden_act": "mish"}, {"mode": "fast"}):
        with pytest.raises((ValueError, StrictDataclassError)):
            HELlamaConfig(**{**TINY.to_dict(), **wrong})


def test_exactly_one_input():
    model = HELlamaModel(HELlamaConfig(**SIZES))
    for bad in ({}, {"input_ids": tokens(), "inputs_embeds": torch.zeros(4, 8, 16)}):
        with pytest.raises(ShapeError, match="exactly one"):
            model(**bad)
