"""Learning rates by step, as transformers.get_scheduler gives them: the server needs a number per step, not an optimizer object."""

from __future__ import annotations

import math

from hf_he.errors import ParameterError

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(schedule: str, base: float, step: int, steps: int, warmup_steps: int = 0) -> float:
    """The learning rate of step 1 .. `steps`: a linear rise to `base` over `warmup_steps`, then constant, linear to 0 or half a cosine to 0.

    Step s has the rate that transformers' scheduler of that name (with warm-up) has after s - 1 updates. Raises ParameterError for
    an unknown schedule or a step outside the run.
    """
    if schedule not in SCHEDULES:
        raise ParameterError(f"unknown learning-rate schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 1 <= step <= steps:
        raise ParameterError(f"step {step} is outside a run of {steps} steps: raise steps, or start a new run")
    done = step - 1
    if done < warmup_steps:
        return base * done / warmup_steps
    if schedule == "constant":
        return base
    progress = (done - warmup_steps) / max(1, steps - warmup_steps)
    return base * (1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))
