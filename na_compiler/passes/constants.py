"""`Constants`: the values of a graph's nodes that do not depend on the program's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.effects import (
    asks_for_dtype,
    asks_only,
    is_pure,
    shares_memory_with,
    writes,
    writes_constantly,
    written_by,
)
from na_compiler.passes.graph import graph_module, tensor_of
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
        # Dynamo checks what is found out here about sizes before each call; an exported program keeps its promises.
        self.may_guard = not isinstance(program, ExportedProgram)
        self.held: dict[str, torch.Tensor] = dict(held)
        if isinstance(program, ExportedProgram):
            signature = program.graph_signature
            everything = {**program.state_dict, **program.constants}
            mutated = set(signature.buffers_to_mutate.values())
            for names in (signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants):
                for node, name in names.items():
                    if name in everything and name not in mutated:
                        self.held[node] = everything[name]
        self.place = {node: place for place, node in enumerate(self.module.graph.nodes)}
        # What is written into, and may have one memory with other nodes.
        self.writes = {node: _memory(written_by(node)) for node in self.place if writes(node)}

    def value(self, node: fx.Node, at: fx.Node) -> torch.Tensor:
        """Return the value of a node.

        Parameters
        ----------
        node
            Whose value.
        at
            The node that reads it: what is written later has no effect on it.

        Raises
        ------
        DeclinedError
            If it is no constant, or takes more memory than a mask may; says why.
        """
        needed = self.needed(node, at)
        for each in needed:
            self._check(each)
        try:
            with torch.no_grad():
                value = self._run(sorted(needed, key=self.place.__getitem__), node)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            raise DeclinedError(f"its mask cannot be computed here: {str(error).partition(chr(10))[0]}") from error
        if not isinstance(value, torch.Tensor):
            raise DeclinedError("its mask is no tensor")
        return value

    def needed(self, node: fx.Node, at: fx.Node) -> set[fx.Node]:
        """Return what a node's value is computed from, itself and what is written into any of it before among them."""
        found = _before([node])
        pending = {write: memory for write, memory in self.writes.items() if self.place[write] < self.place[at]}
        while True:
            more = [write for write, memory in pending.items() if memory & found]
            if not more:
                return found
            for write in more:
                del pending[write]
            found |= _before(more)

    def key(self, node: fx.Node, at: fx.Node) -> tuple[fx.Node, frozenset[fx.Node]]:
        """Return what a value is the same for; see `value`.

        A view and what it is a view of need the same nodes where one of them is written into, and are not the same.
        """
        return node, frozenset(self.needed(node, at))

    def inputs_of(self, node: fx.Node, at: fx.Node) -> set[str]:
        """Return the names of the inputs that a node is computed from; see `value`."""
        return {each.name for each in self.needed(node, at) if each.op == "placeholder"}

    def _check(self, node: fx.Node) -> None:
        described = tensor_of(node)
        if isinstance(described, torch.Tensor):
            fixed = all(isinstance(size, int) for size in described.shape)
            need(fixed, f"its mask depends on a size that is dynamic, in {node.name}")
            need(described.numel() <= LARGEST, f"its mask is too large to look at, in {node.name}")
        if node.op in {"placeholder", "get_attr"}:
            is_held = node.name in self.held if node.op == "placeholder" else True
            need(is_held, f"its mask depends on the input {node.name}")
            need(_is_plain(self._leaf(node)), f"its mask depends on {node.name}, which is no constant")
            # Also after it was read: then it is another in the next call.
            is_written = any(node in memory for memory in self.writes.values())
            need(not is_written, f"its mask depends on {node.name}, which is written to")
            return
        known = is_pure(node) or writes_constantly(node) or asks_only(node)
        need(known, f"its mask depends on {node.name}, which is not known to give the same each time")

    def _leaf(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            return self.held[node.name]
        value: object = self.module
        for name in str(node.target).split("."):
            value = getattr(value, name, None)
        return value

    def _run(self, nodes: Iterable[fx.Node], wanted: fx.Node) -> object:
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            if node.op in {"placeholder", "get_attr"}:
                values[node] = self._leaf(node)
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: values.get(each, each))
            if asks_only(node):  # Of a tensor that has a value only when the model runs.
                args = (_stand_in(node, args[0]), *args[1:])
            target: Any = node.target
            values[node] = (
                getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
            )
        return values[wanted]


def _before(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return some nodes and all that they are computed from; each is looked at once."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            asked = node.args[0] if asks_only(node) else None
            pending += [each for each in node.all_input_nodes if each is not asked]
    return found


def _memory(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return some nodes and those that may be views of the same memory, or what it came from."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += shares_memory_with(node)
    return found


def _stand_in(asking: fx.Node, tensor: object) -> torch.Tensor:
    """Return a tensor like the one that a node asks something of, without memory for its elements."""
    described = tensor_of(tensor) if isinstance(tensor, fx.Node) else tensor
    if not isinstance(described, torch.Tensor):
        raise DeclinedError(f"its mask is made like a tensor that is not known, in {asking.name}")
    one = torch.zeros((), dtype=described.dtype, device=described.device)
    if asks_for_dtype(asking):
        return one
    fixed = all(isinstance(size, int) for size in described.shape)
    need(fixed, f"its mask depends on a size that is dynamic, in {asking.name}")
    return one.expand(described.shape)


def _is_plain(value: object) -> bool:
    """Return whether it is a tensor with a value that training does not change."""
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, (torch.nn.Parameter, FakeTensor))
        and not (value.requires_grad or value.is_meta or is_traceable_wrapper_subclass(value))
    )
