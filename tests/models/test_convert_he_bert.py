"""Stock BERT to HEBert: every weight arrives under its own name."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from hf_he import HEBertConfig, HEBertForMaskedLM, HEBertForSequenceClassification, HEBertModel, convert_bert
from hf_he.errors import UnsupportedModelError

TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20}
PAIRS = [(BertModel, HEBertModel), (BertForMaskedLM, HEBertForMaskedLM), (BertForSequenceClassification, HEBertForSequenceClassification)]


def stock(model_class, **overrides):
    torch.manual_seed(0)
    model = model_class(BertConfig(**{**TINY, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def inputs():
    tokens = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.tensor([0, 0, 0, 0, 1, 1, 1]).repeat(3, 1)}


@pytest.mark.parametrize("source_class, target_class", PAIRS, ids=lambda c: c.__name__)
class TestConversion:
    def test_with_softmax_the_function_is_the_same(self, source_class, target_class, inputs):
        source = stock(source_class)
        converted = convert_bert(source, attention_kernel="softmax")
        assert type(converted) is target_class
        with torch.no_grad():
            torch.testing.assert_close(converted(**inputs)[0], source(**inputs)[0], atol=1e-5, rtol=1e-5)

    def test_with_the_kernel_every_weight_is_copied(self, source_class, target_class):
        source = stock(source_class)
        converted = convert_bert(source)
        assert converted.config.attention_kernel == "gaussian_kernel" and not converted.training
        theirs, ours = source.state_dict(), converted.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)

    def test_from_a_directory_and_back_from_disk(self, source_class, target_class, inputs, tmp_path):
        stock(source_class).save_pretrained(tmp_path / "stock")
        converted = convert_bert(tmp_path / "stock", attention_kernel="power_softmax", power_softmax_degree=6)
        converted.save_pretrained(tmp_path / "converted")
        loaded, report = target_class.from_pretrained(tmp_path / "converted", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (loaded.config.model_type, loaded.config.attention_kernel, loaded.config.power_softmax_degree) == ("he_bert", "power_softmax", 6)
        assert torch.equal(loaded(**inputs)[0], converted(**inputs)[0])


def test_config_fields_are_carried_over():
    source = stock(BertForSequenceClassification, num_labels=3, hidden_dropout_prob=0.25, layer_norm_eps=1e-6, classifier_dropout=0.3)
    config = convert_bert(source).config
    assert isinstance(config, HEBertConfig)
    assert (config.num_labels, config.hidden_dropout_prob, config.layer_norm_eps, config.classifier_dropout) == (3, 0.25, 1e-6, 0.3)


def test_tied_embeddings_stay_tied():
    converted = convert_bert(stock(BertForMaskedLM))
    assert converted.cls.predictions.decoder.weight is converted.bert.embeddings.word_embeddings.weight


def test_next_sentence_head_is_dropped(tmp_path, inputs):
    source = stock(BertForPreTraining)
    source.save_pretrained(tmp_path)
    converted = convert_bert(tmp_path, attention_kernel="softmax")
    torch.testing.assert_close(converted(**inputs).logits, source(**inputs).prediction_logits, atol=1e-5, rtol=1e-5)


def test_a_new_head_must_be_asked_for():
    source = stock(BertForMaskedLM)
    with pytest.raises(UnsupportedModelError, match=r"no weights for .*classifier\.weight.*new_modules"):
        convert_bert(source, target_class=HEBertForSequenceClassification)
    converted = convert_bert(source, target_class=HEBertForSequenceClassification, new_modules=("bert.pooler", "classifier"), num_labels=4)
    assert converted.classifier.weight.shape == (4, 16)
    two = stock(BertForSequenceClassification, num_labels=2)
    assert convert_bert(two, new_modules=("classifier",), num_labels=3).classifier.weight.shape == (3, 16)
    with pytest.raises(UnsupportedModelError, match=r"no weights for classifier\.weight, classifier\.bias, or in another shape"):
        convert_bert(two, num_labels=3)
    assert torch.equal(converted.bert.encoder.layer[1].output.dense.weight, source.bert.encoder.layer[1].output.dense.weight)


@pytest.mark.parametrize(
    "source_class, target_class", [*PAIRS, (BertForMaskedLM, HEBertForSequenceClassification), (BertForSequenceClassification, HEBertModel)]
)
@pytest.mark.parametrize(
    ("field", "lost"),
    [({"num_hidden_layers": 1}, r"encoder\.layer\.1\."), ({"use_bias": False}, r"bias"), ({"position_embedding_type": "sinusoidal"}, "position_embeddings")],
)
def test_no_weight_is_lost_by_a_config_field(source_class, target_class, field, lost):
    with pytest.raises(UnsupportedModelError, match=f"has no place for .*{lost}"):
        convert_bert(stock(source_class), target_class=target_class, new_modules=("bert.pooler", "classifier", "bert.embeddings", "embeddings"), **field)


def test_head_from_a_bare_encoder_and_encoder_from_a_head(inputs):
    encoder = stock(BertModel)
    head = convert_bert(encoder, "softmax", target_class=HEBertForSequenceClassification, new_modules=("classifier",))
    torch.testing.assert_close(head.bert(**inputs)[0], encoder(**inputs)[0], atol=1e-5, rtol=1e-5)
    again = convert_bert(stock(BertForSequenceClassification), "softmax", target_class=HEBertModel)
    torch.testing.assert_close(again(**inputs)[0], stock(BertForSequenceClassification).bert(**inputs)[0], atol=1e-5, rtol=1e-5)


def test_dtype_is_kept():
    assert convert_bert(stock(BertModel).to(torch.bfloat16)).dtype == torch.bfloat16


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(UnsupportedModelError, match="encoder"):
        convert_bert(stock(BertModel, is_decoder=True))
    with pytest.raises(UnsupportedModelError, match="BertForTokenClassification has no HEBert counterpart"):
        convert_bert(stock(BertForTokenClassification))
    with pytest.raises(UnsupportedModelError, match="closest of gelu, relu"):
        convert_bert(stock(BertModel, hidden_act="gelu_new"))
    assert convert_bert(stock(BertModel, hidden_act="gelu_new"), hidden_act="gelu").config.hidden_act == "gelu"
    DistilBertModel(DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=24)).save_pretrained(tmp_path / "distil")
    with pytest.raises(UnsupportedModelError, match="'distilbert'"):
        convert_bert(tmp_path / "distil")
    stock(BertForTokenClassification).save_pretrained(tmp_path / "tokens")
    with pytest.raises(UnsupportedModelError, match="BertForTokenClassification"):
        convert_bert(tmp_path / "tokens")
