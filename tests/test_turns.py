"""Functions in turns: one at a time, together where they meet, all ended by one failure."""

import pytest

from hf_he.turns import Turns


def doubled(values):
    return [2 * value for value in values]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_meet_and_get_their_own_answers(count):
    turns, meetings = Turns(), []

    def together(values):
        meetings.append(values)
        return doubled(values)

    def lane(index):
        return [turns.meet(10 * round_ + index, together) for round_ in range(3)]

    assert turns.run([lambda i=i: lane(i) for i in range(count)]) == [[2 * (10 * r + i) for r in range(3)] for i in range(count)]
    if count > 1:
        assert meetings == [[10 * r + i for i in range(count)] for r in range(3)]


def test_one_that_ends_early_is_not_waited_for():
    turns = Turns()
    results = turns.run([lambda rounds=rounds: [turns.meet(r, doubled) for r in range(rounds)] for rounds in (0, 3, 1)])
    assert results == [[], [0, 2, 4], [0]]


def test_only_one_runs_at_a_time():
    turns, inside, seen = Turns(), [], []

    def lane():
        for _ in range(20):
            inside.append(1)
            seen.append(len(inside))
            inside.pop()
            turns.meet(0, doubled)

    turns.run([lane] * 4)
    assert set(seen) == {1}


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_ends_all_and_turns_can_be_used_again(failing):
    turns = Turns()

    def lane(index):
        turns.meet(index, doubled)
        if index == failing:
            raise ValueError("lost")
        return turns.meet(index, doubled)

    with pytest.raises(ValueError, match="lost"):
        turns.run([lambda i=i: lane(i) for i in range(3)])
    assert turns.run([lambda: turns.meet(1, doubled), lambda: turns.meet(2, doubled)]) == [2, 4]


def test_a_failure_of_what_is_done_together_is_raised():
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        turns.run([lambda: turns.meet(0, lambda values: [1 / v for v in values])] * 2)


def test_outside_of_a_run_there_is_nobody_to_wait_for():
    assert Turns().meet(3, doubled) == 6
