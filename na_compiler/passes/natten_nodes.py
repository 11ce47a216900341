"""NATTEN's operators and functions in a graph, and its modules there, become our operators."""

from __future__ import annotations

import logging
import math
import operator
from typing import Any

import torch
from torch import fx

from na_compiler import operands
from na_compiler.functional import TUNING
from na_compiler.parameters import flags_per_axis, ints_per_axis
from na_compiler.passes.collect_torch import site_of
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.graph import (
    Attention,
    attempt,
    attentions,
    layer_of,
    operator_node,
    propagate,
    replace_node,
    tensor_of,
)
from na_compiler.passes.natten import convert_modules

__all__ = ["replace_natten"]

_LOG = logging.getLogger("na_compiler")
_PARAMETERS = {"kernel_size", "stride", "dilation", "is_causal", "scale"}
_TENSORS = {"query", "key", "value", "additional_keys", "additional_values"}
# Arguments of its operators that say how to compute, and not what.
_HOW = TUNING | {"kernel_schedule_int", "qkv_shape", "return_lse"}


def replace_natten(module: fx.GraphModule) -> int:
    """Replace NATTEN's operators, functions and modules in a graph by our operators; returns how many there were.

    One that ours could not compute stays as it is, with a line in the log.
    """
    _, report = convert_modules(module, strict=False)
    count = sum(what == "converted" for what in report.values())
    for found in list(attentions(module)):
        if found.is_ours or found.direction != "forward":
            continue
        try:
            _check(found)
            with attempt(found.node.graph):
                _replace(found)
            count += 1
        except DeclinedError as why:
            _LOG.info("%s: %s stays as it is: %s", layer_of(found.node, found.graph), found.operator, why)
    return count


def _check(found: Attention) -> None:
    """Decline a node that has what our operators have not."""
    arguments = found.arguments
    empty = {"num_extra_kv": 0, **operands.defaults()}
    absent = {name for name, value in arguments.items() if value is None or (name in empty and value == empty[name])}
    unknown = sorted(set(arguments) - absent - _PARAMETERS - _TENSORS - _HOW)
    need(not unknown, f"it has arguments that are not known here: {', '.join(unknown)}")
    for name in sorted(_TENSORS - absent):
        need(hasattr(tensor_of(arguments[name]), "shape"), f"the graph does not say what {name} is")
    scale = arguments["scale"]
    need(scale is None or (isinstance(scale, (int, float)) and math.isfinite(scale)), f"its scale is {scale}")
    try:
        device = site_of(found).device
    except ValueError as error:
        raise DeclinedError(str(error)) from None
    need(device in {"cpu", "cuda"}, f"kernels are for the CPU and CUDA, and it is on {device}")


def _replace(found: Attention) -> None:
    node, graph, arguments = found.node, found.node.graph, dict(found.arguments)
    arguments["kernel_size"] = list(ints_per_axis("kernel_size", arguments["kernel_size"], found.rank))
    for name in ("stride", "dilation"):
        value = arguments[name]
        arguments[name] = list(ints_per_axis(name, 1 if value is None else value, found.rank))
    causal = arguments["is_causal"]
    arguments["is_causal"] = list(flags_per_axis("is_causal", False if causal is None else causal, found.rank))
    with graph.inserting_before(node):
        tensor = tensor_of(arguments["query"])
        if arguments["scale"] is None:
            arguments["scale"] = float(tensor.shape[-1]) ** -0.5
        layout = arguments.get("qkv_shape")
        is_flat = layout is not None and len(tensor.shape) != found.rank + 3
        if is_flat:
            for name in ("query", "key", "value"):
                arguments[name] = _called(graph, "unflatten", (arguments[name], 1, list(layout or [])), node)
        made = operator_node(graph, found.rank, arguments)
        propagate(made, node)
        replacement: fx.Node = made
        if is_flat:
            for user in list(node.users):
                _use_flattened(graph, user, made, found.rank)
            graph.erase_node(node)
            return
        if not found.returns_tuple:
            replacement = graph.call_function(operator.getitem, (made, 0))
            propagate(replacement, node)
    replace_node(node, replacement)


def _use_flattened(graph: fx.Graph, user: fx.Node, made: fx.Node, rank: int) -> None:
    """Let the user of a result, ``getitem``, have it with its tokens flattened."""
    with graph.inserting_before(user):
        item = graph.call_function(operator.getitem, (made, user.args[1]))
        propagate(item, user)
        flat = _called(graph, "flatten", (item, 1, rank), user)
    replace_node(user, flat)


def _called(graph: fx.Graph, name: str, arguments: tuple[Any, ...], like: fx.Node) -> fx.Node:
    target = {"unflatten": torch.ops.aten.unflatten.int, "flatten": torch.ops.aten.flatten.using_ints}[name]
    node = graph.call_function(target, arguments)
    propagate(node, like)
    return node
