"""Keys and values that are repeated for the heads of a group are read where they were before they were repeated."""

from __future__ import annotations

import operator

import torch
from torch import fx

from na_compiler.passes.effects import name_of
from na_compiler.passes.graph import propagate, same_size, tensor_of

__all__ = ["unrepeated"]

_COPIES = {"clone", "contiguous"}
_RESHAPES = {"_unsafe_view", "flatten", "reshape", "view"}


def unrepeated(key: fx.Node, value: fx.Node, axis: int) -> tuple[fx.Node, fx.Node] | None:
    """Return key and value before each head was repeated, all of them as often; ``None`` where they are not.

    Parameters
    ----------
    key, value
        Their nodes, of four dimensions or more.
    axis
        Which dimension has the heads.

    Notes
    -----
    Known are ``repeat_interleave`` and ``x.unsqueeze(axis + 1).expand(...).reshape(...)``, which is what models of
    transformers do, also before heads and tokens are transposed. Nodes that only transpose are made anew.
    """
    found = [_source(node, axis) for node in (key, value)]
    if None in found:
        return None
    (one, key_axis), (other, value_axis) = found  # type: ignore[misc]
    heads = [tensor_of(node).shape[dim] for node, dim in ((one, key_axis), (other, value_axis))]
    if not same_size(*heads):
        return None
    return _turned(one, key_axis, axis, key), _turned(other, value_axis, axis, value)


def _source(node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Return what has each head once, and which dimension its heads are in."""
    turned = False
    while True:
        name, before = name_of(node), node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or not _is_known(before) or not _is_known(node):
            return None
        if name in _COPIES:
            node = before
        elif name in {"transpose", "swapaxes"} and not turned and _swaps(node, axis):
            node, axis, turned = before, 3 - axis, True
        else:
            break
    if name == "repeat_interleave":
        arguments = dict(zip(("self", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
        repeats, dim = arguments.get("repeats"), arguments.get("dim")
        plain = type(repeats) is int and type(dim) is int and not set(arguments) - {"self", "repeats", "dim"}
        return (before, axis) if plain and dim % tensor_of(node).dim() == axis else None
    if name not in _RESHAPES:
        return None
    return _expanded(node, before, axis)


def _expanded(reshaped: fx.Node, expand: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Return the source of ``x.unsqueeze(axis + 1).expand(...).reshape(...)``."""
    unsqueeze = expand.args[0] if expand.args else None
    source = unsqueeze.args[0] if isinstance(unsqueeze, fx.Node) and unsqueeze.args else None
    if name_of(expand) != "expand" or not isinstance(unsqueeze, fx.Node) or not isinstance(source, fx.Node):
        return None
    if not (_is_known(unsqueeze) and _is_known(source) and _inserts(unsqueeze)):
        return None
    shape, one, many, result = (list(tensor_of(each).shape) for each in (source, unsqueeze, expand, reshaped))
    repeats = many[axis + 1] if len(many) > axis + 1 else None
    heads = shape[axis]
    if type(repeats) is not int or type(heads) is not int:
        return None
    # Elements keep their order in all three, so that the shapes say what they do.
    wanted = (
        [*shape[: axis + 1], 1, *shape[axis + 1 :]],
        [*shape[: axis + 1], repeats, *shape[axis + 1 :]],
        [*shape[:axis], heads * repeats, *shape[axis + 1 :]],
    )
    for found, expected in zip((one, many, result), wanted, strict=True):
        if len(found) != len(expected) or not all(map(same_size, found, expected)):
            return None
    return source, axis


def _inserts(node: fx.Node) -> bool:
    """Return whether a node inserts dimensions of one element and does nothing else."""
    if name_of(node) == "unsqueeze":
        return True
    index = node.args[1] if node.target is operator.getitem else ()
    items = index if isinstance(index, tuple) else (index,)
    return bool(items) and all(item is None or item is Ellipsis or item == slice(None) for item in items)


def _swaps(node: fx.Node, axis: int) -> bool:
    """Return whether a node swaps the second and the third of four dimensions, of which one has the heads."""
    dims = [*node.args[1:], *node.kwargs.values()]
    return (
        axis in {1, 2}
        and tensor_of(node).dim() == 4
        and len(dims) == 2
        and all(type(dim) is int for dim in dims)
        and {dim % 4 for dim in dims} == {1, 2}  # type: ignore[operator]
    )


def _turned(node: fx.Node, have: int, want: int, before: fx.Node) -> fx.Node:
    if have == want:
        return node
    with node.graph.inserting_before(before):
        made = node.graph.call_function(torch.ops.aten.transpose.int, (node, have, want))
    propagate(made, before)
    return made


def _is_known(node: fx.Node) -> bool:
    return isinstance(tensor_of(node), torch.Tensor)
