"""What all passes over FX graphs share: a node's operator and arguments by name, its tensor, its layer."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from na_compiler.ops.operators import OPERATORS

__all__ = [
    "Attention",
    "attentions",
    "finish",
    "graph_module",
    "layer_of",
    "operator_node",
    "propagate",
    "refresh",
    "replace_node",
    "tensor_of",
]

# Names of functions that NATTEN's own graphs call, and of their leading arguments.
_FUNCTION = re.compile(r"na([123])d")
_FUNCTION_ARGUMENTS = (
    "query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale",
    "additional_keys", "additional_values",
)  # fmt: skip
# Operators that take tensors as they are. Those of its other backends take tokens permuted into tiles.
_NATTEN = re.compile(r"(?:reference_)?na([123])d_forward")
_OURS = re.compile(r"na([123])d(_backward)?")
_DEFAULTS: dict[str, Any] = {
    "stride": 1,
    "dilation": 1,
    "is_causal": False,
    "scale": None,
    "additional_keys": None,
    "additional_values": None,
}


@dataclass(frozen=True)
class Attention:
    """A node that computes neighborhood attention, and what it is called with.

    Parameters
    ----------
    node
        The node.
    operator
        Qualified name of what it calls.
    rank
        Axes of its layout.
    direction
        ``"forward"`` or ``"backward"``.
    arguments
        By the names that our operators have.
    """

    node: fx.Node
    operator: str
    rank: int
    direction: str
    arguments: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether it calls an operator of this package."""
        return self.operator.startswith("na_compiler::")

    @property
    def returns_tuple(self) -> bool:
        """Whether it returns ``(output, lse)`` rather than the output alone."""
        return "::" in self.operator or bool(self.arguments.get("return_lse", False))


def graph_module(program: ExportedProgram | fx.GraphModule) -> fx.GraphModule:
    """Return the graph of a program.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(program, ExportedProgram):
        module: fx.GraphModule = program.graph_module
        return module
    if isinstance(program, fx.GraphModule):
        return program
    raise TypeError(f"expected an ExportedProgram or a torch.fx.GraphModule, got {type(program).__name__}")


def attentions(module: fx.GraphModule) -> Iterator[Attention]:
    """Yield the nodes that compute neighborhood attention, in order; also those inside control flow."""
    for submodule in module.modules():
        if isinstance(submodule, fx.GraphModule):
            for node in submodule.graph.nodes:
                found = _match(node)
                if found is not None:
                    yield found


def _match(node: fx.Node) -> Attention | None:
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):  # noqa: SLF001
        target = target.default
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return _match_operator(node, target)
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    found = _FUNCTION.fullmatch(name)
    if module.partition(".")[0] != "natten" or found is None:
        return None
    bound = dict(zip(_FUNCTION_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    return Attention(node, f"{module}.{name}", int(found[1]), "forward", _DEFAULTS | bound)


def _match_operator(node: fx.Node, target: Any) -> Attention | None:
    namespace, _, name = target._schema.name.partition("::")  # noqa: SLF001
    found = {"na_compiler": _OURS, "natten": _NATTEN}.get(namespace, _NEVER).fullmatch(name)
    if found is None:
        return None
    arguments = {argument.name: argument.default_value for argument in target._schema.arguments}  # noqa: SLF001
    arguments |= dict(zip(list(arguments), node.args, strict=False)) | dict(node.kwargs)
    direction = "backward" if found.re is _OURS and found[2] else "forward"
    return Attention(node, f"{namespace}::{name}", int(found[1]), direction, _DEFAULTS | arguments)


_NEVER = re.compile(r"(?!)")


def tensor_of(node: Any) -> Any:
    """Return a tensor with the shape, dtype and strides of what a node returns; ``None`` where the graph says none."""
    if not isinstance(node, fx.Node):
        return None
    for name in ("val", "example_value", "tensor_meta"):
        if name in node.meta:
            return node.meta[name]
    return None


def layer_of(node: fx.Node) -> str:
    """Return the qualified name of the module that a node came from, or else the node's own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = next(reversed(stack.values()))[0]
    # Dynamo spells it as an expression on its local variables.
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", str(path)).replace("._modules", "").replace("_modules.", "")
    path = re.sub(r"^L\.self\.?", "", path)
    return path or "(model)"


def propagate(node: fx.Node, like: fx.Node) -> None:
    """Give a new node the tensors that its operator returns for its arguments', and the origin of another."""
    node.meta = {name: like.meta[name] for name in ("nn_module_stack", "stack_trace") if name in like.meta}
    name = _kind_of_tensor(like)
    if name is not None:
        _compute(node, name)


def refresh(node: fx.Node) -> None:
    """Compute anew what a node returns, after what it is called with has changed."""
    name = _kind_of_tensor(node)
    if name is not None:
        _compute(node, name)


def _kind_of_tensor(node: fx.Node) -> str | None:
    return next((name for name in ("val", "example_value") if name in node.meta), None)


def _compute(node: fx.Node, name: str) -> None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), tensor_of)
    target: Any = node.target
    with _fake_mode((args, kwargs)) or contextlib.nullcontext():
        if node.op == "call_function":
            node.meta[name] = target(*args, **kwargs)
        elif node.op == "call_method":
            node.meta[name] = getattr(args[0], target)(*args[1:], **kwargs)


def _fake_mode(arguments: Any) -> Any:
    leaves = torch.utils._pytree.tree_leaves(arguments)  # noqa: SLF001
    return next((leaf.fake_mode for leaf in leaves if hasattr(leaf, "fake_mode")), None)


def replace_node(node: fx.Node, by: fx.Node) -> None:
    """Let another node take a node's place."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def finish(program: ExportedProgram | fx.GraphModule) -> None:
    """Check a graph that was changed, and make it what runs."""
    module = graph_module(program)
    if isinstance(program, ExportedProgram):
        # It knows its outputs by name.
        (output,) = module.graph.find_nodes(op="output")
        for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):
            if isinstance(node, fx.Node):
                spec.arg.name = node.name
    module.graph.lint()
    module.recompile()


def operator_node(graph: fx.Graph, rank: int, arguments: dict[str, Any]) -> fx.Node:
    """Make a node of our operator."""
    operator = OPERATORS[rank]
    values = [arguments[argument.name] for argument in operator._schema.arguments]  # noqa: SLF001
    while values and values[-1] is None:
        values.pop()
    return graph.call_function(operator, tuple(values))


def is_pure(target: Any) -> bool:
    """Return whether an operator computes the same from the same, with no effect besides."""
    if not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return inspect.isbuiltin(target)
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags  # noqa: SLF001
