"""What a decoder must do in polynomial mode. Mix `DecoderPolynomialMode` into a test class and set `model_class` and `config`."""

import pytest
import torch
from decoders import calibrated, scaled, tokens
from transformers import PreTrainedConfig, PreTrainedModel

from hf_he.errors import ApproximationError, RangeError
from hf_he.nn import PolynomialActivation, RangeTracker

KERNELS = {
    "gaussian": {"attention_kernel": "gaussian_kernel"},
    "power": {"attention_kernel": "power_softmax", "power_softmax_eps": 0.1},
    "power-mean": {"attention_kernel": "power_softmax", "power_softmax_eps": 0.1, "power_softmax_length_agnostic": True, "power_softmax_degree": 6},
    "power-divisor": {"attention_kernel": "power_softmax", "power_softmax_shift": 1.0, "power_softmax_divisor": 20.0},
}


class DecoderPolynomialMode:
    model_class: type[PreTrainedModel]
    classifier: type[PreTrainedModel]
    config: PreTrainedConfig

    def make(self, model_class=None, **overrides):
        torch.manual_seed(0)
        return scaled((model_class or self.model_class)(type(self.config)(**{**self.config.to_dict(), **overrides})))

    @pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
    @torch.no_grad()
    def test_agrees_with_exact_mode_and_survives_saving(self, kernel, tmp_path):
        model = self.make(**kernel)
        exact = model(tokens()).logits
        model.set_approximations(calibrated(model, tokens()))
        model.set_mode("polynomial")
        polynomial = model(tokens()).logits
        assert 0 < (polynomial - exact).abs().max() < 2e-2 * exact.abs().max()
        model.save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path)
        assert (loaded.config.mode, loaded.config.attention_kernel) == ("polynomial", kernel["attention_kernel"])
        assert torch.equal(loaded(tokens()).logits, polynomial)
        loaded.set_mode("exact")
        assert torch.equal(loaded(tokens()).logits, exact)

    @pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
    def test_cached_generation_equals_recomputation(self, kernel):
        model = self.make(**kernel)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        exact = model.generate(tokens(length=5), **settings)
        model.set_approximations(calibrated(model, exact))
        model.set_mode("polynomial")
        cached, recomputed = (model.generate(tokens(length=5), use_cache=use_cache, **settings) for use_cache in (True, False))
        assert torch.equal(cached, recomputed) and torch.equal(cached, exact)

    def test_every_nonpolynomial_function_is_a_named_layer(self):
        model = self.make()
        with RangeTracker(model) as tracker, torch.no_grad():
            model(tokens())
        assert set(tracker.ranges) == set(model.polynomial_layers())
        assert len(tracker.ranges) == 4 * self.config.num_hidden_layers + 1

    def test_needs_calibration(self):
        with pytest.raises(ApproximationError, match=r"9 layers have no entry.*Run calibration"):
            self.make().set_mode("polynomial")

    @pytest.mark.parametrize("wrong", [{"interval": [-1.0, 1.0]}, {"interval": [1.0]}, {"interval": []}, {"interval": "ab"}, {"interval": 1.0}])
    def test_a_wrong_entry_of_the_last_layer_changes_nothing(self, wrong):
        model = self.make()
        entries = calibrated(model, tokens())
        model.set_approximations(entries)
        exact, last = model(tokens()).logits, list(entries)[-1]
        changed = entries | {last: entries[last] | wrong}
        model.config.approximations = changed
        with pytest.raises(ApproximationError):
            model.set_mode("polynomial")
        assert model.config.mode == "exact" and torch.equal(model(tokens()).logits, exact)
        model.set_approximations(entries)
        model.set_mode("polynomial")
        polynomial = model(tokens()).logits
        with pytest.raises(ApproximationError):
            model.set_approximations(changed)
        assert model.config.approximations == entries and torch.equal(model(tokens()).logits, polynomial)

    def test_softmax_has_no_polynomial_form(self):
        with pytest.raises(ApproximationError, match="softmax attention has no polynomial form"):
            self.make(attention_kernel="softmax").set_mode("polynomial")

    def test_values_out_of_range_name_the_layer(self):
        model = self.make()
        entries = calibrated(model, tokens())
        name = next(n for n, layer in model.polynomial_layers().items() if isinstance(layer, PolynomialActivation))
        entries[name]["interval"] = [-0.01, 0.01]
        model.set_approximations(entries)
        model.set_mode("polynomial")
        with pytest.raises(RangeError, match=f"{name}: input"):
            model(tokens())

    def test_gradients_in_polynomial_mode(self):
        model = self.make()
        model.set_approximations(calibrated(model, tokens()))
        model.set_mode("polynomial")
        model(tokens(), labels=tokens()).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_classifier_and_base_share_names_and_mode(self):
        model = self.make()
        entries = calibrated(model, tokens())
        classifier = self.make(self.classifier, mode="polynomial", approximations=entries)
        assert set(classifier.polynomial_layers()) == set(classifier.base_model.polynomial_layers()) == set(entries)
        classifier.set_mode("exact")
        assert classifier.base_model.config.mode == "exact"
