"""Imports point one way: down a list of layers, and nowhere in a circle. Imports within functions count as well."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each line may import from itself and from the lines above it. What is on one line is side by side: a folder or module
# there imports nothing of its neighbours.
LAYERS = """
    window workspace
    counting
    operands
    checks
    problem
    reference tensorir
    devices
    target
    runtime
    schedules
    compiler
    ops
    bound after_torch
    functional
    modules
    onnx
    passes
    aot whole compat integrations distributed
    cli
"""
HEIGHT = {name: height for height, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}


def sources():
    """Every module by its name, with its path."""
    found = {}
    for folder, package in ((ROOT / "na_compiler", "na_compiler"), (ROOT / "schedules", "na_compiler.schedules")):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def running(node):
    """A tree's nodes, without those that only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from running(child)


def imports(module, path, modules):
    """The modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name in modules}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            if node.module in modules:
                names = (f"{node.module}.{name.name}" for name in node.names)
                found |= {name if name in modules else node.module for name in names}
    return found - {module}


@pytest.fixture(scope="module")
def graph():
    modules = sources()
    return {module: imports(module, path, modules) for module, path in modules.items()}


def layer(module):
    name = module.split(".")[1]
    assert name in HEIGHT, f"{name} is new: give it a place in LAYERS, and in the README's list"
    return name


def test_imports_point_down(graph):
    wrong = []
    for module, imported in graph.items():
        # The package itself has the version, and what of it is imported when it is first asked for.
        for other in imported if module != "na_compiler" else ():
            if other != "na_compiler" and layer(module) != layer(other):
                is_down = HEIGHT[layer(other)] < HEIGHT[layer(module)]
                wrong += [] if is_down else [f"{module} imports {other}, which is not below it"]
    assert not wrong


def test_nothing_imports_in_a_circle(graph):
    # Parts of one operator, of one kernel: each pair is one thing in two files, until it is taken apart.
    pairs = [
        {"na_compiler.ops.func", "na_compiler.ops.operators"},
        {"na_compiler.schedules.sm90.config", "na_compiler.schedules.sm90.plan"},
    ]
    left = {
        module: {other for other in imported if other != "na_compiler" and {module, other} not in pairs}
        for module, imported in graph.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(left).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_list_names_every_part(graph):
    assert {"tensorir", "devices", "schedules", "cli"} < {layer(module) for module in graph if "." in module}
    assert len(graph) > 100
