"""All kernels of the engine that Python calls, and other functions in their place."""

import sys

from numba.core.dispatcher import Dispatcher

from hf_he.ckks import keyswitch, random, warmup

INNER = {keyswitch.mod_up, keyswitch._lift}
"""Called by other kernels only."""


def modules():
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{warmup.__package__}.")]


def called(kernel):
    """Whether Python calls it."""
    return kernel not in INNER and (kernel.targetoptions.get("parallel", False) or kernel.py_func.__module__ == random.__name__)


KERNELS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in modules()
    for name, value in sorted(vars(module).items())
    if isinstance(value, Dispatcher) and value.py_func.__module__ == module.__name__ and called(value)
}


def substitute(patch, others):
    """Let every module find `others` of KERNELS' names in the kernels' place; compile before, compilation looks kernels up by name."""
    for full_name, kernel in KERNELS.items():
        name = full_name.rpartition(".")[2]
        for user in modules():
            if vars(user).get(name) is kernel:
                patch.setattr(user, name, others[full_name])
