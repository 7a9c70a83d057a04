"""`hf-he bench finetune`: the baseline trains, what is priced is what was counted, ratios follow from prices."""

import copy
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_he import HEBertConfig, HEBertForSequenceClassification, RangeTracker
from hf_he.approximation import fit_reciprocal, kernel_exponential
from hf_he.bench import finetune, full_finetuning
from hf_he.bench.finetune import Shape
from hf_he.bench.pricing import PricedBackend, PricedSession
from hf_he.cli import app
from hf_he.errors import DataError
from hf_he.models.kernel_attention import KernelAttention
from hf_he.ops import attention, matrix, softmax
from hf_he.ops.operand import Operand
from hf_he.tensor import POOLED, EncryptedTensor

ENTRIES = {
    "variance": {"interval": [0.05, 8.0], "degree": 15, "newton_steps": 1},
    "exponent": {"interval": [-16.0, 0.0], "squarings": 7},
    "gelu": {"interval": [-6.0, 6.0], "degree": 15},
}
TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "use_bias": False, "use_pooler": False}


def tiny_model(monkeypatch) -> HEBertForSequenceClassification:
    monkeypatch.setattr(finetune, "ENTRIES", ENTRIES)
    torch.manual_seed(0)
    config = HEBertConfig(vocab_size=8, max_position_embeddings=8, num_hidden_layers=1, num_labels=2, initializer_range=0.2, **TINY)
    model = HEBertForSequenceClassification(config).double().eval()
    model.set_approximations({name: finetune.entry_for(module) for name, module in model.named_modules() if hasattr(module, "entry_keys")})
    model.set_mode("polynomial")
    return model


WIDE = softmax.Softmax(3.0, kernel_exponential((-8.0, 0.0), 7), fit_reciprocal((0.02, 8.0), 15, 5))


def plaintext_softmax(model):
    for module in model.modules():
        if isinstance(module, KernelAttention):
            module.attend = lambda q, k, v, mask, dropout, module=module, **_: (softmax.reference(q, k, v, None, module.scaling, WIDE), None)


def test_full_fine_tuning_has_the_gradients_of_autograd(make_lab, monkeypatch):
    lab = make_lab(levels=13)
    monkeypatch.setattr(full_finetuning, "softmax_form", lambda tokens, squarings: WIDE)
    plain = tiny_model(monkeypatch)
    model, x = copy.deepcopy(plain).requires_grad_(False), lab.states()
    do = lab.random(lab.packing.sequences, 2)
    plaintext_softmax(plain)
    with RangeTracker(plain):
        expected = plain(embedding_output=x).logits
    expected.backward(do)

    def encrypt(name, linear):
        return lab.backend.encrypt(matrix.pack_matrix(linear.weight.numpy(), lab.packing), lab.secret)

    matrices = full_finetuning.encrypt_encoder(lab.session, model, encrypt)
    mask = lab.encrypt_mask(torch.ones(lab.packing.sequences, 8))
    logits = model(embedding_output=lab.encrypt(x), attention_mask=mask).logits
    torch.testing.assert_close(lab.decrypt(logits.ciphertext, 2)[:, 0], expected.detach(), atol=1e-3, rtol=0)
    first = torch.zeros(lab.packing.sequences, 8, 16, dtype=torch.float64)
    first[:, 0, :2] = do
    upstream = Operand(lab.session, 2, lab.encrypt(first).ciphertext, pooled=True)
    torch.autograd.backward([logits], [EncryptedTensor(upstream, tuple(logits.shape), POOLED)])
    for name, leaf in matrices.items():
        gradient = plain.bert.encoder.get_submodule(name).weight.grad
        found = matrix.unpack_matrix(lab.backend.decrypt(leaf.grad.ciphertext, lab.secret), lab.packing, tuple(gradient.shape))
        error = torch.from_numpy(found) - gradient
        assert error.norm() <= 2e-3 * gradient.norm(), name


def test_units_are_the_operations_of_the_log(make_lab):
    lab = make_lab()
    session = PricedSession(lab.backend.parameters, lab.packing)
    state = Operand(session, 16, session.backend.fresh(session.top))
    attention.encrypted(session, state, state, state, None, 2, 0.3, kernel_exponential((-8.0, 0.0), 6))
    log, units = session.backend.log, session.backend.take_units()
    by_name: Counter = Counter()
    for (name, _), count in units.items():
        by_name[name] += count
    operations = {"relinearize": "relinearize", "multiply": "multiply", "multiply_scalar": "multiply_scalar"}
    counted = Counter()
    operands = [lab.encrypt(lab.states()).operand for _ in range(3)]
    lab.backend.log.reset()
    attention.encrypted(lab.session, *operands, None, 2, 0.3, kernel_exponential((-8.0, 0.0), 6))
    counted = lab.backend.log.operations()
    for unit, primitive in operations.items():
        assert by_name[unit] == counted.get(primitive, 0), unit
    plain = ("multiply_plain", "full-slot multiply_plain", "multiply_plain_sum", "full-slot product")
    assert sum(by_name[unit] for unit in plain) == counted["multiply_plain"]
    assert by_name["hoisted rotation"] + by_name["summed rotation"] == counted["rotate"]
    assert by_name["refresh"] == lab.session.refresh.count == 2
    assert not log.trace and not session.backend.units, "taking starts afresh"


def test_plaintexts_of_all_slots_and_sums_are_counted_apart(make_lab):
    lab = make_lab()
    session = PricedSession(lab.backend.parameters, lab.packing)
    backend, slots = session.backend, lab.backend.parameters.slots
    state = dataclasses.replace(backend.fresh(3), batch_shape=(4, 2))
    for period in (16, slots):
        backend.multiply_plain_sum(backend.encode(np.ones((3, 4, period)), 3), state)
        backend.multiply_plain(state, backend.encode(np.ones(period), 3))
    backend.sum(state)
    found = {name: count for (name, level), count in backend.take_units().items() if level == 3 and name != "encode"}
    assert found == {
        "multiply_plain_sum": 24,
        "multiply_plain": 8,
        "full-slot product": 24,
        "sum of full-slot products": 6,
        "full-slot multiply_plain": 8,
        "sum component": 16,
        "sum of components": 4,
    }


class Unit:
    """Every unit costs a second, a refresh ten."""

    def seconds(self, units, announce):
        total = Counter()
        for (name, _), count in units.items():
            total[name] += count * (10.0 if name == "refresh" else 1.0)
        return dict(total)


def test_ratios_follow_from_prices(monkeypatch):
    monkeypatch.setattr(finetune, "OPTIMIZER_STEPS", 2)
    row = finetune.compare(Shape("small", "n14", 32, 8, {**TINY, "hidden_size": 32}), Unit(), lambda text: None)
    seconds = {way: found["seconds"] for way, found in row["priced"].items()}
    for found in seconds.values():
        assert found["step"] == pytest.approx(found["layers"] + found["optimizer"])
    assert row["finetune_ratio"] == pytest.approx(seconds["full_softmax"]["step"] / seconds["lora_gaussian"]["step"]) and row["finetune_ratio"] > 2
    assert row["inference_ratio"] == pytest.approx(seconds["full_softmax"]["inference"] / seconds["lora_gaussian"]["inference"]) and row["inference_ratio"] > 1
    assert row["softmax_inference_ratio"] > 1
    assert row["paper"] == {"finetune_ratio": 6.94, "inference_ratio": 2.33}
    header, lines = finetune.table(row)
    assert len(lines) == 4 and all(len(line) == len(header) for line in lines)


@pytest.mark.parametrize("count", [finetune.count_lora, finetune.count_full])
def test_products_of_a_step_are_those_of_the_log(monkeypatch, count):
    """The log counts results, whatever the batches of the operands."""
    counted, logged, take = Counter(), Counter(), PricedBackend.take_units

    def taken(backend):
        logged.update(backend.log.operations())
        units = take(backend)
        for (name, _), found in units.items():
            counted[name] += found
        return units

    monkeypatch.setattr(finetune, "OPTIMIZER_STEPS", 1)
    monkeypatch.setattr(PricedBackend, "take_units", taken)
    count(Shape("small", "n14", 32, 8, {**TINY, "hidden_size": 32}))
    assert counted["multiply"] == logged["multiply"] > 0
    assert counted["relinearize"] == logged["relinearize"] > 0
    plain = ("multiply_plain", "full-slot multiply_plain", "multiply_plain_sum", "full-slot product")
    assert sum(counted[name] for name in plain) == logged["multiply_plain"] > 0


def test_an_unknown_shape_is_refused():
    result = CliRunner().invoke(app, ["bench", "finetune", "--shape", "huge"])
    assert result.exit_code and isinstance(result.exception, DataError) and "choose from shipped, paper, all" in str(result.exception)
