"""A training step with one feature per ciphertext: labels, loss, backward, dense gradient and optimiser, against the plaintext twin."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_planner import default_shape
from test_tensor import TOKENS, calibrated, inputs, small_model

from hf_he.ckks.parameters import parameter_set
from hf_he.errors import ShapeError
from hf_he.finetuning.plan import choose_step_packing
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import PolynomialTraining
from hf_he.finetuning.step import MicroBatch, TrainingRun, adapted_model
from hf_he.packing import pack_attention_mask, pack_embeddings

SEQUENCES = 100
"""Of the 128 that 1,024 slots hold; the other lanes are copies and must not count."""


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_step_against_the_plaintext_twin(make_lab, num_labels):
    lab = make_lab(features=1)
    packing = lab.packing
    settings = TrainingSettings(sequences=SEQUENCES, steps=2, schedule="constant", optimizer="sgd", learning_rate=0.1, loss_bound=4.0)
    model = small_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=1, num_labels=num_labels)
    embeddings, mask = inputs(model, SEQUENCES, TOKENS)
    calibrated(model, embeddings, mask)
    run = TrainingRun(lab.session, copy.deepcopy(model), settings)
    state = {name: 0.02 * lab.random(*shape) for name, shape in run.layout.shapes.items()}
    assert (run.layout.count, run.layout.total) == (1, sum(values.numel() for values in state.values()))
    labels = torch.randint(0, num_labels, (SEQUENCES,), generator=lab.generator).numpy()
    targets, weights = np.zeros((num_labels, TOKENS, packing.sequences)), np.zeros((1, TOKENS, packing.sequences))
    targets[labels, 0, np.arange(SEQUENCES)] = weights[0, 0, :SEQUENCES] = 1.0

    def encrypt(values):
        return lab.backend.encrypt(values.reshape(len(values), -1), lab.secret)

    packed = (pack_embeddings(embeddings.numpy(), packing), pack_attention_mask(mask.numpy(), packing), targets, weights)
    run.load(encrypt(run.layout.pack(state)))
    run.prepare()
    logits = run.micro_batch(MicroBatch(*map(encrypt, packed)))
    after, _ = run.update(run.gradient(SEQUENCES), 1)

    twin = adapted_model(model, settings)
    run.layout.load(twin, state)
    twin = PolynomialTraining(twin, settings)
    with torch.no_grad():
        expected = twin.model(embedding_output=embeddings, attention_mask=mask).logits
    torch.testing.assert_close(lab.decrypt(logits, num_labels)[:SEQUENCES, 0], expected, atol=1e-4, rtol=0)
    twin.step({"embedding_output": embeddings, "attention_mask": mask}, labels)
    slots = lab.backend.decrypt(after, lab.secret)
    for name, values in run.layout.unpack(slots).items():
        step = twin.adapter[name] - state[name]
        assert (values - state[name] - step).norm() <= 1e-3 * step.norm(), name
    assert np.abs(slots.reshape(-1)[run.layout.total :]).max() < 1e-5


def test_labels_are_one_ciphertext_each(make_lab):
    lab = make_lab(features=1)
    one = lab.backend.encrypt(np.zeros((1, lab.packing.slots)), lab.secret)
    with pytest.raises(ShapeError, match="2 labels are 2 ciphertexts"):
        lab.session.labels(one, one, 2)


def test_the_planner_packs_large_steps_one_feature_per_ciphertext():
    """Few examples cost as much as many with one feature per ciphertext; the model's weights are then a ciphertext each."""
    settings = TrainingSettings(rank=2)
    few, many = (
        choose_step_packing(default_shape, parameter_set("n14"), 32, replace(settings, sequences=sequences, loss_location=where), memory=21 * 10**9)
        for sequences, where in ((16, "server"), (256, "client"))
    )
    assert (few.packing.features, many.packing.features) == (128, 1)
    assert few.seconds[1] * 1.5 > few.seconds[128] and many.seconds[1] * 4 < many.seconds[128]
    assert many.weights == {128: 2 * 3 * (2 + 2) + 2 + 1, 1: 2 * 3 * 4 * 128 + 2 * 128 + 2}
    assert "16 sequences" in few.reason and f"{many.weights[1]:,} ciphertexts, {many.weight_bytes[1] / 1e9:.2f} GB" in many.reason


def test_the_planner_minds_memory_and_processes():
    """Weights that do not fit are not planned with; processes share 128 micro-batches, but not the only one of 256 examples."""
    settings = TrainingSettings(sequences=256)
    small = choose_step_packing(default_shape, parameter_set("n14"), 32, settings, memory=17 * 10**9)
    assert small.packing.features == 128 and small.seconds.keys() == {128} and "a step with 1 would take 18.3 GB of 17.0" in small.reason
    shared = choose_step_packing(default_shape, parameter_set("n14"), 32, settings, ranks=8, memory=21 * 10**9)
    assert shared.packing.features == 128 and shared.seconds[128] < small.seconds[128] / 7 < shared.seconds[1] and "8 processes" in shared.reason
