"""Query, key and value reach the kernels as views: copies on the way to one are dropped from the graph.

Kernels read tensors of any strides whose last one is 1, so a ``contiguous()`` between the fused projection and the
attention, which other kernels need, is a copy of three tensors for nothing.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator

import torch
from torch import fx

from na_compiler import operands
from na_compiler.ops.operators import OPERATORS
from na_compiler.passes.effects import writes
from na_compiler.passes.graph import attentions, refresh, tensor_of

__all__ = ["copies", "drop_copies"]

_VIEWS = {
    "alias", "chunk", "detach", "expand", "flatten", "movedim", "narrow", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view", "as_strided", "lift_fresh", "contiguous", "clone", "getitem",
}  # fmt: skip
# Of these, the ones that are views whatever strides they look at.
_ANY_STRIDES = {
    "alias", "chunk", "detach", "expand", "getitem", "movedim", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze",
}  # fmt: skip
_COPIES = {"contiguous", "clone"}
_INPUTS = tuple(operand.name for operand in operands.inputs())


def drop_copies(module: fx.GraphModule) -> int:
    """Take copies out of the way to attention, for attention only; returns how many.

    A graph that writes into tensors is left as it is: there a copy may be what keeps a value.
    """
    nodes: dict[fx.Node, None] = {}
    writing: dict[str, bool] = {}
    for attention in attentions(module):
        if attention.graph not in writing:
            writing[attention.graph] = any(map(writes, attention.node.graph.nodes))
        if attention.is_ours and attention.direction == "forward" and not writing[attention.graph]:
            for name in _INPUTS:
                nodes.update((node, None) for node in _chain(attention.arguments[name]) if _name(node) in _COPIES)
    return sum(_drop(node) for node in nodes)


def _drop(copy: fx.Node) -> bool:
    """Let the users of a copy have what it copies, if they are views of it that end in attention; returns whether."""
    source = copy.args[0]
    users = _users(copy)
    if users is None and isinstance(source, fx.Node) and _reads_rows(source):
        # Others need the copy, attention does not.
        readers = [user for user in copy.users if _is_attention(user)]
        for user in readers:
            user.replace_input_with(copy, source)
        return bool(readers)
    if users is None or not isinstance(source, fx.Node) or not isinstance(tensor_of(source), torch.Tensor):
        return False
    views, ends = users
    direct = list(copy.users)
    copy.replace_all_uses_with(source)
    for view in views:
        refresh(view)
    inputs = [argument for end in ends for argument in end.args[:3]] + [source]
    if all(_reads_rows(node) for node in inputs if isinstance(node, fx.Node) and node in {*views, source}):
        copy.graph.erase_node(copy)
        return True
    for user in direct:
        user.replace_input_with(source, copy)
    for view in views:
        refresh(view)
    return False


def _users(copy: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """Return the views of a copy, in order, and the attention they end in; ``None`` if something else needs it."""
    views: dict[fx.Node, None] = {}
    ends: dict[fx.Node, None] = {}
    pending = list(copy.users)
    while pending:
        node = pending.pop(0)
        if _is_attention(node):
            ends[node] = None
        elif _name(node) in _ANY_STRIDES:
            views[node] = None
            pending += node.users
        else:
            return None
    order = {node: place for place, node in enumerate(copy.graph.nodes)}
    return sorted(views, key=order.__getitem__), list(ends)


def _is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in OPERATORS.values()


def copies(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that copy a tensor between what computed it and attention. None is left by *canonicalise*."""
    found: dict[fx.Node, None] = {}
    for attention in attentions(module):
        if attention.is_ours and attention.direction == "forward":
            for name in _INPUTS:
                for node in _chain(attention.arguments[name]):
                    if _is_copy(node):
                        found[node] = None
    return list(found)


def _chain(node: object) -> Iterator[fx.Node]:
    """Yield the nodes that only look at a tensor otherwise, or copy it."""
    while isinstance(node, fx.Node) and _name(node) in _VIEWS:
        yield node
        node = node.args[0]


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return target._schema.name.partition("::")[2]  # noqa: SLF001
    return getattr(target, "__name__", "") if target is operator.getitem or node.op == "call_function" else ""


def _is_copy(node: fx.Node) -> bool:
    name = _name(node)
    if name in _COPIES:
        source = tensor_of(node.args[0])
        return name == "clone" or not isinstance(source, torch.Tensor) or not source.is_contiguous()
    if name in {"reshape", "flatten"}:
        source, result = tensor_of(node.args[0]), tensor_of(node)
        if isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor):
            return not _is_view(source, result)
    return False


def _is_view(source: torch.Tensor, result: torch.Tensor) -> bool:
    """Return whether a tensor can be looked at in another shape; False where that depends on what is not known."""
    environment = getattr(getattr(source, "fake_mode", None), "shape_env", None)
    # Asking must not make sizes that are free any less so.
    with environment.suppress_guards() if environment is not None else contextlib.nullcontext():
        try:
            source.view(result.shape)
        except (RuntimeError, ValueError):  # The latter is what fake tensors raise.
            return False
    return True


def _reads_rows(node: fx.Node) -> bool:
    """Return whether the last stride is 1, as kernels need it."""
    tensor = tensor_of(node)
    return isinstance(tensor, torch.Tensor) and tensor.stride(-1) == 1
