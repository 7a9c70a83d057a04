"""Generation on the simulator through transformers' `generate`: the same tokens as the plaintext polynomial model, whatever picks them."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_decoder import WORDS, save_tiny_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, StoppingCriteria, pipeline
from transformers.generation.streamers import BaseStreamer

from hf_he import GenerationClient, GenerationServer, encrypted_generate
from hf_he.errors import GenerationError, MissingKeyError, ModelMismatchError, ParameterError, RangeError, ShapeError, WrongKeyError
from hf_he.generation.adapter import EncryptedLora
from hf_he.generation.messages import EncryptedPrompt
from hf_he.generation.model import load_decoder
from hf_he.generation.plan import plan_generation
from hf_he.peft import HELoraConfig

PROMPT = "the old sea ship"


class Rig:
    """A saved tiny decoder with its client and server."""

    def __init__(self, directory, kernel="gaussian", context=16, max_tokens=None, adapter=None, **options):
        self.directory = save_tiny_decoder(directory, kernel=kernel, **options)
        self.model = AutoModelForCausalLM.from_pretrained(self.directory)
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory, padding_side="left")
        limits = {"context": context, "max_tokens": max_tokens, "adapter": adapter}
        self.client = GenerationClient.from_pretrained(self.directory, backend="simulator", **limits)
        self.keys = self.client.keygen()
        self.client.server = GenerationServer(self.directory, self.keys.evaluation, **limits)

    def generate(self, texts=PROMPT, model=None, encrypted=True, new=4, **options):
        model = model or self.model
        inputs = self.tokenizer(texts, return_tensors="pt", padding=not isinstance(texts, str))
        custom = {"custom_generate": encrypted_generate, "client": self.client} if encrypted else {}
        return model.generate(**inputs, **{"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options, **custom})

    def check(self, texts=PROMPT, model=None, **options):
        plain, encrypted = (self.generate(texts, model, encrypted=encrypted, **options) for encrypted in (False, True))
        assert plain.tolist() == encrypted.tolist()
        assert self.client.last.max_logit_error < 1e-3
        return encrypted


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    return Rig(tmp_path_factory.mktemp("decoder"))


class TestTokens:
    def test_greedy(self, rig):
        rig.check(new=6)

    @pytest.mark.parametrize("kernel", ["power", "divisor", "normalized"])
    def test_divided_weights(self, tmp_path, kernel):
        Rig(tmp_path, kernel).check()

    @pytest.mark.parametrize("kernel", ["gaussian", "power"])
    def test_grouped_heads_rms_norm_and_full_rotary(self, tmp_path, kernel):
        rig = Rig(tmp_path, kernel, architecture="llama", num_hidden_layers=2, seed=2)
        tokens = rig.check(["the old sea ship", "wind"], new=3)
        assert len({tuple(row) for row in tokens[:, -3:].tolist()}) == 2

    def test_two_layers_one_after_the_other(self, tmp_path):
        Rig(tmp_path, num_hidden_layers=2, use_parallel_residual=False).check(new=3)

    def test_several_prompts_of_different_lengths(self, rig):
        rig.check(["the old sea ship", "a dark night", "wind"])

    def test_more_tokens_than_lanes(self, tmp_path):
        rig = Rig(tmp_path, context=4, max_tokens=10)
        tokens = rig.check(["the old sea ship", "a dark night"], new=7)
        assert tokens.shape[1] - 1 == rig.client.max_tokens
        assert [len(layer.keys) for layer in rig.client.server._generations[rig.client.last.name].cache.layers] == [3]

    def test_sampling_with_temperature_top_k_and_top_p(self, rig):
        drawn = []
        for encrypted in (False, True):
            torch.manual_seed(3)
            drawn.append(rig.generate(encrypted=encrypted, do_sample=True, temperature=1.7, top_k=12, top_p=0.95, new=6).tolist())
        assert drawn[0] == drawn[1] != rig.generate(encrypted=False, new=6).tolist()

    def test_several_returned_sequences_are_as_many_prompts(self, rig):
        drawn = []
        for encrypted in (False, True):
            torch.manual_seed(3)
            drawn.append(rig.generate(encrypted=encrypted, do_sample=True, temperature=1.7, num_return_sequences=3).tolist())
        assert drawn[0] == drawn[1] and len({tuple(row) for row in drawn[0]}) > 1

    def test_logits_processors_and_stopping_criteria(self, rig):
        class Forbid(LogitsProcessor):
            def __call__(self, input_ids, scores):
                scores[:, 6] = -float("inf")
                return scores

        class Stop(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] >= 7)

        tokens = rig.check(new=8, logits_processor=[Forbid()], stopping_criteria=[Stop()], repetition_penalty=1.3)
        assert tokens.shape[1] == 7 and 6 not in tokens[0, 4:]

    def test_finished_sequences_are_padded(self, rig):
        first = rig.generate(["the old sea ship", "cold day"], encrypted=False, new=1)[:, -1]
        assert first[0] != first[1]
        tokens = rig.check(["the old sea ship", "cold day"], eos_token_id=int(first[0]), new=3)
        assert tokens[0, -2:].tolist() == [int(first[0]), 0]

    def test_padding_of_finished_sequences_is_not_sent(self, tmp_path):
        """Its embedding may leave the fitted ranges: training never saw it."""
        rig = Rig(tmp_path)
        for model in (rig.model, rig.client.model):
            model.get_input_embeddings().weight.data[1] *= 40
        prompts = ["the a", "the old"]
        first = rig.generate(prompts, encrypted=False, new=1)[:, -1]
        options = {"eos_token_id": int(first[0]), "pad_token_id": 1, "new": 4}
        tokens, alone = rig.generate(prompts, **options), rig.generate(prompts[1], encrypted=False, **options)
        assert tokens[0, -3:].tolist() == [1, 1, 1] and tokens[1].tolist() == alone[0].tolist()
        with pytest.raises(RangeError):
            rig.client.begin([[1, 1]])

    def test_scores_and_logits_on_request(self, rig):
        plain, encrypted = (
            rig.generate(encrypted=encrypted, return_dict_in_generate=True, output_scores=True, output_logits=True) for encrypted in (False, True)
        )
        assert torch.equal(plain.sequences, encrypted.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(getattr(plain, name)), torch.stack(getattr(encrypted, name)), atol=1e-3, rtol=0)

    def test_streaming(self, rig):
        class Collect(BaseStreamer):
            def __init__(self):
                self.seen, self.ended = [], False

            def put(self, value):
                self.seen += value.reshape(-1).tolist()

            def end(self):
                self.ended = True

        streamer = Collect()
        tokens = rig.generate(token_streamer=streamer)
        assert streamer.ended and streamer.seen == tokens[0].tolist()

    def test_pipeline(self, rig):
        generator = pipeline("text-generation", model=rig.model, tokenizer=rig.tokenizer)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        plain = generator(PROMPT, **options)
        assert generator(PROMPT, custom_generate=encrypted_generate, client=rig.client, **options) == plain


def test_plain_adapters_are_merged(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_tiny_decoder(tmp_path / "model"))
    torch.manual_seed(1)
    tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    rig = Rig(tmp_path / "model", adapter=tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(rig.model, tmp_path / "adapter").eval()
    before = GenerationClient.from_pretrained(rig.directory, backend="simulator", context=16)
    assert before.model_fingerprint != rig.client.model_fingerprint
    rig.check(model=adapted)
    with pytest.raises(ModelMismatchError):
        before.use_keys(rig.keys)
        before.begin([[2, 3]], rig.client.server)


class TestRefusals:
    def test_beams(self, rig):
        with pytest.raises(ParameterError, match="beam"):
            rig.generate(num_beams=2)

    def test_another_model(self, rig):
        other = AutoModelForCausalLM.from_config(type(rig.model.config)(**{**rig.model.config.to_dict(), "vocab_size": 99, "mode": "exact"}))
        with pytest.raises(ModelMismatchError, match="another model"):
            rig.generate(model=other)

    def test_prompts_that_do_not_fit(self, rig):
        with pytest.raises(ShapeError, match="1 to 16 tokens"):
            rig.client.begin([[1] * 17])
        with pytest.raises(ShapeError, match="sequence lanes"):
            rig.client.begin([[1]] * (rig.client.packing.sequences + 1))

    def test_prompts_longer_than_the_cache(self, tmp_path):
        rig = Rig(tmp_path, max_tokens=4)
        message = EncryptedPrompt(rig.client.identity, (5,) * rig.client.packing.sequences, 1, b"")
        with pytest.raises(ShapeError, match="1 to 4 tokens"):
            rig.client.begin([[2] * 5])
        with pytest.raises(ModelMismatchError, match="up to 4"):
            rig.client.server.open(message.to_bytes())

    def test_heads_wider_than_the_hidden_states(self, tmp_path):
        with pytest.raises(ShapeError, match="2 heads have 32 features, the states 16"):
            Rig(tmp_path, architecture="llama", num_attention_heads=2, head_dim=16)

    def test_a_full_cache(self, rig):
        generation = rig.client.begin([[2] * 16])
        with pytest.raises(GenerationError, match="fill the cache"):
            generation.step([3])

    def test_more_new_tokens_than_the_cache_holds_are_refused_before_anything_is_encrypted(self, rig, monkeypatch):
        monkeypatch.setattr(rig.client, "_encrypted", None)
        with pytest.raises(GenerationError, match="use max_new_tokens=13 at most, or max_tokens=17"):
            rig.generate(new=14)
        with pytest.raises(GenerationError, match="14 new tokens after a prompt of 4"):
            rig.generate(["the old sea ship", "wind"], new=14)

    def test_values_out_of_range_are_refused_before_anything_is_sent(self, tmp_path):
        rig = Rig(tmp_path)
        entries = {name: dict(entry) for name, entry in rig.client.model.config.approximations.items()}
        entries["gpt_neox.layers.0.mlp.act"]["interval"] = [-0.01, 0.01]
        rig.client.model.set_approximations(entries)
        rig.client.server = None
        with pytest.raises(RangeError, match=r"layers\.0\.mlp\.act"):
            rig.client.begin([[2, 3]], server=GenerationServer.__new__(GenerationServer))

    def test_no_server(self, tmp_path):
        rig = Rig(tmp_path)
        rig.client.server = None
        with pytest.raises(ParameterError, match="no server"):
            rig.client.begin([[2, 3]])


def test_cost_per_token_hardly_grows_with_the_context(rig):
    parameters, packing = rig.client.backend.parameters, type(rig.client.packing)
    plans = [plan_generation(rig.model, parameters, packing.fit(parameters.slots, 16, tokens)) for tokens in (16, 32, 64)]
    counts = [plan.tokens[0].operations for plan in plans]
    assert np.diff([count["rotate"] for count in counts]).tolist() == [1, 1]
    assert len({count["multiply"] for count in counts}) == len({len(plan.tokens[0].refreshes) for plan in plans}) == 1
    assert len(WORDS) == rig.model.config.vocab_size


def test_an_encrypted_adapter_without_its_rotations_can_be_asked_for_again(tmp_path):
    rig = Rig(tmp_path / "model")
    get_peft_model(rig.model, LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)).save_pretrained(tmp_path / "plain")
    rig.client.encrypt_adapter(tmp_path / "plain", tmp_path / "encrypted")
    client = GenerationClient(rig.directory, rig.client.backend, rig.keys, context=16, adapter=tmp_path / "encrypted")
    client.server = GenerationServer(rig.directory, rig.keys.evaluation, context=16, adapter=tmp_path / "encrypted")
    for _ in range(2):
        with pytest.raises(MissingKeyError, match="rotation"):
            client.begin([[2, 4]])
    other = Rig(tmp_path / "other", seed=1)
    with pytest.raises(WrongKeyError, match="encrypted adapter"):
        GenerationClient(rig.directory, rig.client.backend, other.keys, context=16, adapter=tmp_path / "encrypted")
    with pytest.raises(ModelMismatchError, match="encrypted adapter"):
        GenerationClient(other.directory, rig.client.backend, rig.keys, context=16, adapter=tmp_path / "encrypted")


def test_an_adapter_that_stays_encrypted(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_tiny_decoder(tmp_path / "model"))
    torch.manual_seed(1)
    tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value", "dense"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    tuned.save_pretrained(tmp_path / "adapter")
    client = GenerationClient.from_pretrained(tmp_path / "model", backend="simulator", context=8)
    keys = client.keygen(lora=HELoraConfig(r=2, target_modules=["query_key_value", "dense"]))
    client.encrypt_adapter(tmp_path / "adapter", tmp_path / "encrypted")
    server = GenerationServer(tmp_path / "model", keys.evaluation, context=8, adapter=tmp_path / "encrypted")
    with_adapter = GenerationClient.from_pretrained(tmp_path / "model", keys=keys, context=8, adapter=tmp_path / "encrypted", server=server)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter").eval()
    prompt = torch.tensor([[2, 4, 5, 6]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = plain.generate(input_ids=prompt, **options, custom_generate=encrypted_generate, client=with_adapter)
    assert tokens.tolist() == plain.generate(input_ids=prompt, **options).tolist()
    inside = [parameter for name, parameter in server.decoder.model.named_parameters() if "lora_" in name]
    assert not inside and any("lora_" in name for name, _ in server.decoder.model.named_modules())
    assert with_adapter.last.max_logit_error < 1e-4
    without = client.model(tokens[:, :-1]).logits[0, -1]
    assert np.abs(with_adapter.last.logits[0] - without.detach().numpy()).max() > 0.01
    with pytest.raises(ParameterError, match="encrypted adapter"):
        with_adapter.begin([[2, 4]], select="server")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    client = GenerationClient.from_pretrained(save_tiny_decoder(tmp_path_factory.mktemp("decoder")), backend="simulator", context=8)
    client.keygen()
    return client


class TestAdaptersToEncrypt:
    """Plain PEFT adapters of other makes: encrypted as PEFT merges them, or refused."""

    @pytest.fixture
    def encrypted(self, client, tmp_path):
        def encrypt(**options):
            torch.manual_seed(1)
            config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query_key_value", "dense"], "init_lora_weights": False, **options})
            get_peft_model(AutoModelForCausalLM.from_pretrained(client.directory), config).save_pretrained(tmp_path / "adapter")
            client.encrypt_adapter(tmp_path / "adapter", tmp_path / "encrypted")
            return EncryptedLora.load(tmp_path / "encrypted")

        return encrypt

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"dense": 2.0}}], ids=str)
    def test_the_scaling_of_every_layer_is_pefts(self, client, encrypted, tmp_path, options):
        found = encrypted(**options).decrypt(load_decoder(client.directory).double(), client.packing, client.backend, client.keys)
        merged, tokens = load_decoder(client.directory, tmp_path / "adapter").double(), torch.tensor([[2, 4, 5, 6]])
        for model in (found, merged):
            model.set_mode("exact")  # random adapters leave the fitted ranges
        torch.testing.assert_close(found(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        "options",
        [
            {"use_dora": True},
            {"rank_pattern": {"dense": 2}},
            {"modules_to_save": ["dense_4h_to_h"]},
            {"bias": "all"},
            {"lora_bias": True},
            {"init_lora_weights": "pissa"},
            {"target_modules": ".*query_key_value"},
        ],
        ids=str,
    )
    def test_more_than_two_matrices_is_refused_by_name(self, encrypted, options):
        with pytest.raises(ParameterError, match=f"{next(iter(options))}.* has no encrypted form.*merge it"):
            encrypted(**options)

    @pytest.mark.parametrize("options", [{"exclude_modules": ["dense"]}, {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}], ids=str)
    def test_what_a_fresh_adapter_cannot_hold_is_refused(self, encrypted, options):
        with pytest.raises(ParameterError, match="in every module of these names and nowhere else"):
            encrypted(**options)
