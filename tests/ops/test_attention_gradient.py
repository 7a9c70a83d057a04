"""Gradients of Gaussian-kernel attention between ciphertexts against torch's autograd of the plaintext formula."""

import pytest
import torch

from hf_he.approximation import KernelExponential, kernel_exponential
from hf_he.errors import ShapeError
from hf_he.ops import attention, attention_gradient
from hf_he.ops.operand import Operand

SHAPES = [(16, 8, 2), (16, 16, 2), (16, 8, 1), (16, 4, 4), (32, 32, 4), (8, 16, 2), (32, 16, 1), (16, 1, 2)]
"""features, tokens, heads; the Lab has 1024 slots, hence 2 to 64 sequences."""


def heads_of(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def expected_gradients(tensors, do, keep, heads, scaling, kernel):
    leaves = [x.clone().requires_grad_() for x in tensors]
    mask = None if keep is None else keep[:, None, None, :]
    out = attention.reference(*(heads_of(x, heads) for x in leaves), mask, scaling, kernel)
    out.reshape(do.shape).backward(do)
    return [x.grad for x in leaves]


def run(lab, tensors, do, keep, heads, scaling, kernel, policy="recompute", needs=(True, True, True), output=1, level=None):
    operands = [lab.encrypt(x).operand for x in tensors]
    mask = None if keep is None else lab.encrypt_mask(keep).ciphertext
    out, saved = attention_gradient.forward(lab.session, *operands, mask, heads, scaling, kernel, policy=policy)
    return out.ciphertext, attention_gradient.backward(lab.session, saved, lab.encrypt(do, level).operand, needs, output)


def check(lab, gradients, expected, output=1, tolerance=1e-3):
    for operand, gradient in zip(gradients, expected, strict=True):
        ct = operand.ciphertext
        assert ct.batch_shape == (1,) and ct.level == output
        assert abs(ct.scale / lab.backend.parameters.scale_at(output) - 1) < 1e-9
        error = lab.decrypt(ct, gradient.shape[-1]) - gradient
        assert error.norm() <= tolerance * gradient.norm()


def problem(lab):
    tensors = [0.5 * lab.states() for _ in range(3)]
    keep = (torch.rand(lab.packing.sequences, lab.packing.tokens, generator=lab.generator) < 0.7).double()
    return tensors, lab.states(), keep


@pytest.mark.parametrize(("features", "tokens", "heads"), SHAPES, ids=str)
@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_against_autograd(make_lab, features, tokens, heads, policy):
    lab = make_lab(features=features, tokens=tokens)
    tensors, do, keep = problem(lab)
    kernel = kernel_exponential((-8.0, 0.0), 5)
    out, gradients = run(lab, tensors, do, keep, heads, 0.3, kernel, policy)
    forward = attention.reference(*(heads_of(x, heads) for x in tensors), keep[:, None, None, :], 0.3, kernel)
    lab.check(out, forward.reshape(do.shape))
    check(lab, gradients, expected_gradients(tensors, do, keep, heads, 0.3, kernel))


@pytest.mark.parametrize("squarings", [1, 2, 7, 9])
@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_squarings_below_and_above_the_levels(lab, squarings, policy):
    tensors, do, keep = problem(lab)
    kernel = KernelExponential(squarings, (-3.0, 0.0), 1.0)
    _, gradients = run(lab, tensors, do, keep, 2, 0.1, kernel, policy)
    check(lab, gradients, expected_gradients(tensors, do, keep, 2, 0.1, kernel))


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True), (False, True, True)], ids=str)
def test_only_what_is_needed(lab, needs, policy):
    tensors, do, keep = problem(lab)
    kernel = kernel_exponential((-8.0, 0.0), 4)
    _, gradients = run(lab, tensors, do, keep, 2, 0.3, kernel, policy, needs)
    assert [gradient is not None for gradient in gradients] == list(needs)
    wanted = [i for i in range(3) if needs[i]]
    expected = expected_gradients(tensors, do, keep, 2, 0.3, kernel)
    check(lab, [gradients[i] for i in wanted], [expected[i] for i in wanted])


def test_nothing_is_computed_when_nothing_is_needed(lab):
    tensors, do, _ = problem(lab)
    operands = [lab.encrypt(x).operand for x in tensors]
    _, saved = attention_gradient.forward(lab.session, *operands, None, 2, 0.3, kernel_exponential((-8.0, 0.0), 4))
    lab.backend.log.reset()
    assert attention_gradient.backward(lab.session, saved, lab.encrypt(do).operand, (False, False, False)) == (None, None, None)
    assert lab.backend.log.operations() == {"encrypt": 1}


@pytest.mark.parametrize("level", [0, 1, 3])
def test_without_a_mask_from_any_level_to_another(lab, level):
    tensors, do, _ = problem(lab)
    kernel = kernel_exponential((-8.0, 0.0), 3)
    _, gradients = run(lab, tensors, do, None, 2, 0.3, kernel, output=3, level=level)
    check(lab, gradients, expected_gradients(tensors, do, None, 2, 0.3, kernel), output=3)


@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_several_feature_blocks(lab, policy):
    tensors, do = [0.5 * lab.states(48) for _ in range(3)], lab.states(48)
    keep = torch.ones(lab.packing.sequences, lab.packing.tokens).double()
    kernel = kernel_exponential((-8.0, 0.0), 4)
    out, gradients = run(lab, tensors, do, keep, 6, 0.3, kernel, policy)
    lab.check(out, attention.reference(*(heads_of(x, 6) for x in tensors), None, 0.3, kernel).reshape(do.shape))
    for operand, expected in zip(gradients, expected_gradients(tensors, do, keep, 6, 0.3, kernel), strict=True):
        assert (lab.decrypt(operand.ciphertext, 48) - expected).norm() <= 1e-5 * expected.norm()


def test_heads_do_not_cross_blocks(lab):
    operands = [lab.encrypt(lab.states(48)).operand for _ in range(3)]
    with pytest.raises(ShapeError, match="cannot be shared out"):
        attention_gradient.forward(lab.session, *operands, None, 4, 0.3, kernel_exponential((-8.0, 0.0), 4))


@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_causal(lab, policy):
    tensors, do, _ = problem(lab)
    kernel, tokens = kernel_exponential((-8.0, 0.0), 4), lab.packing.tokens
    operands = [lab.encrypt(x).operand for x in tensors]
    levels = attention.AttentionLevels(query=3, value=2)
    _, saved = attention_gradient.forward(lab.session, *operands, None, 2, 0.3, kernel, levels, policy, causal=True)
    gradients = attention_gradient.backward(lab.session, saved, lab.encrypt(do).operand)
    leaves = [x.clone().requires_grad_() for x in tensors]
    past = torch.ones(tokens, tokens).tril()[None, None]
    attention.reference(*(heads_of(x, 2) for x in leaves), past, 0.3, kernel).reshape(do.shape).backward(do)
    check(lab, gradients, [x.grad for x in leaves])


def test_padding_gets_no_gradient(lab):
    tensors, do, keep = problem(lab)
    _, (_, dk, dv) = run(lab, tensors, do, keep, 2, 0.3, kernel_exponential((-8.0, 0.0), 4))
    for operand in (dk, dv):
        assert (lab.decrypt(operand.ciphertext, do.shape[-1]) * (1 - keep)[..., None]).abs().max() < 1e-6


@pytest.mark.parametrize(("query", "level", "expected"), [(2, 0, [1, 2]), (11, None, [1])], ids=["exhausted", "high scores"])
def test_refreshes_are_shared(make_lab, query, level, expected):
    """The gradient alone, then scores and errors together; scores that are high enough stay."""
    lab = make_lab(levels=13)
    sizes = []
    answer = lab.session.refresh.callback
    lab.session.refresh.callback = lambda data: (sizes.append(lab.backend.deserialize(data, "ciphertext").count), answer(data))[1]
    tensors, do, keep = problem(lab)
    operands = [lab.encrypt(x).operand for x in tensors]
    levels = attention.AttentionLevels(query=query, value=2)
    kernel = kernel_exponential((-8.0, 0.0), 5)
    _, saved = attention_gradient.forward(lab.session, *operands, lab.encrypt_mask(keep).ciphertext, 2, 0.3, kernel, levels)
    sizes.clear()
    gradients = attention_gradient.backward(lab.session, saved, lab.encrypt(do, level).operand)
    assert sizes == expected
    check(lab, gradients, expected_gradients(tensors, do, keep, 2, 0.3, kernel))


@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_a_refresh_is_of_the_scores(make_lab, policy):
    """And not of 1 + score: a bootstrap's error grows with the cube of what the slots have in common, and every squaring doubles it."""
    lab, values = make_lab(levels=13), []
    answer = lab.session.refresh.callback

    def record(data):
        values.append(lab.decrypt(lab.backend.deserialize(data, "ciphertext"), 16))
        return answer(data)

    tensors, _, keep = problem(lab)
    operands = [lab.encrypt(x).operand for x in tensors]
    lab.session.refresh.callback = record
    kernel = kernel_exponential((-8.0, 0.0), 6)
    attention_gradient.forward(lab.session, *operands, lab.encrypt_mask(keep).ciphertext, 2, 0.3, kernel, policy=policy)
    (scores,) = values
    assert scores.max() < 1e-4 and -8.0 / kernel.degree < scores.min() < -1e-3


@pytest.mark.parametrize("masked", [True, False])
def test_what_was_kept_of_the_kernel_is_not_refreshed(make_lab, masked):
    """Six squarings leave 7 of 13 levels, exactly what gradients at ADAPTER_LEVEL need of the kernel, its mask included, and of its derivative: kept values
    are as small as 1e-3 between distant tokens, and a bootstrap's error is absolute."""
    lab = make_lab(levels=13)
    kernel, refreshed = kernel_exponential((-8.0, 0.0), 6), []
    tensors, do, keep = problem(lab)
    operands = [lab.encrypt(x).operand for x in tensors]
    levels = attention_gradient.training_levels(lab.session, kernel.squarings)
    mask = lab.encrypt_mask(keep).ciphertext if masked else None
    _, saved = attention_gradient.forward(lab.session, *operands, mask, 2, 0.3, kernel, levels, "keep")
    answer = lab.session.refresh.callback
    lab.session.refresh.callback = lambda data: (refreshed.append(lab.backend.deserialize(data, "ciphertext").count), answer(data))[1]
    output = attention_gradient.output_level(lab.session, kernel.squarings)
    gradients = attention_gradient.backward(lab.session, saved, lab.encrypt(do, attention.SCORE_DEPTH + output).operand, output=output)
    scores = saved[0].scores.batch_shape[1]
    assert output == attention_gradient.ADAPTER_LEVEL and saved[0].scores.level == 7 and refreshed == [scores]
    check(lab, gradients, expected_gradients(tensors, do, keep if masked else None, 2, 0.3, kernel), output)


@pytest.mark.parametrize(("features", "tokens", "heads"), [(16, 8, 2), (16, 16, 4), (32, 32, 1), (8, 16, 2)])
def test_rotations_are_the_promised_ones(make_lab, features, tokens, heads):
    lab = make_lab(features=features, tokens=tokens)
    tensors, do, keep = problem(lab)
    run(lab, tensors, do, keep, heads, 0.1, kernel_exponential((-64.0, 0.0), 7))
    assert set(lab.backend.rotations_used) == attention_gradient.rotations(lab.packing, heads)
    assert attention_gradient.rotations(lab.packing, heads) >= attention.rotations(lab.packing, heads)


def test_operands_stay_as_they_were(lab):
    tensors, do, keep = problem(lab)
    gradient = Operand(lab.session, 16, lab.encrypt(do, 0).ciphertext)
    kernel = kernel_exponential((-8.0, 0.0), 4)
    operands = [lab.encrypt(x).operand for x in tensors]
    _, saved = attention_gradient.forward(lab.session, *operands, lab.encrypt_mask(keep).ciphertext, 2, 0.3, kernel)
    first = attention_gradient.backward(lab.session, saved, gradient)
    second = attention_gradient.backward(lab.session, saved, gradient)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(lab.decrypt(one.ciphertext, 16), lab.decrypt(other.ciphertext, 16), atol=1e-6, rtol=0)
