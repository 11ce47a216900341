"""Imports point one way: down a list of layers, and nowhere in a circle. Imports within functions count as well."""

from __future__ import annotations

import graphlib

import imports
import pytest

from na_compiler.schedules.choose import FAMILIES

# Each line may import from itself and from the lines above it. What is on one line is side by side: a folder or module
# there imports nothing of its neighbours.
LAYERS = """
    window workspace timing
    counting
    borders operands
    checks
    parameters
    problem
    place
    reference tensorir
    devices
    target
    runtime
    schedules
    compiler
    ops
    bound after_torch traced
    functional
    modules
    onnx
    passes
    aot whole compat integrations distributed tuning
    cli
"""
HEIGHT = {name: height for height, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}


@pytest.fixture(scope="module")
def graph():
    return imports.graph()


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
    # The package itself has the version, and what of it is imported when it is first asked for.
    left = {module: imported - {"na_compiler"} for module, imported in graph.items()}
    try:
        tuple(graphlib.TopologicalSorter(left).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_familys_modules_are_its_own(graph):
    """Nothing else imports them, no other family either: without its folder and its line in `choose` all is well."""
    for name in FAMILIES:
        prefix = f"na_compiler.schedules.{name}"
        inside = {module for module in graph if f"{module}.".startswith(f"{prefix}.")}
        assert f"{prefix}.family" in inside
        outside = {module: imported & inside for module, imported in graph.items() if module not in inside}
        assert {module: found for module, found in outside.items() if found} == {}


def test_the_list_names_every_part(graph):
    assert {"tensorir", "devices", "schedules", "cli"} < {layer(module) for module in graph if "." in module}
    assert len(graph) > 100
