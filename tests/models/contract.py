"""What every HE model must do in transformers. Mix `ModelContract`, or `CausalContract` for a decoder, into a test class and set `family`.

transformers' own ModelTesterMixin is not in its wheel; these tests borrow its ideas.
"""

from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """One architecture: a tiny config and the classes built from it, base model first. `auto_classes` has their Auto counterparts;
    `no_dropout` are the config fields that switch dropout off."""

    config: PreTrainedConfig
    base: type[PreTrainedModel]
    language_model: type[PreTrainedModel]
    classifier: type[PreTrainedModel]
    auto_classes: dict[str, Any] = field(default_factory=dict)
    default_lora_targets: frozenset[str] = frozenset({"query", "value"})
    no_dropout: dict[str, float] = field(default_factory=lambda: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})

    @property
    def classes(self) -> tuple[type[PreTrainedModel], ...]:
        return self.base, self.language_model, self.classifier


class ModelContract:
    family: Family

    def make(self, model_class, **overrides):
        torch.manual_seed(0)
        return model_class(type(self.family.config)(**{**self.family.config.to_dict(), **overrides})).eval()

    def inputs(self, batch=3, length=7):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(5, self.family.config.vocab_size, (batch, length), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def labels(self, model_class):
        return self.inputs()["input_ids"] if model_class is self.family.language_model else torch.tensor([0, 1, 0])

    @staticmethod
    def first(outputs):
        return outputs.logits if "logits" in outputs else outputs.last_hidden_state

    def test_training_reaches_every_parameter(self):
        for model_class in (self.family.language_model, self.family.classifier):
            model = self.make(model_class).train()
            outputs = model(**self.inputs(), labels=self.labels(model_class))
            outputs.loss.backward()
            without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            assert not without, f"{model_class.__name__}: {without}"

    def test_loss_falls_in_a_few_steps(self):
        model = self.make(self.family.classifier, **self.family.no_dropout).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(**self.inputs(), labels=self.labels(self.family.classifier)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0]

    def test_save_and_load_give_equal_outputs(self, tmp_path):
        for model_class in self.family.classes:
            model = self.make(model_class)
            model.save_pretrained(tmp_path)
            loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"]
            assert torch.equal(self.first(loaded(**self.inputs())), self.first(model(**self.inputs())))

    def test_base_model_loads_from_a_head_and_back(self, tmp_path):
        head = self.make(self.family.language_model)
        head.save_pretrained(tmp_path / "head")
        base = self.family.base.from_pretrained(tmp_path / "head")
        torch.testing.assert_close(base(**self.inputs())[0], head.base_model(**self.inputs())[0])
        base.save_pretrained(tmp_path / "base")
        again = self.family.language_model.from_pretrained(tmp_path / "base")
        torch.testing.assert_close(again.base_model(**self.inputs())[0], head.base_model(**self.inputs())[0])

    def test_output_embeddings_are_tied(self, tmp_path):
        model = self.make(self.family.language_model)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = self.family.language_model.from_pretrained(tmp_path)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        untied = self.make(self.family.language_model, tie_word_embeddings=False)
        assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight

    def test_hidden_states_and_attentions(self):
        config = self.family.config
        for model_class in self.family.classes:
            model = self.make(model_class)
            plain = self.first(model(**self.inputs()))
            outputs = model(**self.inputs(), output_hidden_states=True, output_attentions=True)
            assert torch.equal(self.first(outputs), plain)
            assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, 7, config.hidden_size)] * (config.num_hidden_layers + 1)
            assert [tuple(a.shape) for a in outputs.attentions] == [(3, config.num_attention_heads, 7, 7)] * config.num_hidden_layers
        model = self.make(self.family.base)
        model.config.output_attentions = True
        assert len(model(**self.inputs()).attentions) == config.num_hidden_layers

    def test_tuples_when_asked(self):
        for model_class in self.family.classes:
            model = self.make(model_class)
            assert torch.equal(model(**self.inputs(), return_dict=False)[0], self.first(model(**self.inputs())))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_gives_equal_gradients(self, use_reentrant):
        gradients = []
        for checkpointing in (False, True):
            model = self.make(self.family.classifier, **self.family.no_dropout).train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model(**self.inputs(), labels=self.labels(self.family.classifier)).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)

    def test_padding_changes_nothing(self):
        inputs = self.inputs(batch=1)
        padded = {
            "input_ids": torch.cat([inputs["input_ids"], torch.zeros(1, 4, dtype=torch.long)], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(1, 4, dtype=torch.long)], 1),
        }
        model = self.make(self.family.base)
        torch.testing.assert_close(model(**padded)[0][:, :7], model(**inputs)[0])
        model = self.make(self.family.classifier)
        torch.testing.assert_close(model(**padded).logits, model(**inputs).logits)

    def test_resize_token_embeddings(self):
        model = self.make(self.family.language_model)
        before = model(**self.inputs()).logits
        size = self.family.config.vocab_size
        model.resize_token_embeddings(size + 5)
        assert model.config.vocab_size == size + 5
        after = model(**self.inputs()).logits
        assert after.shape[-1] == size + 5
        torch.testing.assert_close(after[..., :size], before)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_inputs_embeds(self):
        model = self.make(self.family.classifier)
        inputs = self.inputs()
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, model(**inputs).logits)

    def test_bfloat16(self):
        model = self.make(self.family.classifier).to(torch.bfloat16)
        assert model(**self.inputs()).logits.dtype == torch.bfloat16

    def test_lora_round_trip_with_default_targets(self, tmp_path):
        model = self.make(self.family.classifier)
        model.save_pretrained(tmp_path / "base")
        plain = model(**self.inputs()).logits
        lora = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)).eval()
        assert set(lora.peft_config["default"].target_modules) == self.family.default_lora_targets
        tuned = lora(**self.inputs()).logits
        assert not torch.allclose(tuned, plain)
        lora.save_pretrained(tmp_path / "adapter")
        base = self.family.classifier.from_pretrained(tmp_path / "base")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**self.inputs()).logits, tuned)
        torch.testing.assert_close(loaded.merge_and_unload()(**self.inputs()).logits, tuned)

    def test_auto_classes(self, tmp_path):
        for auto_class, model_class in self.family.auto_classes.items():
            model = self.make(model_class)
            assert type(auto_class.from_config(self.family.config)) is model_class
            model.save_pretrained(tmp_path / auto_class.__name__)
            loaded = auto_class.from_pretrained(tmp_path / auto_class.__name__)
            assert type(loaded) is model_class
            assert torch.equal(self.first(loaded(**self.inputs())), self.first(model(**self.inputs())))

    def test_config_round_trip(self, tmp_path):
        self.family.config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(self.family.config)
        assert {**loaded.to_dict(), "_name_or_path": ""} == self.family.config.to_dict()

    def test_softmax_implementations_are_refused(self):
        with pytest.raises((ValueError, ImportError)):
            AutoModel.from_config(self.family.config, attn_implementation="sdpa")

    def test_base_model_compiles_without_graph_breaks(self):
        torch.compiler.reset()
        model = self.make(self.family.base)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**self.inputs())[0], model(**self.inputs())[0])


class CausalContract(ModelContract):
    """A decoder: nothing leaks from the future, caches change nothing, padding on the left changes nothing."""

    def prompt(self, batch=2, length=6):
        """Tokens and mask, the first row with two padding tokens on the left."""
        inputs = self.inputs(batch, length)
        inputs["input_ids"][0, :2] = 0
        inputs["attention_mask"][0, :2] = 0
        return inputs

    def sharp(self, **overrides):
        """A language model whose weights are large enough that its tokens depend on the prompt."""
        model = self.make(self.family.language_model, **overrides)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        return model

    def generate(self, model, **kwargs):
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(**self.prompt(), **{**settings, **kwargs})

    def test_future_tokens_change_nothing(self):
        model = self.sharp()
        tokens = self.inputs()["input_ids"]
        changed = tokens.clone()
        changed[:, 4:] = (tokens[:, 4:] + 1) % self.family.config.vocab_size
        before, after = model(tokens).logits, model(changed).logits
        torch.testing.assert_close(after[:, :4], before[:, :4])
        assert not torch.allclose(after[:, 4:], before[:, 4:])

    def test_cached_generation_equals_recomputation(self):
        model = self.sharp()
        cached, recomputed = self.generate(model, use_cache=True), self.generate(model, use_cache=False)
        assert torch.equal(cached, recomputed)
        assert len({tuple(row) for row in cached[:, 6:].tolist()}) == 2

    def test_static_cache_generates_the_same(self):
        model = self.sharp()
        assert torch.equal(self.generate(model, cache_implementation="static", disable_compile=True), self.generate(model))

    def test_beams_and_samples_use_the_cache_right(self):
        model = self.sharp()
        for settings in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}):
            tokens = []
            for use_cache in (True, False):
                torch.manual_seed(0)
                tokens.append(self.generate(model, use_cache=use_cache, **settings))
            assert torch.equal(*tokens)

    def test_cached_steps_give_the_logits_of_one_pass(self):
        model = self.sharp()
        inputs = self.prompt()
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        whole = model(**inputs, position_ids=position_ids).logits
        cache, pieces = None, []
        for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
            outputs = model(
                inputs["input_ids"][:, part],
                attention_mask=inputs["attention_mask"][:, : part.stop],
                position_ids=position_ids[:, part],
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            pieces.append(outputs.logits)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == 6

    def test_left_padding_changes_nothing(self):
        model = self.sharp()
        inputs = self.prompt()
        padded = self.generate(model)[0, 6:]
        alone = model.generate(inputs["input_ids"][:1, 2:], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 4:]
        assert torch.equal(padded, alone)

    def test_last_logits_only(self):
        model = self.make(self.family.language_model)
        torch.testing.assert_close(model(**self.inputs(), logits_to_keep=2).logits, model(**self.inputs()).logits[:, -2:])

    def test_loss_is_of_the_next_token(self):
        model = self.make(self.family.language_model)
        tokens = self.inputs()["input_ids"]
        expected = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)

    def test_generation_with_lora(self):
        model = self.sharp()
        lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
        assert torch.equal(self.generate(lora, use_cache=True), self.generate(lora, use_cache=False))

    def test_kernel_and_generation_survive_saving(self, tmp_path):
        model = self.sharp()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.attention_kernel == self.family.config.attention_kernel
        assert loaded.config.auto_map["AutoModelForCausalLM"] == f"modeling_hf_he.{type(model).__name__}"
        assert torch.equal(self.generate(loaded), self.generate(model))
