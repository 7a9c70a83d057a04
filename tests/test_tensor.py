"""EncryptedTensor through the unmodified model: same logits, same rotations as promised, and nothing unsupported gets through."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_he.attention import gaussian_kernel_attention
from hf_he.backends import available_backends, get_backend
from hf_he.ckks.parameters import CKKSParameters, parameter_set
from hf_he.errors import BackendUnavailableError, LevelError, RefreshError, ShapeError, UnsupportedEncryptedOperation
from hf_he.models.he_bert import HEBertConfig, HEBertForSequenceClassification
from hf_he.nn import RangeTracker
from hf_he.packing import unpack_logits
from hf_he.refresh import BootstrapRefresh, ClientRefresh
from hf_he.tensor import EncryptedSession, EncryptedTensor, required_rotations

TOKENS = 8


def small_model(**changes) -> HEBertForSequenceClassification:
    """Random weights, large enough that every layer matters."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    model = HEBertForSequenceClassification(HEBertConfig(**(sizes | {"max_position_embeddings": 64} | changes))).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.mul_(8)
            elif "LayerNorm.bias" in name:
                parameter.normal_(0, 0.1)
    return model


def calibrated(model, embeddings, mask):
    """`model` in polynomial mode with the ranges it has on these inputs, and its logits."""
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(embedding_output=embeddings, attention_mask=mask)
    approximations = {}
    for name, seen in tracker.ranges.items():
        if seen.statistic == "variance":
            approximations[name] = {"interval": [seen.minimum / 2, 2 * seen.maximum], "degree": 15, "newton_steps": 1}
        elif seen.statistic == "exponent":
            approximations[name] = {"interval": [min(1.2 * seen.minimum, -20.0), 0.0], "squarings": 6}
        else:
            bound = 1.1 * max(-seen.minimum, seen.maximum)
            approximations[name] = {"interval": [-bound, bound], "degree": 15}
    model.set_approximations(approximations)
    model.set_mode("polynomial")
    with torch.no_grad():
        return model(embedding_output=embeddings, attention_mask=mask).logits


def inputs(model, sequences, tokens):
    ids = torch.randint(1, model.config.vocab_size, (sequences, tokens))
    mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (sequences, 1))).long()
    return model.bert.embeddings(input_ids=ids).detach(), mask


def run(lab, model, embeddings, mask):
    with torch.no_grad():
        hidden, keep = lab.encrypt(embeddings), lab.encrypt_mask(mask.double())
        logits = model(embedding_output=hidden, attention_mask=keep).logits
        assert logits.shape == (lab.packing.sequences, model.config.num_labels)
        return unpack_logits(lab.backend.decrypt(logits.ciphertext, lab.secret), lab.packing, model.config.num_labels)


VARIANTS = {
    "bert": {},
    "pre-norm, gated, no bias": {"norm_position": "pre", "gated_ffn": True, "use_bias": False, "hidden_act": "relu"},
    "no pooler, deep head": {"use_pooler": False, "classifier_hidden_sizes": [8, 32]},
    "four heads, four labels": {"num_attention_heads": 4, "num_labels": 4},
    "odd feed-forward width": {"intermediate_size": 40, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_encrypted_equals_polynomial(make_lab, variant):
    model = small_model(**VARIANTS[variant])
    packing = make_lab().packing
    lab = make_lab(rotations=required_rotations(model.config, packing))
    embeddings, mask = inputs(model, packing.sequences, TOKENS)
    expected = calibrated(model, embeddings, mask)
    found = run(lab, model, embeddings, mask)
    assert expected.abs().max() > 0.05
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-7)
    assert set(lab.backend.rotations_used) == required_rotations(model.config, packing)


def test_more_tokens_than_a_head_has_features(make_lab):
    model = small_model(num_hidden_layers=1)
    lab = make_lab(tokens=32)
    embeddings, mask = inputs(model, lab.packing.sequences, 32)
    expected = calibrated(model, embeddings, mask)
    np.testing.assert_allclose(run(lab, model, embeddings, mask), expected.numpy(), atol=2e-7)
    assert set(lab.backend.rotations_used) == required_rotations(model.config, lab.packing)


def test_bert_tiny_at_secure_parameters(make_lab):
    """The shape that ships: 2 layers x 128, 2 heads, 32 tokens, N = 2^14."""
    torch.manual_seed(0)
    model = HEBertForSequenceClassification(HEBertConfig(vocab_size=1000)).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.mul_(3)
    lab = make_lab(features=128, tokens=32, log2_degree=14)
    assert lab.packing.slots == parameter_set("n14").slots
    embeddings, mask = inputs(model, 2, 32)
    expected = calibrated(model, embeddings, mask)
    np.testing.assert_allclose(run(lab, model, embeddings, mask), expected.numpy(), atol=1e-6)
    operations = lab.backend.log.operations()
    assert operations["rotate"] <= 1100 and lab.session.refresh.count <= 16
    assert set(lab.backend.log.by_op()) == {"linear", "attention", "kernel", "norm", "activation", "refresh"}
    assert set(lab.backend.rotations_used) == required_rotations(model.config, lab.packing)


@pytest.mark.parametrize("backend", [name for name, (ok, _) in available_backends().items() if ok and name != "simulator"])
def test_real_ciphertexts_level_for_level_as_simulated(make_lab, backend):
    model = small_model()
    packing = make_lab().packing
    embeddings, mask = inputs(model, packing.sequences, TOKENS)
    expected = calibrated(model, embeddings, mask)
    labs = [make_lab(rotations=required_rotations(model.config, packing), backend=name) for name in ("simulator", backend)]
    for lab in labs:
        np.testing.assert_allclose(run(lab, model, embeddings, mask), expected.numpy(), atol=2e-7)
    assert labs[0].backend.log.trace == labs[1].backend.log.trace


def test_masked_tokens_do_not_matter(make_lab):
    model = small_model(num_hidden_layers=1)
    lab = make_lab()
    embeddings, mask = inputs(model, lab.packing.sequences, TOKENS)
    calibrated(model, embeddings, mask)
    changed = torch.where(mask[..., None] == 1, embeddings, embeddings.roll(1, dims=0))
    np.testing.assert_allclose(run(lab, model, embeddings, mask), run(lab, model, changed, mask), atol=2e-7)


def test_all_levels_and_operations_are_in_the_trace(make_lab):
    model, lab = small_model(num_hidden_layers=1), make_lab()
    embeddings, mask = inputs(model, lab.packing.sequences, TOKENS)
    calibrated(model, embeddings, mask)
    lab.backend.log.reset()
    run(lab, model, embeddings, mask)
    trace = lab.backend.log.trace
    assert {entry.scope for entry in trace if entry.primitive not in ("encrypt", "decrypt")} == {"linear", "attention", "kernel", "norm", "activation"}
    wide = [entry for entry in trace if entry.primitive == "rotate" and entry.count >= TOKENS and entry.scope == "attention"]
    assert wide and max(entry.level for entry in wide) <= 2, "whatever is as wide as the tokens runs near the bottom"


def test_unmerged_lora_adapters(make_lab):
    """Stock PEFT layers with plaintext adapters, scaling included."""
    peft = pytest.importorskip("peft")
    model = small_model(num_hidden_layers=1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query", "value"], task_type="SEQ_CLS")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    inner = adapted.double().base_model.model
    packing = make_lab().packing
    embeddings, mask = inputs(inner, packing.sequences, TOKENS)
    expected = calibrated(inner, embeddings, mask)
    adapted.float()
    lab = make_lab(rotations=required_rotations(model.config, packing, lora_rank=2))
    np.testing.assert_allclose(run(lab, adapted, embeddings, mask), expected.numpy(), atol=2e-7)


# ---- layout operations ----


def test_heads_split_and_merge(lab):
    x = lab.encrypt(lab.states())
    split = x.view(8, 8, 2, 8)
    assert split.shape == (8, 8, 2, 8) and split.transpose(1, 2).shape == (8, 2, 8, 8)
    merged = split.transpose(1, 2).transpose(2, 1).reshape(8, 8, -1)
    assert merged.shape == (8, 8, 16) and merged.ciphertext is x.ciphertext
    assert x.contiguous() is x and x.dim() == 3 and x.size(2) == 16 and x.dtype == torch.float32


def test_arithmetic(lab):
    x, y = lab.states(), lab.states()
    a, b = lab.encrypt(x), lab.encrypt(y, level=2)
    lab.check((a + b).ciphertext, x + y)
    lab.check((a * b).ciphertext, x * y)
    lab.check((0.5 * a).ciphertext, 0.5 * x)
    lab.check((a + 1).ciphertext, x + 1)
    assert (a + b).level == 2 and (a * b).level == 1


def test_a_pooled_number_stays_on_the_first_token(lab):
    x = lab.states()
    pooled = lab.encrypt(x)[:, 0] + 1.0
    assert pooled.shape == (8, 16)
    values = lab.decrypt(pooled.ciphertext, 16)
    torch.testing.assert_close(values[:, 0], x[:, 0] + 1, atol=2e-8, rtol=0)
    assert values[:, 1:].abs().max() < 2e-8


def test_linear_maps_and_sums_wait_for_their_consumer(lab):
    x = lab.encrypt(lab.states())
    lab.backend.log.reset()
    y = F.linear(x, lab.random(16, 16))
    assert not lab.backend.log.trace and y.level == 6
    total = y + lab.encrypt(lab.states(), level=2)
    assert total.level == 2 and total.ciphertext.level == 2
    assert {entry.level for entry in lab.backend.log.trace if entry.primitive == "rotate"} == {3}


def test_frozen_modules_and_eval_dropout_pass(lab):
    x = lab.encrypt(lab.states())
    block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1)).eval()
    with torch.no_grad():
        lab.check(block(x).ciphertext, block(lab.decrypt(x.ciphertext, 16).float()).double(), tolerance=1e-5)


# ---- refusals ----


UNSUPPORTED = {
    "softmax": lambda x: x.softmax(-1),
    "exp": torch.exp,
    "item": lambda x: x.item(),
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "matmul": lambda x: x @ x.transpose(1, 2),
    "sub": lambda x: x - x,
    "div": lambda x: x / 2,
    "sum": torch.sum,
    "layer_norm": lambda x: F.layer_norm(x, (16,)),
    "gelu": F.gelu,
    "comparison": lambda x: x > 0,
    "truth": bool,
    "length": len,
    "negation": lambda x: -x,
    "reflected": lambda x: torch.ones(16) - x,
    "assignment": lambda x: x.__setitem__(0, 1),
    "in-place": lambda x: x.add_(1),
    "another token": lambda x: x[:, 1],
    "slice": lambda x: x[:, :4],
    "permutation": lambda x: x.transpose(0, 1),
    "odd reshape": lambda x: x.reshape(8, 4, 32),
    "to another dtype": lambda x: x.double(),
    "to another device": lambda x: x.to("meta"),
    "clone": torch.clone,
    "deep copy": copy.deepcopy,
    "dropout in training": lambda x: F.dropout(x, 0.5, training=True),
    "plaintext summand": lambda x: x + torch.ones(16),
    "plaintext input": lambda x: F.linear(torch.ones(16, 16), x),
    "concatenation": lambda x: torch.cat([x, x]),
    "attention without heads": lambda x: gaussian_kernel_attention(nn.Identity(), x, x, x, None),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_everything_else_is_refused_by_name(lab, name):
    with pytest.raises(UnsupportedEncryptedOperation, match="has no encrypted form"):
        UNSUPPORTED[name](lab.encrypt(lab.states()))


def test_exact_mode_is_refused(make_lab):
    model, lab = small_model(num_hidden_layers=1), make_lab()
    embeddings, mask = inputs(model, lab.packing.sequences, TOKENS)
    with pytest.raises(UnsupportedEncryptedOperation, match="set_mode"):
        run(lab, model, embeddings, mask)


def test_a_plaintext_mask_is_refused(make_lab):
    model, lab = small_model(num_hidden_layers=1), make_lab()
    embeddings, mask = inputs(model, lab.packing.sequences, TOKENS)
    calibrated(model, embeddings, mask)
    with torch.no_grad(), pytest.raises(UnsupportedEncryptedOperation, match="attention_mask\\(ciphertext\\)"):
        model(embedding_output=lab.encrypt(embeddings), attention_mask=mask)


def test_shapes_are_checked(lab):
    x = lab.encrypt(lab.states())
    with pytest.raises(ShapeError, match="16 features"):
        F.linear(x, lab.random(4, 8))
    for bias in (lab.random(3), lab.session.bias(lab.encrypt(lab.states()).ciphertext, 8)):
        with pytest.raises(ShapeError, match="bias of shape"):
            F.linear(x, lab.random(16, 16), bias)
    with pytest.raises(ShapeError, match="one shape"):
        _ = x + lab.encrypt(lab.states(32))
    with pytest.raises(ShapeError, match="one ciphertext"):
        lab.session.attention_mask(lab.encrypt(lab.states(32)).ciphertext)
    with pytest.raises(ShapeError, match="2 ciphertexts"):
        lab.session.hidden_state(x.ciphertext, 32)


def test_printing_shows_no_values(lab):
    assert repr(lab.encrypt(lab.states())) == "EncryptedTensor(hidden state (8, 8, 16), level 7, simulator)"


# ---- refresh ----


def test_without_a_refresh_policy_levels_run_out(lab):
    session = EncryptedSession(lab.backend, lab.packing)
    x = session.hidden_state(lab.encrypt(lab.states(), level=0).ciphertext)
    with pytest.raises(LevelError, match="refresh policy"):
        _ = F.linear(x, lab.random(16, 16)).ciphertext


def test_refresh_counts_and_traffic(lab):
    policy, ct = lab.session.refresh, lab.encrypt(lab.states(), level=0).ciphertext
    fresh = policy.refresh(lab.backend, ct, 3)
    assert fresh.level == 7 and policy.count == 1 and policy.bytes_sent > 8 * lab.packing.slots < policy.bytes_received
    torch.testing.assert_close(lab.decrypt(fresh, 16), lab.decrypt(ct, 16), atol=1e-8, rtol=0)


def test_a_wrong_answer_to_a_refresh_is_caught(lab):
    backend, ct = lab.backend, lab.encrypt(lab.states(), level=0).ciphertext
    other = backend.generate_secret_key()
    zeros = np.zeros((1, lab.packing.slots))
    answers = {
        "not a ciphertext": b"garbage",
        "key": backend.serialize(backend.encrypt(zeros, other)),
        "batch": backend.serialize(backend.encrypt(zeros[0], lab.secret)),
        "level 1": backend.serialize(backend.encrypt(zeros, lab.secret, level=1)),
    }
    for reason, answer in answers.items():
        with pytest.raises(RefreshError, match=reason):
            ClientRefresh(lambda _, answer=answer: answer).refresh(backend, ct, 3)


def test_without_the_client_by_bootstrapping(make_lab):
    model = small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = CKKSParameters.from_bits(11, 50, 40, 7, 50, 4, insecure=True, bootstrap=True)
    lab = make_lab(parameters=parameters)
    lab.backend.load_evaluation_keys(lab.backend.generate_evaluation_keys(lab.secret, required_rotations(model.config, lab.packing), bootstrapping=True))
    lab.session.refresh = BootstrapRefresh(lab.backend)
    embeddings, mask = inputs(model, lab.packing.sequences, TOKENS)
    expected = calibrated(model, embeddings, mask)
    np.testing.assert_allclose(run(lab, model, embeddings, mask), expected.numpy(), atol=2e-3)
    assert lab.backend.log.operations()["bootstrap"] == lab.session.refresh.count > 0


def test_bootstrapping_says_that_it_is_not_there():
    with pytest.raises(BackendUnavailableError, match="--refresh client"):
        BootstrapRefresh(get_backend("simulator", parameter_set("n14")))


def test_an_encrypted_tensor_is_a_tensor(lab):
    x = lab.encrypt(lab.states())
    assert isinstance(x, torch.Tensor) and isinstance(x, EncryptedTensor) and not x.requires_grad
