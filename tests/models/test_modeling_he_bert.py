"""HEBert: the contract for every kernel and layout, the three-mode behaviour, and what the encrypted side relies on."""

from dataclasses import replace

import peft
import pytest
import torch
from contract import Family, ModelContract
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_he import HEBertConfig, HEBertForMaskedLM, HEBertForSequenceClassification, HEBertModel
from hf_he.errors import ApproximationError, RangeError, ShapeError
from hf_he.nn import RangeTracker, collect_ranges

TINY = HEBertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20)
FAMILY = Family(
    TINY,
    HEBertModel,
    HEBertForMaskedLM,
    HEBertForSequenceClassification,
    {
        AutoModel: HEBertModel,
        AutoModelForMaskedLM: HEBertForMaskedLM,
        AutoModelForSequenceClassification: HEBertForSequenceClassification,
    },
)
PAPER = {
    "norm_position": "pre",
    "gated_ffn": True,
    "hidden_act": "relu",
    "use_bias": False,
    "position_embedding_type": "sinusoidal",
    "use_pooler": False,
    "classifier_hidden_sizes": [8, 32],
}


def variant(**overrides):
    return replace(FAMILY, config=HEBertConfig(**{**TINY.to_dict(), **overrides}))


class TestGaussianKernel(ModelContract):
    family = FAMILY


class TestPowerSoftmax(ModelContract):
    family = variant(attention_kernel="power_softmax")


class TestSoftmax(ModelContract):
    family = variant(attention_kernel="softmax")


class TestPaperArchitecture(ModelContract):
    """Pre-norm, gated ReLU feed-forward, no biases, scaled sinusoidal positions, two linear layers and tanh before the classes."""

    family = variant(**PAPER)

    def test_parameters_are_those_of_the_paper(self):
        """Rho et al. train 59,392 values in the head and 18,432 in rank-2 LoRA on query, key and value."""
        sizes = {"vocab_size": 32768, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 128}
        with torch.device("meta"):
            model = HEBertForSequenceClassification(HEBertConfig(**{**PAPER, "classifier_hidden_sizes": [32, 1024]}, **sizes))
        assert sum(p.numel() for p in model.classifier.parameters()) == 59_392
        projections = [m for n, m in model.named_modules() if n.endswith(("self.query", "self.key", "self.value"))]
        assert sum(2 * (m.in_features + m.out_features) for m in projections) == 18_432
        assert not any(n.endswith("bias") for n, _ in model.named_parameters() if "LayerNorm" not in n)
        assert {"bert.encoder.LayerNorm", "bert.encoder.layer.1.intermediate.LayerNorm", "classifier.activation"} <= set(model.polynomial_layers())

    def test_sinusoidal_table_survives_loading(self, tmp_path):
        model = self.make(HEBertModel)
        model.save_pretrained(tmp_path)
        table = HEBertModel.from_pretrained(tmp_path).embeddings.position_embeddings.table
        position, feature = 3, 5
        assert table[position, feature] == pytest.approx(torch.cos(torch.tensor(position / 10000 ** (4 / 16))).item())


def make(model_class=HEBertForSequenceClassification, **overrides):
    torch.manual_seed(0)
    model = model_class(HEBertConfig(**{**TINY.to_dict(), **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def inputs(batch=8, length=9):
    tokens = torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def calibrated(model, degree=31):
    """Entries with a margin around what the inputs of this file produce."""
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(**inputs())
    entries = {}
    for name, seen in tracker.ranges.items():
        largest = 1.1 * max(abs(seen.minimum), abs(seen.maximum))
        entries[name] = {
            "variance": {"interval": [seen.minimum / 1.5, seen.maximum * 1.5], "degree": degree, "newton_steps": 2},
            "input": {"interval": [-largest, largest], "degree": degree},
            "exponent": {"interval": [-largest, 0.0], "squarings": 12},
            "power_mean": {"interval": [seen.minimum / 1.5, seen.maximum * 1.5], "degree": degree, "goldschmidt_steps": 5},
        }[seen.statistic]
    return entries


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


MODELS = {
    "gaussian": (HEBertForSequenceClassification, {}),
    "power": (HEBertForSequenceClassification, {"attention_kernel": "power_softmax", "power_softmax_length_agnostic": True}),
    "paper": (HEBertForSequenceClassification, {**PAPER, "hidden_act": "gelu"}),
    "masked_lm": (HEBertForMaskedLM, {}),
}


@pytest.mark.usefixtures("no_grad")
class TestPolynomialMode:
    @pytest.mark.parametrize("overrides", [{}, {**PAPER, "hidden_act": "gelu"}], ids=["gaussian", "paper"])
    def test_goes_on_under_peft(self, overrides):
        model = make(**overrides)
        model.set_approximations(calibrated(model))
        model.set_mode("polynomial")
        expected = model(**inputs()).logits
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2)).eval()
        for mode in ("exact", "polynomial"):
            tuned.get_base_model().set_mode(mode)
        assert torch.equal(tuned(**inputs()).logits, expected)

    def test_16_bits_are_refused(self):
        model = make()
        model.set_approximations(calibrated(model))
        model.set_mode("polynomial")
        with pytest.raises(ApproximationError, match=r"needs float32 or float64, got torch\.bfloat16"):
            model.to(torch.bfloat16)(**inputs())
        with pytest.raises(ApproximationError, match="no autocast"), torch.autocast("cpu", torch.bfloat16):
            model.float()(**inputs())

    def test_an_empty_batch(self):
        model = make()
        model.set_approximations(calibrated(model))
        model.set_mode("polynomial")
        assert model(**{name: value[:0] for name, value in inputs().items()}).logits.shape == (0, 2)

    def test_another_attention_can_be_set(self):
        model = make()
        before = model(**inputs()).logits
        model.set_attn_implementation("power_softmax")
        assert not torch.allclose(model(**inputs()).logits, before)
        model.set_attn_implementation("gaussian_kernel")
        assert torch.equal(model(**inputs()).logits, before)

    @pytest.mark.parametrize("model_class, overrides", MODELS.values(), ids=MODELS.keys())
    def test_agrees_with_exact_mode_after_calibration(self, model_class, overrides, tmp_path):
        model = make(model_class, **overrides)
        exact = model(**inputs()).logits
        model.set_approximations(calibrated(model))
        assert torch.equal(model(**inputs()).logits, exact)
        model.set_mode("polynomial")
        polynomial = model(**inputs()).logits
        assert 0 < (polynomial - exact).abs().max() < 2e-2 * exact.abs().max()
        model.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path)
        assert loaded.config.mode == "polynomial"
        assert torch.equal(loaded(**inputs()).logits, polynomial)
        loaded.set_mode("exact")
        assert torch.equal(loaded(**inputs()).logits, exact)

    def test_needs_calibration(self):
        with pytest.raises(ApproximationError, match=r"9 layers have no entry.*bert\.encoder\.layer\.0\.attention\.self.*Run calibration"):
            make().set_mode("polynomial")
        with pytest.raises(ApproximationError, match="Run calibration"):
            make(HEBertModel, mode="polynomial")

    def test_softmax_has_no_polynomial_form(self):
        with pytest.raises(ApproximationError, match="softmax attention has no polynomial form"):
            make(attention_kernel="softmax").set_mode("polynomial")

    def test_values_out_of_range_name_the_layer(self):
        model = make()
        entries = calibrated(model)
        entries["bert.encoder.layer.1.intermediate.intermediate_act_fn"]["interval"] = [-0.01, 0.01]
        model.set_approximations(entries)
        model.set_mode("polynomial")
        with pytest.raises(RangeError, match=r"bert\.encoder\.layer\.1\.intermediate\.intermediate_act_fn: input"):
            model(**inputs())
        with RangeTracker(model) as tracker:
            model(**inputs())
        out_of_range = {name for name, seen in tracker.ranges.items() if seen.out_of_range}
        assert "bert.encoder.layer.1.intermediate.intermediate_act_fn" in out_of_range

    def test_tracking_covers_padding_all_pairs_and_the_pooled_token_only(self):
        model = make()
        with RangeTracker(model) as tracker:
            model(**inputs(batch=8, length=9))
        counts = {name.removeprefix("bert."): seen.count for name, seen in tracker.ranges.items()}
        assert counts["encoder.layer.0.attention.self"] == 8 * 2 * 9 * 9
        assert counts["encoder.layer.0.output.LayerNorm"] == 8 * 9
        assert counts["encoder.layer.0.intermediate.intermediate_act_fn"] == 8 * 9 * 24
        assert counts["pooler.activation"] == 8 * 16

    def test_base_model_shares_the_names(self, tmp_path):
        model = make()
        model.set_approximations(calibrated(model))
        model.set_mode("polynomial")
        model.save_pretrained(tmp_path)
        base = HEBertModel.from_pretrained(tmp_path)
        assert set(base.polynomial_layers()) == set(model.polynomial_layers())
        assert torch.equal(base(**inputs()).pooler_output, model.bert(**inputs()).pooler_output)

    def test_base_model_shares_the_mode(self):
        model = make()
        model.set_approximations(calibrated(model))
        model.set_mode("polynomial")
        assert all(layer.interval is not None for layer in model.polynomial_layers().values())
        assert model.bert.config.mode == "polynomial"


@pytest.mark.parametrize("model_class", [HEBertForSequenceClassification, HEBertForMaskedLM])
def test_trainer_with_gradient_accumulation_equals_one_large_batch(model_class, tmp_path):
    tokens = inputs()["input_ids"]
    labels = tokens if model_class is HEBertForMaskedLM else tokens[:, 0] % 2
    rows = [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]
    weights = []
    for accumulation in (1, 4):
        model = make(model_class, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def test_range_penalty_reaches_the_weights_through_checkpointed_layers():
    model = make().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with collect_ranges(model) as statistics:
        model(**inputs())
        assert set(statistics) == set(model.polynomial_layers())
        sum(value.square().mean() for value in statistics.values()).backward()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


def test_polynomial_fine_tuning_has_gradients():
    model = make()
    model.set_approximations(calibrated(model))
    model.set_mode("polynomial")
    model(**inputs(), labels=torch.zeros(8, dtype=torch.long)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("no_grad")
class TestClientSideInputs:
    def test_finished_embeddings_replace_the_tokens(self):
        model = make()
        embedding_output = model.bert.embeddings(inputs()["input_ids"])
        outputs = model(embedding_output=embedding_output, attention_mask=inputs()["attention_mask"])
        assert torch.equal(outputs.logits, model(**inputs()).logits)

    def test_pairwise_masks_pass_through(self):
        model = make()
        mask = inputs()["attention_mask"]
        pairwise = mask[:, None, None, :].expand(-1, 1, 9, -1).float()
        assert torch.equal(model(inputs()["input_ids"], attention_mask=pairwise).logits, model(**inputs()).logits)

    @pytest.mark.parametrize(
        "bad",
        [
            {},
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "embedding_output": torch.zeros(1, 3, 16)},
            {"input_ids": torch.ones(1, 21, dtype=torch.long)},
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 4)},
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, 3)},
        ],
        ids=["nothing", "two inputs", "too long", "mask length", "mask rank"],
    )
    def test_malformed_inputs(self, bad):
        with pytest.raises(ShapeError):
            make(HEBertModel)(**bad)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_kernel": "linear"},
        {"norm_position": "both"},
        {"position_embedding_type": "rotary"},
        {"mode": "encrypted"},
        {"hidden_act": "mish"},
        {"num_attention_heads": 3},
        {"power_softmax_degree": 3},
        {"power_softmax_eps": 0.0},
        {"hidden_size": "16"},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_config_rejects_wrong_fields(wrong):
    with pytest.raises((ValueError, StrictDataclassError)):
        HEBertConfig(**{**TINY.to_dict(), **wrong})
