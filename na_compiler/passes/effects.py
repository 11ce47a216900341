"""What a node of a graph does besides computing its result: whether it writes, is random, or shares memory."""

from __future__ import annotations

import functools
import inspect
import operator

import torch
from torch import fx

__all__ = [
    "asks_for_dtype",
    "asks_only",
    "is_pure",
    "name_of",
    "shares_memory_with",
    "writes",
    "writes_constantly",
    "written_by",
]

# What these return is whatever the memory held.
_UNDEFINED = {
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize", "resize_as",
    "set",
}  # fmt: skip
# Of module operator.
_IN_PLACE = {
    "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
    "isub", "itruediv", "ixor", "setitem",
}  # fmt: skip
_BUILTINS = {"abs", "len", "max", "min", "pow", "round", "sum"}
# Methods of tensors that are no operators of their names.
_METHODS = {
    "bfloat16", "bool", "cpu", "cuda", "dim", "double", "float", "half", "int", "long", "ndimension", "short", "size",
    "type",
}  # fmt: skip
# These ask their first argument for its shape, dtype or device, and never for its elements.
_ASKING = {
    "dim", "full_like", "new_full", "new_ones", "new_zeros", "ndimension", "numel", "ones_like", "size", "zeros_like",
}  # fmt: skip
# Composite operators whose results are memory of their own. Others may return what they are given, as `dropout` does.
_FRESH = {"conv1d", "conv2d", "conv3d", "layer_norm", "linear", "matmul", "rms_norm", "scaled_dot_product_attention"}


def is_pure(node: fx.Node) -> bool:
    """Return whether a node computes the same from the same, with no effect besides; False where unknown."""
    if node.op == "call_method":
        name = str(node.target)
        return name in _METHODS or _is_pure_aten(name)
    return node.op == "call_function" and (node.target is operator.getitem or _is_pure_function(node.target))


def _is_pure_function(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return _is_pure_operator(target)
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None)
    if not inspect.isbuiltin(target):
        return False
    if module in {"_operator", "math"}:
        return not _is_in_place(target)
    if module == "builtins":
        return name in _BUILTINS
    # One of torch's functions, as Dynamo's graphs call them: some are random, some write into what they are given.
    return (module is None or module.startswith("torch")) and _is_pure_aten(name)


def _is_pure_operator(target: torch._ops.OpOverload) -> bool:
    name = target._schema.name.partition("::")[2]  # noqa: SLF001
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return not target._schema.is_mutable and not is_random and name not in _UNDEFINED  # noqa: SLF001


@functools.cache
def _is_pure_aten(name: str) -> bool:
    """Return whether all overloads of a name that write into no argument are pure, and there are any."""
    plain = [overload for overload in _overloads(name) if not overload._schema.is_mutable]  # noqa: SLF001
    return bool(plain) and all(map(_is_pure_operator, plain))


def _overloads(name: str) -> list[torch._ops.OpOverload]:
    packet = getattr(torch.ops.aten, name, None)
    found = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    # Of TorchScript's numbers and lists, some have the names of operators and are none.
    return [overload for overload in found if torch._C._dispatch_has_kernel(overload.name())]  # noqa: SLF001


def writes(node: fx.Node) -> bool:
    """Return whether a node writes into a tensor that it is given."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return bool(target._schema.is_mutable)  # noqa: SLF001
    name = name_of(node)
    if node.op == "call_function" and getattr(target, "__module__", "") in {"_operator", "operator"}:
        return _is_in_place(target)
    if isinstance(target, torch._ops.HigherOrderOperator):  # noqa: SLF001
        return "mutat" in name
    if "out" in node.kwargs or (node.op == "call_method" and name.strip("_") in _IN_PLACE and name.endswith("__")):
        return True
    return node.op in {"call_function", "call_method"} and name.endswith("_") and not name.startswith("_")


def writes_constantly(node: fx.Node) -> bool:
    """Return whether a node writes into its first argument only, and what it writes follows from its arguments."""
    if not writes(node) or "out" in node.kwargs:
        return False
    name = name_of(node)
    if node.target is operator.setitem:
        return True
    if node.op == "call_function" and _is_in_place(node.target):
        return name in _IN_PLACE
    return name.endswith("_") and not name.startswith("_") and _is_pure_aten(name[:-1])


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a node writes into, or may."""
    if writes_constantly(node):
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    return list(node.all_input_nodes)


def shares_memory_with(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose memory a node's result may share."""
    if asks_only(node):
        return []
    if isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001
        overloads = [node.target]
    elif node.op == "call_method" or (node.op == "call_function" and inspect.isbuiltin(node.target)):
        overloads = [overload for overload in _overloads(name_of(node)) if not overload._schema.is_mutable]  # noqa: SLF001
    else:
        overloads = []
    return [] if overloads and all(map(_is_fresh, overloads)) else list(node.all_input_nodes)


def _is_fresh(overload: torch._ops.OpOverload) -> bool:
    """Return whether an operator returns memory of its own, always."""
    schema = overload._schema  # noqa: SLF001
    if schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
        return False
    is_composite = overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)  # noqa: SLF001
    return not is_composite or schema.name.partition("::")[2] in _FRESH


def asks_only(node: fx.Node) -> bool:
    """Return whether a node asks its first argument for its shape, dtype or device, and never for its elements."""
    return node.op in {"call_function", "call_method"} and name_of(node) in _ASKING and bool(node.args)


def asks_for_dtype(node: fx.Node) -> bool:
    """Return whether a node that `asks_only` does so for dtype and device alone."""
    return name_of(node).startswith("new_")


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls; with its place, if that is none of torch's."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return str(target._schema.name).removeprefix("aten::")  # noqa: SLF001
    if node.op == "call_method":
        return str(target)
    name = getattr(target, "__name__", "")
    return name if inspect.isbuiltin(target) else f"{getattr(target, '__module__', None)}.{name}"


def _is_in_place(target: object) -> bool:
    return getattr(target, "__name__", "") in _IN_PLACE and getattr(target, "__module__", "") in {
        "_operator",
        "operator",
    }
