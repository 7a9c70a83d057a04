"""Dependencies point one way (CONTRIBUTING.md). Imports that run with a module count; those inside functions and for annotations do not."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "hf_he"
LAYERS = (
    {"errors", "functions", "_compat", "measurement", "turns", "secret_key"},
    {"chebyshev", "serialization", "data", "results"},
    {"approximation", "corpora", "peft"},
    {"nn"},
    {"attention", "perplexity", "evaluation"},
    {"models", "checkpoints", ""},
    {"training"},
    {"ckks"},
    {"backends"},
    {"packing", "refresh"},
    {"ops"},
    {"tensor", "autograd", "handlers"},
    {"level_search", "decoder_levels", "planner"},
    {"keys", "protocol", "remote", "flooding"},
    {"client", "server", "jobs", "service", "local_server"},
    {"finetuning", "generation", "sharding", "decoder_evaluation"},
    {"bench", "scripts", "cli", "__main__"},
)
"""Modules and packages of hf_he, lowest first; "" is hf_he itself."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ENCRYPTION = {name for names in LAYERS[RANK["ckks"] :] for name in names}
PLAIN = {"approximation", "chebyshev", "nn", "attention", "models", "training"}
REGISTRATION = ("hf_he.tensor", "hf_he.handlers")
"""What handles an operation of EncryptedTensor registers itself when that is imported."""


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(node: ast.AST, everywhere: bool = False) -> Iterator[str]:
    """Modules of hf_he that `node` imports while it runs; `everywhere`: inside functions and for annotations too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "hf_he":
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else child.module for name in names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in MODULES)
        elif everywhere or not (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _for_annotations(child)):
            yield from imports(child, everywhere)


def _for_annotations(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def layer(module: str) -> str:
    return module.removeprefix("hf_he").lstrip(".").split(".")[0]


@cache
def graph(everywhere: bool = False) -> dict[str, set[str]]:
    return {name: set(imports(ast.parse(path.read_text()), everywhere)) - {name} for name, path in MODULES.items()}


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES} <= RANK.keys()


def test_modules_import_from_their_own_layer_and_below():
    upward = [(name, used) for name, found in graph().items() for used in found if RANK[layer(used)] > RANK[layer(name)]]
    assert not upward


@pytest.mark.parametrize("package", sorted(PLAIN))
def test_models_and_what_they_are_made_of_know_nothing_of_encryption(package):
    """Not even inside a function, nor through what they import."""
    found = graph(everywhere=True)
    reached, waiting = set(), [name for name in found if layer(name) == package]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += found[name]
    assert not {layer(name) for name in reached} & ENCRYPTION


def test_no_two_modules_need_each_other():
    module, registry = REGISTRATION
    found = graph() | {module: graph()[module] - {registry}}
    try:
        tuple(TopologicalSorter(found).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")
