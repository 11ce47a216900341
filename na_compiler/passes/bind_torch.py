"""*bind*: nodes call a compiled kernel by its key, and fail loudly where it is missing.

Without this pass an operator looks for a kernel for the shapes it meets, and compiles one where there is none. A
bound node never does: it is for programs that have to be deployed with exactly the kernels they were tested with.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

import na_compiler.bound  # noqa: F401 - registers the operator
from na_compiler.compiler.spec import KernelSpec
from na_compiler.ops.schema import BOUND
from na_compiler.passes.collect_torch import site_of
from na_compiler.passes.graph import (
    attentions,
    finish,
    graph_module,
    graph_modules,
    operator_node,
    propagate,
    replace_node,
    without_defaults,
)
from na_compiler.target import Target

__all__ = ["bind", "unbind"]


def bind(program: ExportedProgram | fx.GraphModule, target: str | Target = "llvm") -> int:
    """Let every forward in a graph call its kernel by key.

    Parameters
    ----------
    program
        Changed in place.
    target
        The machine that it will run on.

    Returns
    -------
    int
        How many nodes were bound.

    Raises
    ------
    ValueError
        If a layout is dynamic: it has no one kernel.
    """
    module = graph_module(program)
    ours = [found for found in attentions(module) if found.is_ours and found.direction == "forward"]
    bound = [(found, site_of(found)) for found in ours]
    for _, site in bound:
        changing = [name for name in site.dynamic if name.startswith("layout")]
        if changing or site.problem is None:
            raise ValueError(f"{site.layer} cannot be bound: its {', '.join(changing)} is dynamic")
    count = 0
    for found, site in bound:
        problem = site.problem
        assert problem is not None
        node, arguments = found.node, found.arguments
        key = KernelSpec.make(problem, target).key
        values = without_defaults(BOUND.names, {**arguments, "kernel": key})
        with node.graph.inserting_before(node):
            made = node.graph.call_function(torch.ops.na_compiler.bound.default, values)
            propagate(made, node)
        replace_node(node, made)
        count += 1
    finish(program)
    return count


def unbind(program: ExportedProgram | fx.GraphModule) -> int:
    """Undo `bind`; returns how many nodes there were."""
    module = graph_module(program)
    nodes = [
        node
        for _, submodule in graph_modules(module)
        for node in submodule.graph.find_nodes(op="call_function", target=torch.ops.na_compiler.bound.default)
    ]
    for node in nodes:
        arguments = BOUND.by_name(node.args)
        with node.graph.inserting_before(node):
            made = operator_node(node.graph, len(arguments["kernel_size"]), arguments)
            propagate(made, node)
        replace_node(node, made)
    finish(program)
    return len(nodes)
