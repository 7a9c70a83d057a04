"""Learning rates against transformers' schedulers."""

import pytest
import torch
from transformers import get_scheduler

from hf_he.errors import ParameterError
from hf_he.finetuning.schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_transformers(schedule, warmup):
    steps, base = 11, 4e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(1, steps + 1):
        assert learning_rate(schedule, base, step, steps, warmup) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("arguments", [("polynomial", 1e-3, 1, 5), ("linear", 1e-3, 6, 5), ("linear", 1e-3, 0, 5)])
def test_unknown_schedules_and_steps_outside_the_run(arguments):
    with pytest.raises(ParameterError):
        learning_rate(*arguments)
