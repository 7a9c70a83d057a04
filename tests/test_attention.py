"""gaussian_kernel and power_softmax against direct formulas, on stock models, and the refusals of check_attention."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_he.approximation import fit_reciprocal, kernel_exponential, power_polynomial
from hf_he.attention import (
    causal_keep_mask,
    check_attention,
    gaussian_kernel_attention,
    normalized_gaussian_kernel_attention,
    power_mean,
    power_softmax_attention,
    softmax_attention,
    stable_power_softmax,
)
from hf_he.errors import ApproximationError, RangeError, UnsupportedModelError
from hf_he.nn import RangeTracker

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 40}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CAUSAL = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED)),
}
BIDIRECTIONAL = {
    "bert": (BertForMaskedLM, BertConfig(**SIZES)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**SIZES)),
}
NAMES = ["gaussian_kernel", "normalized_gaussian_kernel", "power_softmax"]


def config(**fields):
    """A stand-in for a model's config with nothing but `fields`."""
    return SimpleNamespace(**fields)


def make(family, name=None):
    model_class, config = family
    torch.manual_seed(0)
    model = model_class(config).eval()
    if name:
        model.set_attn_implementation(name)
    return model


@pytest.fixture
def module():
    module = nn.Module().eval()
    module.is_causal = False
    return module


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, 6, 8, dtype=torch.float64, generator=generator) for _ in range(3))


@pytest.fixture
def padding():
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    return mask


class TestGaussianKernel:
    def test_equals_the_pairwise_formula(self, module, qkv, padding):
        query, key, value = qkv
        distance = (query[:, :, :, None, :] - key[:, :, None, :, :]).square().sum(-1)
        expected = torch.exp(-distance / (2 * 8**0.5)) * padding
        output, weights = gaussian_kernel_attention(module, query, key, value, padding)
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(output, torch.einsum("bhts,bhsp->bthp", expected, value))

    def test_mask_may_be_numbers(self, module, qkv, padding):
        assert torch.equal(gaussian_kernel_attention(module, *qkv, padding)[0], gaussian_kernel_attention(module, *qkv, padding.double())[0])

    def test_grouped_keys_and_values(self, module, qkv):
        query, key, value = qkv
        grouped = gaussian_kernel_attention(module, query, key[:, :2], value[:, :2], None)[0]
        repeated = gaussian_kernel_attention(module, query, key[:, [0, 0, 1, 1]], value[:, [0, 0, 1, 1]], None)[0]
        assert torch.equal(grouped, repeated)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("attention", [gaussian_kernel_attention, normalized_gaussian_kernel_attention])
    def test_long_vectors_of_16_bits_do_not_cancel(self, module, attention, dtype):
        generator = torch.Generator().manual_seed(0)
        query = 6 * torch.randn(1, 2, 10, 128, generator=generator)
        key = query + 0.2 * torch.randn(query.shape, generator=generator)
        query, key, mask = query.to(dtype), key.to(dtype), torch.ones(1, 1, 10, 10, dtype=torch.bool)
        expected = attention(module, query.float(), key.float(), key.float(), mask)[1]
        for amp in (False, True):
            with torch.autocast("cpu", dtype, enabled=amp):
                output, weights = attention(module, query, key, key, mask)
            assert output.dtype == weights.dtype == dtype and expected.max() > 0.5
            torch.testing.assert_close(weights.float(), expected, atol=2**-8, rtol=0)

    def test_polynomial_mode_has_the_certified_error(self, module, qkv):
        exact = gaussian_kernel_attention(module, *qkv, None)[1]
        module.kernel_approximation = kernel_exponential((-40.0, 0.0), 8)
        assert (gaussian_kernel_attention(module, *qkv, None)[1] - exact).abs().max() <= module.kernel_approximation.max_error

    def test_polynomial_mode_checks_masked_pairs_too(self, module, qkv, padding):
        query, key, value = (x.clone() for x in qkv)
        key[1, :, 5] = 100.0
        module.kernel_approximation = kernel_exponential((-40.0, 0.0), 8)
        with pytest.raises(RangeError, match="exponent"):
            gaussian_kernel_attention(module, query, key, value, padding)

    def test_identical_query_and_key_never_exceed_zero(self, module):
        query = 30 * torch.randn(1, 1, 16, 8)
        with RangeTracker(module) as tracker:
            gaussian_kernel_attention(module, query, query, query, None)
        assert tracker.ranges[""].maximum <= 0.0

    def test_overridable(self, module, qkv):
        class Taken(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return func, args[0], kwargs["scaling"]

        query, key, value = qkv
        result = gaussian_kernel_attention(module, query.as_subclass(Taken), key, value, None, scaling=0.5)
        assert result == (gaussian_kernel_attention, module, 0.5)


class TestPowerSoftmax:
    @pytest.mark.parametrize("power", [2, 4, 6, 8])
    @pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
    def test_stable_form_equals_the_raw_form(self, power, size):
        """Dividing by c = max|x| changes nothing if eps becomes eps / c^p; with eps left alone it would be another function."""
        scores = size * torch.randn(3, 5, 7, dtype=torch.float64)
        raw = scores**power / (1e-3 + (scores**power).sum(-1, keepdim=True))
        assert (stable_power_softmax(scores, power, 1e-3) - raw).abs().max() < 1e-6

    def test_stable_form_has_the_gradient_of_the_raw_form(self):
        scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 6, dtype=torch.float64)
        raw = scores**4 / (1e-2 + (scores**4).sum(-1, keepdim=True))
        expected = torch.autograd.grad((raw * weight).sum(), scores)[0]
        torch.testing.assert_close(torch.autograd.grad((stable_power_softmax(scores, 4, 1e-2) * weight).sum(), scores)[0], expected)

    def test_stable_form_survives_float32_extremes(self):
        scores = torch.tensor([[1e6, 1.0], [1e-9, 0.0], [0.0, 0.0]])
        weights = stable_power_softmax(scores, 8, 1e-3)
        torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))

    def test_length_agnostic_polynomial_form(self, module, qkv, padding):
        """(1/L) x^p / (eps + mean x^p) with L the row's valid keys; one reciprocal per row."""
        module.config = config(power_softmax_degree=4, power_softmax_eps=1e-2, power_softmax_length_agnostic=True)
        query, key, _ = qkv
        scores = query @ key.transpose(-1, -2) * 8**-0.5 * padding
        length = torch.tensor([6.0, 4.0])[:, None, None, None]
        expected = scores**4 / length / (1e-2 + (scores**4).sum(-1, keepdim=True) / length)
        torch.testing.assert_close(power_softmax_attention(module, *qkv, padding)[1], expected)
        module.kernel_approximation = fit_reciprocal((1e-3, 200.0), 31, 5)
        weights = power_softmax_attention(module, *qkv, padding)[1]
        assert (weights / expected.clamp(min=1e-30) - padding.double()).abs().max() <= module.kernel_approximation.max_error + 1e-9
        denominator = power_mean(scores, 4, 1e-2, length)
        with RangeTracker(module) as tracker:
            power_softmax_attention(module, *qkv, padding)
        assert tracker.ranges[""].statistic == "power_mean"
        assert tracker.ranges[""].maximum == pytest.approx(float(denominator.max()))

    @pytest.mark.parametrize("power", [2, 4, 6])
    def test_three_forms_agree_for_a_fixed_eps(self, module, qkv, power):
        """Raw, stable and length-agnostic on a causal mask with padding: eps on the sum is eps / L on the mean, L counted per row."""
        mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
        mask[1, :, :, 0] = False
        length = mask.sum(-1, keepdim=True).clamp(min=1).double()
        scores = 3 * (qkv[0] @ qkv[1].transpose(-1, -2)) * mask
        raw = scores**power / (1e-2 + (scores**power).sum(-1, keepdim=True))
        mean = power_mean(scores, power, 1e-2 / length, length)
        assert (stable_power_softmax(scores, power, 1e-2) - raw).abs().max() < 1e-6
        assert (scores**power / length / mean - raw).abs().max() < 1e-6
        module.config = config(power_softmax_degree=power, power_softmax_eps=1e-2)
        assert (power_softmax_attention(module, *qkv, mask, scaling=3.0)[1] - raw).abs().max() < 1e-6
        module.config = config(power_softmax_degree=power, power_softmax_eps=1e-2, power_softmax_length_agnostic=True)
        by_mean = scores**power / length / power_mean(scores, power, 1e-2, length)
        assert (power_softmax_attention(module, *qkv, mask, scaling=3.0)[1] - by_mean).abs().max() < 1e-6

    def test_rows_without_a_valid_key_are_zero(self, module, qkv):
        mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
        mask[:, :, :, :2] = False
        for length_agnostic in (False, True):
            module.config = config(power_softmax_length_agnostic=length_agnostic)
            weights = power_softmax_attention(module, *qkv, mask)[1]
            assert not weights[:, :, :2].any() and weights.isfinite().all()

    def test_denominator_bias_one(self, module, qkv, padding):
        """PolySketchFormer: x^p / (1 + sum x^p)."""
        module.config = config(power_softmax_eps=1.0)
        scores = qkv[0] @ qkv[1].transpose(-1, -2) * 8**-0.5 * padding
        expected = scores**4 / (1 + (scores**4).sum(-1, keepdim=True))
        torch.testing.assert_close(power_softmax_attention(module, *qkv, padding)[1], expected)

    @pytest.mark.parametrize("length_agnostic", [False, True])
    def test_constant_divisor(self, module, qkv, padding, length_agnostic):
        """Powerformer: (x + c)^p / constant. No division, the mask is still exact, and polynomial mode computes the same."""
        module.config = config(power_softmax_shift=2.0, power_softmax_divisor=50.0, power_softmax_length_agnostic=length_agnostic)
        scores = qkv[0] @ qkv[1].transpose(-1, -2) * 8**-0.5
        length = torch.tensor([6.0, 4.0])[:, None, None, None] if length_agnostic else 1.0
        expected = (scores + 2) ** 4 * padding / (50 * length)
        torch.testing.assert_close(power_softmax_attention(module, *qkv, padding)[1], expected.double())
        module.kernel_approximation = power_polynomial((-6.0, 10.0), 4)
        torch.testing.assert_close(power_softmax_attention(module, *qkv, padding)[1], expected.double())
        module.kernel_approximation = power_polynomial((-1.0, 1.0), 4)
        with pytest.raises(RangeError, match="score"):
            power_softmax_attention(module, *qkv, padding)

    def test_shift_before_the_division(self, module, qkv, padding):
        module.config = config(power_softmax_shift=1.5)
        powers = (qkv[0] @ qkv[1].transpose(-1, -2) * 8**-0.5 + 1.5) ** 4 * padding
        torch.testing.assert_close(power_softmax_attention(module, *qkv, padding)[1], powers / (1e-3 + powers.sum(-1, keepdim=True)))

    def test_a_power_is_its_own_polynomial(self):
        polynomial = power_polynomial((-3.0, 5.0), 6)
        x = torch.linspace(-3, 5, 50, dtype=torch.float64)
        assert (polynomial.degree, polynomial.depth, polynomial.max_error) == (6, 3, 0.0)
        torch.testing.assert_close(polynomial(x), x**6)


class TestNormalizedGaussianKernel:
    @pytest.mark.parametrize("length_agnostic", [False, True])
    def test_weights_over_eps_and_their_sum(self, module, qkv, padding, length_agnostic):
        module.config = config(power_softmax_eps=0.02, power_softmax_length_agnostic=length_agnostic)
        weights = gaussian_kernel_attention(module, *qkv, padding)[1]
        eps = 0.02 * torch.tensor([6.0, 4.0])[:, None, None, None] if length_agnostic else 0.02
        expected = weights / (eps + weights.sum(-1, keepdim=True))
        torch.testing.assert_close(normalized_gaussian_kernel_attention(module, *qkv, padding)[1], expected)

    def test_polynomial_mode_takes_the_reciprocal_of_the_mean(self, module, qkv, padding):
        module.config = config(power_softmax_eps=0.02, power_softmax_length_agnostic=True)
        exact = normalized_gaussian_kernel_attention(module, *qkv, padding)[1]
        module.kernel_approximation = kernel_exponential((-40.0, 0.0), 14)
        module.normalizer = nn.Module()
        module.normalizer.approximation = fit_reciprocal((0.02, 1.02), 15, 2)
        torch.testing.assert_close(normalized_gaussian_kernel_attention(module, *qkv, padding)[1], exact, atol=1e-3, rtol=0)
        module.normalizer.approximation = fit_reciprocal((0.9, 1.02), 7, 1)
        with pytest.raises(RangeError, match="kernel_mean"):
            normalized_gaussian_kernel_attention(module, *qkv, padding)

    @pytest.mark.parametrize("attention", [normalized_gaussian_kernel_attention, power_softmax_attention])
    def test_rows_before_a_left_padded_prompt_are_in_range(self, module, qkv, attention):
        """They may attend to nothing, so that their mean is eps, which real rows never have."""
        mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
        module.config = config(power_softmax_eps=1e-6, power_softmax_length_agnostic=True)
        module.normalizer = nn.Module()
        reciprocal = fit_reciprocal((1e-5, 80.0), 63, 6)
        if attention is power_softmax_attention:
            module.kernel_approximation = reciprocal
        else:
            module.normalizer.approximation = reciprocal
        mask[1, :, :, :2] = False
        weights = attention(module, *qkv, mask)[1]
        assert not weights[1, :, :2].any() and weights.isfinite().all() and weights[1, :, 2:].any()


class TestCausalKeepMask:
    def test_padding_and_cache(self):
        mask = causal_keep_mask(torch.empty(2, 3, 0), torch.tensor([[1, 1, 1], [0, 1, 1]]), None)
        assert mask.dtype == torch.bool and torch.equal(mask[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())
        assert mask[1, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]
        cache = DynamicCache()
        cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
        step = causal_keep_mask(torch.empty(2, 1, 0), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), cache)
        assert step[:, 0, 0].tolist() == [[True] * 4, [False, True, True, True]]

    def test_finished_masks_pass(self):
        finished = torch.ones(1, 1, 2, 2)
        assert causal_keep_mask(torch.empty(1, 2, 0), finished, None) is finished


def test_softmax_equals_torch(module, qkv, padding):
    expected = nn.functional.scaled_dot_product_attention(*qkv, attn_mask=padding).transpose(1, 2)
    torch.testing.assert_close(softmax_attention(module, *qkv, padding)[0], expected)


class TestRefusals:
    def test_additive_mask(self, module, qkv):
        with pytest.raises(UnsupportedModelError, match="additive mask"):
            gaussian_kernel_attention(module, *qkv, torch.full((2, 1, 6, 6), -1e4))

    def test_additive_mask_of_integers(self, module, qkv):
        with pytest.raises(UnsupportedModelError, match="additive mask"):
            gaussian_kernel_attention(module, *qkv, torch.tensor([0, -10_000]).repeat(1, 1, 1, qkv[1].shape[2] // 2))

    def test_additive_mask_that_keeps_everything(self, module, qkv):
        with pytest.raises(UnsupportedModelError, match="additive mask"):
            gaussian_kernel_attention(module, *qkv, torch.zeros(2, 1, 6, 6))

    def test_approximation_of_another_kernel(self, module, qkv):
        module.kernel_approximation = kernel_exponential((-40.0, 0.0), 6)
        with pytest.raises(ApproximationError, match="fitted to another attention than power softmax"):
            power_softmax_attention(module, *qkv, None)
        module.kernel_approximation = fit_reciprocal((0.01, 10.0), 15, 2)
        with pytest.raises(ApproximationError, match="fitted to another attention than a Gaussian kernel"):
            gaussian_kernel_attention(module, *qkv, None)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_polynomials_in_16_bits(self, module, qkv, dtype):
        module.kernel_approximation = kernel_exponential((-40.0, 0.0), 6)
        with pytest.raises(ApproximationError, match=f"polynomial mode needs float32 or float64, got {dtype}"):
            gaussian_kernel_attention(module, *(part.to(dtype) for part in qkv), None)

    def test_causal_module_without_mask(self, module, qkv):
        module.is_causal = True
        with pytest.raises(UnsupportedModelError, match="no mask arrived"):
            gaussian_kernel_attention(module, *qkv, None)

    @pytest.mark.parametrize("argument", ["s_aux", "position_bias", "softcap"])
    def test_softmax_only_arguments(self, module, qkv, argument):
        with pytest.raises(UnsupportedModelError, match=argument):
            power_softmax_attention(module, *qkv, None, **{argument: torch.zeros(4)})


@pytest.mark.parametrize("name", NAMES)
class TestStockModels:
    @pytest.mark.parametrize("family", CAUSAL.values(), ids=CAUSAL.keys())
    def test_causal_models_do_not_leak(self, family, name):
        model = make(family).train()
        check = check_attention(model, name)
        assert check.calls == 2 and check.causal and check.future_leak == 0.0
        assert model.training and model.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("family", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL.keys())
    def test_bidirectional_models(self, family, name):
        check = check_attention(make(family), name)
        assert check.calls == 2 and not check.causal

    @pytest.mark.parametrize("family", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL.keys())
    def test_padding_changes_nothing(self, family, name):
        model = make(family, name)
        tokens = torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(0))
        padded = torch.cat([tokens, torch.ones(1, 3, dtype=torch.long)], 1)
        mask = torch.tensor([[1] * 7 + [0] * 3])
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :7], model(tokens, attention_mask=mask[:, :7]).logits)

    @pytest.mark.parametrize("family", CAUSAL.values(), ids=CAUSAL.keys())
    def test_cached_generation_equals_recomputation(self, family, name):
        model = make(family, name)
        tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached, recomputed = (model.generate(tokens, use_cache=use_cache, **settings) for use_cache in (True, False))
        assert torch.equal(cached, recomputed)

    @pytest.mark.parametrize("family", [*CAUSAL.values(), *BIDIRECTIONAL.values()], ids=[*CAUSAL, *BIDIRECTIONAL])
    def test_gradients_reach_every_parameter_of_the_attention(self, family, name):
        model = make(family, name)
        tokens = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
        model(tokens, labels=tokens).loss.backward()
        missing = [n for n, p in model.named_parameters() if ("attn" in n or "attention" in n) and p.grad is None]
        assert not missing

    def test_bloom_is_refused_for_ignoring_the_name(self, name):
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4))
        with pytest.raises(UnsupportedModelError, match="BloomForCausalLM ignores"):
            check_attention(model, name)
        assert model.config._attn_implementation == "eager"


def test_a_lost_causal_mask_is_noticed(monkeypatch):
    """A model whose mask function drops the mask would attend to the future; the attention function refuses to run."""
    from hf_he._compat import AttentionMaskInterface

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "gaussian_kernel", lambda *args, **kwargs: None)
    with pytest.raises(UnsupportedModelError, match="no mask arrived"):
        check_attention(make(CAUSAL["llama"]), "gaussian_kernel")


def test_a_full_mask_leaks_and_is_refused(monkeypatch):
    from hf_he._compat import AttentionMaskInterface

    def full(batch_size, q_length, kv_length, **kwargs):
        return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "gaussian_kernel", full)
    with pytest.raises(UnsupportedModelError, match="leaks future tokens"):
        check_attention(make(CAUSAL["llama"]), "gaussian_kernel")


def test_unknown_name():
    with pytest.raises(UnsupportedModelError, match="known: gaussian_kernel, normalized_gaussian_kernel, power_softmax"):
        check_attention(make(BIDIRECTIONAL["bert"]), "sigmoid")


def test_the_name_is_not_saved(tmp_path):
    """transformers drops attn_implementation on save, which is why HE models carry attention_kernel in their own config."""
    make(BIDIRECTIONAL["bert"], "gaussian_kernel").save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation != "gaussian_kernel"
