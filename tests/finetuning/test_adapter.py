"""Dense and periodic forms of a PEFT adapter: where values sit, what a model computes with them, what comes back as gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_model import SENTENCES, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_he.errors import ParameterError, ShapeError
from hf_he.finetuning import adapter as adapters
from hf_he.finetuning.adapter import AdapterLayout, EncryptedAdapter
from hf_he.ops import weights
from hf_he.packing import Packing
from hf_he.peft import HELoraConfig

TARGETS = ["query", "key", "value"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def adapted(directory, r=2):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    model = get_peft_model(model, HELoraConfig(r=r, target_modules=TARGETS, task_type="SEQ_CLS")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def small_layout(lab, **shapes):
    return AdapterLayout(lab.packing, shapes)


SHAPES = st.lists(st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 40))), min_size=1, max_size=8)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_unpacking_inverts_packing(shapes):
    layout = AdapterLayout(Packing.fit(512, 16, 8), {f"p{i}": shape for i, shape in enumerate(shapes)})
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in layout.shapes.items()}
    slots = layout.pack(state)
    assert slots.shape == (layout.count, 512)
    assert np.abs(slots).sum() == pytest.approx(sum(float(values.abs().sum()) for values in state.values()))
    for name, values in layout.unpack(slots).items():
        torch.testing.assert_close(values, state[name], atol=0, rtol=0)


def test_the_layout_of_a_peft_model(directory):
    layout = AdapterLayout.of(adapted(directory), Packing.fit(4096, 32, 32))
    assert len(layout.names) == 3 * 2 + 2
    assert layout.total == 3 * (2 + 2) + 2 + 1
    assert layout.count == 1
    assert sum(layout.vectors(name) for name in layout.names) == layout.total


@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize(("features", "tokens"), [(16, 8), (8, 2), (32, 32)])
def test_every_vector_is_spread_over_all_lanes(make_lab, rank, features, tokens):
    lab = make_lab(features=features, tokens=tokens)
    layout = small_layout(lab, a=(rank, features), b=(2 * features, rank), bias=(3,))
    state = {name: lab.random(*shape) for name, shape in layout.shapes.items()}
    dense = lab.backend.encrypt(layout.pack(state), lab.secret)
    lab.backend.rotations_used.clear()
    periodic = lab.backend.stack(list(adapters.spread(lab.session, dense, layout)))
    assert periodic.batch_shape == (layout.total,)
    assert periodic.level == dense.level - adapters.SPREAD_DEPTH
    found = lab.backend.decrypt(periodic, lab.secret).reshape(layout.total, layout.lanes, features)
    expected = np.concatenate([weights.reference(state[name].numpy(), lab.packing) for name in layout.names])
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None], found.shape), atol=1e-5)
    assert set(lab.backend.rotations_used) <= adapters.rotations(lab.packing)


def test_spreading_costs_far_fewer_rotations_than_one_by_one(lab):
    layout = small_layout(lab, a=(27, 16))
    dense = lab.backend.encrypt(np.zeros((layout.count, lab.packing.slots)), lab.secret)
    lab.backend.log.reset()
    assert len(list(adapters.spread(lab.session, dense, layout))) == layout.total
    groups, inner, outer = 27 // 8 + 1, 8, 8
    assert layout.lanes == inner * outer
    assert lab.backend.log.operations()["rotate"] == (outer - 1) + groups * (inner - 1) < 27 * 6


def test_installed_weights_are_leaves_of_the_stock_model(directory, make_lab):
    lab = make_lab(features=32, tokens=32, log2_degree=12)
    model = adapted(directory)
    layout = AdapterLayout.of(model, lab.packing)
    state = layout.values(model)
    adapter = EncryptedAdapter(lab.session, model, layout, lab.backend.encrypt(layout.pack(state), lab.secret))
    adapter.install()
    adapter.install()
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query
    assert not list(query.lora_A["default"].parameters())
    leaf = query.lora_A["default"].weight
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert tuple(leaf.shape) == (2, 32)
    torch.testing.assert_close(
        layout.unpack(lab.backend.decrypt(adapter.dense, lab.secret))[layout.names[0]], state[layout.names[0]].double(), atol=1e-6, rtol=0
    )


def test_collected_gradients_are_dense_and_scaled(lab):
    layout = small_layout(lab, a=(3, 16), b=(32, 60), bias=(2,))
    model = torch.nn.Module()
    for name, shape in layout.shapes.items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    zeros = {name: torch.zeros(shape) for name, shape in layout.shapes.items()}
    adapter = EncryptedAdapter(lab.session, model, layout, lab.backend.encrypt(layout.pack(zeros), lab.secret))
    adapter.install()
    gradients = {name: lab.random(*shape) for name, shape in layout.shapes.items()}
    for level, name in zip((1, 3, 2), layout.names, strict=True):
        vectors = np.tile(weights.reference(gradients[name].numpy(), lab.packing), layout.lanes)
        ciphertext = lab.backend.encrypt(vectors, lab.secret, level)
        leaf, shape = getattr(model, name), layout.shapes[name]
        leaf.grad = lab.session.weight(ciphertext, shape) if len(shape) == 2 else lab.session.bias(ciphertext, shape[0])
    assert layout.count == 3
    with pytest.raises(ShapeError, match="2 gradient scales for 3"):
        adapter.collect(0.25, (1.0, 1.0))
    scales = dict(zip(layout.names, (1.0, 4.0, 0.5), strict=True))
    dense = adapter.collect(0.25, tuple(scales.values()))
    assert dense.level == 0
    found = layout.unpack(lab.backend.decrypt(dense, lab.secret))
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], 0.25 * scales[name] * gradient, atol=1e-5, rtol=0)
    with pytest.raises(ShapeError, match="has no gradient"):
        adapter.collect()


def test_wrong_shapes_are_named(lab):
    layout = small_layout(lab, a=(3, 16))
    with pytest.raises(ShapeError, match="a has shape"):
        layout.pack({"a": torch.zeros(16, 3)})
    with pytest.raises(ShapeError, match="parameters are a"):
        layout.pack({"b": torch.zeros(3, 16)})
    with pytest.raises(ShapeError, match="1 dense"):
        EncryptedAdapter(lab.session, torch.nn.Module(), layout, lab.backend.encrypt(np.zeros((2, lab.packing.slots)), lab.secret))
    with pytest.raises(ShapeError, match="no parameter"):
        AdapterLayout.of(torch.nn.Module(), lab.packing)
    with pytest.raises(ShapeError, match="only matrices"):
        small_layout(lab, a=(2, 3, 4))


def test_an_adapter_is_stock_lora(directory, tmp_path):
    model = adapted(directory)
    tokens = AutoTokenizer.from_pretrained(directory)(SENTENCES, padding="max_length", max_length=32, return_tensors="pt")
    model.get_base_model().set_mode("exact")
    expected = model(**tokens).logits
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(directory)
    plain.set_mode("exact")
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert loaded.peft_config["default"].lora_alpha == loaded.peft_config["default"].r == 2
    torch.testing.assert_close(loaded(**tokens).logits, expected)


@pytest.mark.parametrize("wrong", [{"lora_alpha": 16}, {"lora_dropout": 0.1}, {"use_rslora": True}, {"bias": "all"}])
def test_settings_that_cost_a_level_or_cannot_be_encrypted_are_refused(wrong):
    with pytest.raises(ParameterError):
        HELoraConfig(r=2, target_modules=TARGETS, **wrong)
