"""What all passes over FX graphs share: a node's operator and arguments by name, its tensor, its layer."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from na_compiler import operands
from na_compiler.ops.operators import OPERATORS
from na_compiler.ops.schema import FORWARD
from na_compiler.passes.decline import DeclinedError

__all__ = [
    "Attention",
    "attempt",
    "attentions",
    "fake_mode_of",
    "finish",
    "graph_module",
    "graph_modules",
    "layer_of",
    "operator_node",
    "propagate",
    "range_of",
    "refresh",
    "replace_node",
    "same_size",
    "tensor_of",
    "without_defaults",
]

# NATTEN's functions and operators are known by their names and signatures, as it may be loaded under any name.
_FUNCTION = re.compile(r"na([123])d")
# Operators that take tensors as they are. Those of its other backends take tokens permuted into tiles.
_NATTEN = re.compile(r"(?:reference_)?na([123])d_forward")
# What all of these take, in this order: what ours take that has to be given.
_SIGNATURE = FORWARD.names[: FORWARD.later]
_OURS = re.compile(r"na([123])d(?:_(backward|tangent))?")
_DEFAULTS: dict[str, Any] = {
    "stride": 1,
    "dilation": 1,
    "is_causal": False,
    "scale": None,
    **{operand.name: operand.default for operand in operands.later()},
}


@dataclass(frozen=True)
class Attention:
    """A node that computes neighborhood attention, and what it is called with.

    Parameters
    ----------
    node
        The node.
    graph
        Qualified name of the graph module that it is in, as the outermost one has it, and ``""`` for that: nodes of
        different graphs may have one name.
    operator
        Qualified name of what it calls.
    rank
        Axes of its layout.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    arguments
        By the names that our operators have.
    """

    node: fx.Node
    graph: str
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
    for path, submodule in graph_modules(module):
        for node in submodule.graph.nodes:
            found = _match(node, path)
            if found is not None:
                yield found


def graph_modules(module: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield a graph module and those inside it, the bodies of control flow, by their qualified names."""
    for path, submodule in module.named_modules():
        if isinstance(submodule, fx.GraphModule):
            yield path, submodule


def _match(node: fx.Node, path: str) -> Attention | None:
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):  # noqa: SLF001
        target = target.default
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return _match_operator(node, path, target)
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    found = _FUNCTION.fullmatch(name)
    if found is None:
        return None
    try:
        signature = inspect.signature(target)  # type: ignore[arg-type]
        bound = dict(signature.bind_partial(*node.args, **node.kwargs).arguments)
    except (TypeError, ValueError):
        return None
    if tuple(signature.parameters)[: len(_SIGNATURE)] != _SIGNATURE:
        return None
    return Attention(node, path, f"{module}.{name}", int(found[1]), "forward", _DEFAULTS | bound)


def _match_operator(node: fx.Node, path: str, target: torch._ops.OpOverload) -> Attention | None:
    namespace, _, name = target._schema.name.partition("::")  # noqa: SLF001
    found = (_OURS if namespace == "na_compiler" else _NATTEN).fullmatch(name)
    if found is None:
        return None
    if found.re is _NATTEN and not _is_nattens(target._schema):  # noqa: SLF001
        return None
    arguments: dict[str, Any] = {argument.name: argument.default_value for argument in target._schema.arguments}  # noqa: SLF001
    arguments |= dict(zip(list(arguments), node.args, strict=False)) | dict(node.kwargs)
    direction = (found[2] if found.re is _OURS else None) or "forward"
    if found.re is _OURS:  # Flags are ints to our operators, and were bools in programs of before.
        arguments["is_causal"] = list(map(bool, arguments["is_causal"]))
    return Attention(node, path, f"{namespace}::{name}", int(found[1]), direction, _DEFAULTS | arguments)


def _is_nattens(schema: torch.FunctionSchema) -> bool:
    """Return whether an operator takes what NATTEN's take, and returns an output and its lse."""
    names = tuple(argument.name for argument in schema.arguments)
    returns = [str(value.type) for value in schema.returns]
    return names[: len(_SIGNATURE)] == _SIGNATURE and returns == ["Tensor", "Tensor"] and not schema.is_mutable


def tensor_of(node: object) -> Any:  # noqa: ANN401 - a tensor, or a TensorMetadata that has the same fields
    """Return a tensor with the shape, dtype and strides of what a node returns; ``None`` where the graph says none."""
    if not isinstance(node, fx.Node):
        return None
    for name in ("val", "example_value", "tensor_meta"):
        if name in node.meta:
            return node.meta[name]
    return None


def layer_of(node: fx.Node, graph: str = "") -> str:
    """Return the qualified name of the module that a node came from, or else its graph's and its own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return f"{graph}.{node.name}" if graph else node.name
    path = next(reversed(stack.values()))[0]
    # Dynamo spells it as an expression on its local variables.
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", str(path)).replace("._modules", "").replace("_modules.", "")
    path = re.sub(r"^L\.self\.?", "", path)
    return path or "(model)"


def same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Return whether two sizes are known to be the same, without making a graph's symbols any less free."""
    if isinstance(one, int) or isinstance(other, int):
        return isinstance(one, int) and isinstance(other, int) and one == other
    return bool(one.node.expr == other.node.expr)


def range_of(size: torch.SymInt) -> tuple[int, int]:
    """Return the least and the largest value that a size may have; the latter is very large where it has no bound."""
    found = size.node.shape_env.bound_sympy(size.node.expr)
    lowest, highest = (int(each) if each.is_Integer else None for each in (found.lower, found.upper))
    return (0 if lowest is None else lowest), (1 << 62 if highest is None else highest)


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
    with fake_mode_of((args, kwargs)) or contextlib.nullcontext():
        if node.op == "call_function":
            node.meta[name] = target(*args, **kwargs)
        elif node.op == "call_method":
            node.meta[name] = getattr(args[0], target)(*args[1:], **kwargs)


def fake_mode_of(arguments: object) -> FakeTensorMode | None:
    """Return the mode that the first fake tensor among some belongs to; ``None`` where there is none."""
    leaves = torch.utils._pytree.tree_leaves(arguments)  # noqa: SLF001
    return next((leaf.fake_mode for leaf in leaves if hasattr(leaf, "fake_mode")), None)


@contextlib.contextmanager
def attempt(graph: fx.Graph) -> Iterator[None]:
    """Take back nodes that are made within, where what they compute turns out to be none of ours.

    Raises
    ------
    DeclinedError
        In place of what was raised.
    """
    before = set(graph.nodes)
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        for node in reversed(list(graph.nodes)):
            if node not in before:
                graph.erase_node(node)
        raise DeclinedError(str(error).partition("\n")[0]) from error


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
    for _, submodule in graph_modules(module):
        submodule.graph.lint()
        submodule.recompile()


def operator_node(graph: fx.Graph, rank: int, arguments: dict[str, Any]) -> fx.Node:
    """Make a node of our operator; what may be left out is, where it is not there or its default."""
    return graph.call_function(OPERATORS[rank], without_defaults(FORWARD.names, arguments))


def without_defaults(names: Sequence[str], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return arguments in the order of names, without the last ones that may be left out and are their default."""
    later = {operand.name: operand.default for operand in operands.later()}
    values = [arguments.get(name, later[name]) if name in later else arguments[name] for name in names]
    while names[len(values) - 1] in later and values[-1] == later[names[len(values) - 1]]:
        values.pop()
    return tuple(values)
