"""The order of examples: every epoch a permutation, repeatable, and a digest that only its key can compute."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_he.finetuning.order import DataOrder


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation(rows, batch, seed, epoch):
    order = DataOrder(rows, batch, seed)
    steps = [order.step(epoch * order.steps_per_epoch + number) for number in range(1, order.steps_per_epoch + 1)]
    assert sorted(row for step in steps for row in step) == list(range(rows))
    assert all(len(step) == batch for step in steps[:-1])
    assert DataOrder(rows, batch, seed).step(3) == order.step(3)
    assert order.epoch(order.steps_per_epoch) == 1.0


def test_epochs_and_seeds_differ():
    order = DataOrder(100, 100, 0)
    assert order.step(1) != order.step(2) and DataOrder(100, 100, 1).step(1) != order.step(1)


def test_the_digest_depends_on_everything_and_on_the_key():
    texts, labels = ["a", "b"], [0, 1]
    digests = {
        DataOrder(2, 1, 0).digest(b"key", texts, labels),
        DataOrder(2, 1, 0).digest(b"other", texts, labels),
        DataOrder(2, 1, 1).digest(b"key", texts, labels),
        DataOrder(2, 2, 0).digest(b"key", texts, labels),
        DataOrder(2, 1, 0).digest(b"key", ["a", "c"], labels),
        DataOrder(2, 1, 0).digest(b"key", texts, [1, 1]),
    }
    assert len(digests) == 6
    assert DataOrder(2, 1, 0).digest(b"key", texts, labels) in digests
