"""`Constants`: the values of a graph's nodes that do not depend on the program's inputs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from na_compiler.passes.graph import graph_module, is_pure, tensor_of, writes
from na_compiler.passes.masks import LARGEST

__all__ = ["Constants"]


class Constants:
    """Values of nodes that do not depend on the program's inputs.

    Parameters
    ----------
    program
        Whose nodes; only those of its outermost graph.
    held
        Inputs that are taken as constant, by the names of their nodes.
    """

    def __init__(self, program: ExportedProgram | fx.GraphModule, held: Mapping[str, torch.Tensor]) -> None:
        self.module = graph_module(program)
        self.held: dict[str, torch.Tensor] = dict(held)
        if isinstance(program, ExportedProgram):
            signature = program.graph_signature
            everything = {**program.state_dict, **program.constants}
            mutated = set(signature.buffers_to_mutate.values())
            for names in (signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants):
                for node, name in names.items():
                    if name in everything and name not in mutated:
                        self.held[node] = everything[name]
        self.values: dict[fx.Node, Any] = {}  # Whatever nodes return.
        # What something writes into, or may: all that such a value was computed from may be the same memory.
        self.written = self._before(*(node for node in self.module.graph.nodes if writes(node)))

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """Return the value of a node; ``None`` if it is no constant, or takes more memory than a mask may."""
        before = self._before(node)
        if before & self.written or not all(map(self._is_constant, before)):
            return None
        with torch.no_grad(), contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError):
            for each in self.module.graph.nodes:
                if each in before and each not in self.values:
                    self.values[each] = self._compute(each)
        value = self.values.get(node)
        return value if isinstance(value, torch.Tensor) else None

    def inputs_of(self, node: fx.Node) -> set[str]:
        """Return the names of the inputs that a node is computed from."""
        return {each.name for each in self._before(node) if each.op == "placeholder"}

    def _before(self, *nodes: fx.Node) -> set[fx.Node]:
        """Return some nodes and all that they are computed from; each is looked at once."""
        found: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += node.all_input_nodes
        return found

    def _is_constant(self, node: fx.Node) -> bool:
        described = tensor_of(node)
        if isinstance(described, torch.Tensor) and not _is_small(described):
            return False
        if node.op == "placeholder":
            return node.name in self.held and _is_plain(self.held[node.name])
        if node.op == "get_attr":
            return _is_plain(self._attribute(node))
        return node.op == "call_function" and (is_pure(node.target) or node.target is operator.getitem)

    def _attribute(self, node: fx.Node) -> object:
        value: object = self.module
        for name in str(node.target).split("."):
            value = getattr(value, name, None)
        return value

    def _compute(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            return self.held[node.name]
        if node.op == "get_attr":
            return self._attribute(node)
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        return target(*args, **kwargs)


def _is_small(tensor: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in tensor.shape) and tensor.numel() <= LARGEST


def _is_plain(value: object) -> bool:
    """Return whether it is a tensor with a value that training does not change."""
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, (torch.nn.Parameter, FakeTensor))
        and not (value.requires_grad or value.is_meta or is_traceable_wrapper_subclass(value))
    )
