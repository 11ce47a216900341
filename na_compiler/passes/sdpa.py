"""Attention with a constant mask that is exactly a neighborhood becomes neighborhood attention."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.nn import functional

from na_compiler.passes.constants import Constants
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.graph import (
    attempt,
    graph_module,
    graph_modules,
    layer_of,
    operator_node,
    propagate,
    replace_node,
    same_size,
    tensor_of,
)
from na_compiler.passes.masks import LARGEST, Mask, Neighborhood, mask_of_bias, recognize
from na_compiler.problem import DTYPES, LONGEST_HEAD

__all__ = ["replace_sdpa"]

_LOG = logging.getLogger("na_compiler")
_ARGUMENTS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def replace_sdpa(
    program: ExportedProgram | fx.GraphModule,
    held: Mapping[str, torch.Tensor] | None = None,
    used: set[str] | None = None,
) -> int:
    """Replace scaled_dot_product_attention whose mask is a constant neighborhood; returns how many there were.

    Parameters
    ----------
    program
        Changed in place.
    held
        Inputs that are taken as constant, by the names of their nodes.
    used
        Gets the names of those that masks were made of.
    """
    module = graph_module(program)
    constants = Constants(program, held or {})
    known: dict[fx.Node, Neighborhood | None] = {}
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _is_sdpa(node.target):
            continue
        arguments = _arguments(node)
        mask = arguments["attn_mask"]
        if not isinstance(mask, fx.Node):
            continue
        try:
            if mask not in known:
                known[mask] = _neighborhood(constants, mask)
            neighborhood = known[mask]
            need(neighborhood is not None, "its mask is no neighborhood, or not constant")
            assert neighborhood is not None
            _check(arguments, math.prod(neighborhood.layout))
            with attempt(node.graph):
                _replace(node, arguments, neighborhood)
        except DeclinedError as why:
            _LOG.info("%s: attention with a mask stays as it is: %s", layer_of(node), why)
            continue
        _LOG.info("%s: its mask is a neighborhood, %s", layer_of(node), neighborhood)
        count += 1
        if used is not None:
            used |= constants.inputs_of(mask) & set(held or ())
    if count:
        module.graph.eliminate_dead_code()
    _tell_of_branches(module)
    return count


def _tell_of_branches(module: fx.GraphModule) -> None:
    """Say that attention inside control flow stays as it is: what is constant there is not known in its graph."""
    for path, branch in graph_modules(module):
        for node in branch.graph.nodes if path else ():
            if node.op == "call_function" and _is_sdpa(node.target) and _arguments(node)["attn_mask"] is not None:
                _LOG.info(
                    "%s: attention with a mask stays as it is: it is inside control flow (%s), where its mask is an "
                    "input and no constant",
                    layer_of(node), path,
                )  # fmt: skip


def _is_sdpa(target: object) -> bool:
    return target is functional.scaled_dot_product_attention or (
        isinstance(target, torch._ops.OpOverload)  # noqa: SLF001
        and target._schema.name == "aten::scaled_dot_product_attention"  # noqa: SLF001
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return what attention is called with, by name; what has no name here gets a number, and is refused later."""
    names = [*_ARGUMENTS, *map(str, range(len(node.args)))]
    return _ARGUMENTS | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _check(arguments: dict[str, Any], tokens: int) -> None:
    """Decline attention with a neighborhood for a mask that our operators could not compute."""
    unknown = sorted(set(arguments) - set(_ARGUMENTS))
    need(not unknown, f"it has arguments that are not known here: {', '.join(unknown)}")
    need(arguments["dropout_p"] == 0, "it has dropout")
    need(arguments["is_causal"] is False, "it is causal besides its mask")
    is_grouped, scale = arguments["enable_gqa"], arguments["scale"]
    need(isinstance(is_grouped, bool), "enable_gqa is not a constant")
    need(scale is None or (isinstance(scale, (int, float)) and math.isfinite(scale)), f"its scale is {scale}")
    tensors = [tensor_of(arguments[name]) for name in ("query", "key", "value")]
    known = all(isinstance(tensor, torch.Tensor) and tensor.dim() == 4 for tensor in tensors)
    need(known, "query, key and value are not known to be [batch, heads, tokens, head_dim]")
    _check_tensors(tensors, tokens, is_grouped)


def _check_tensors(tensors: list[torch.Tensor], tokens: int, is_grouped: bool) -> None:
    query, key, value = tensors
    for one in tensors:
        same = one.dtype == query.dtype and one.device == query.device and one.layout is torch.strided
        need(same, "query, key and value differ in dtype or device, or are not dense")
        need(same_size(one.shape[0], query.shape[0]), "query, key and value are not known to have one batch")
        need(same_size(one.shape[2], tokens), f"query, key and value have not the {tokens} tokens of the mask")
        fixed = all(isinstance(size, int) and size > 0 for size in (one.shape[1], one.shape[3]))
        need(fixed, "heads or head_dim are dynamic, or 0")
    dtype, device = str(query.dtype).removeprefix("torch."), query.device.type
    need(dtype in DTYPES, f"kernels compute in {', '.join(DTYPES)}, and it is in {dtype}")
    need(device in {"cpu", "cuda"}, f"kernels are for the CPU and CUDA, and it is on {device}")
    heads, heads_kv = query.shape[1], key.shape[1]
    # Without the flag one head for all is broadcast, which is the same.
    fits = value.shape[1] == heads_kv and heads % heads_kv == 0 and (is_grouped or heads_kv in {1, heads})
    need(fits, f"heads of query, key and value are {heads}, {heads_kv} and {value.shape[1]}")
    need(key.shape[3] == query.shape[3], "query and key differ in head_dim")
    width = max(query.shape[3], value.shape[3])
    need(width <= LONGEST_HEAD, f"head_dim is at most {LONGEST_HEAD} here, and it is {width}")


def _neighborhood(constants: Constants, node: fx.Node) -> Neighborhood | None:
    described = tensor_of(node)
    need(isinstance(described, torch.Tensor), "the graph does not say what its mask is")
    shape = tuple(described.shape)
    known = 2 <= len(shape) <= 4 and all(isinstance(size, int) for size in shape)
    square = known and math.prod(shape[:-2]) == 1 and shape[-1] == shape[-2]
    need(square, f"its mask is {list(shape)}, and not one of all tokens for all heads and batch entries")
    need(shape[-1] ** 2 <= LARGEST, f"a mask of {shape[-1]} tokens is too large to look at")
    tensor = constants.value(node)
    mask = None if tensor is None else _as_bool(tensor.detach().reshape(shape[-2:]))
    return None if mask is None else recognize(mask)


def _as_bool(mask: torch.Tensor) -> Mask | None:
    """Return a mask as booleans; ``None`` where it adds more to scores than nothing and minus infinity."""
    if mask.dtype is torch.bool:
        return np.asarray(mask.cpu().numpy())
    if not mask.is_floating_point():
        return None
    bias = mask.cpu().to(torch.promote_types(mask.dtype, torch.float32))  # NumPy has no bfloat16.
    return mask_of_bias(bias.numpy(), torch.finfo(mask.dtype).min)


def _replace(node: fx.Node, arguments: dict[str, Any], neighborhood: Neighborhood) -> None:
    graph = node.graph
    aten = torch.ops.aten

    def called(target: Callable[..., object], *parameters: fx.node.Argument) -> fx.Node:
        made = graph.call_function(target, parameters)
        propagate(made, node)
        return made

    layout, rank = list(neighborhood.layout), len(neighborhood.layout)
    with graph.inserting_before(node):
        tensors = {}
        for name in ("query", "key", "value"):
            tokens_first = called(aten.transpose.int, arguments[name], 1, 2)
            tensors[name] = called(aten.unflatten.int, tokens_first, 1, layout) if rank > 1 else tokens_first
        scale = arguments["scale"]
        if scale is None:
            scale = float(tensor_of(arguments["query"]).shape[-1]) ** -0.5
        parameters = {
            "kernel_size": list(neighborhood.kernel_size),
            "stride": list(neighborhood.stride),
            "dilation": list(neighborhood.dilation),
            "is_causal": list(neighborhood.is_causal),
            "scale": scale,
        }
        attended = operator_node(graph, rank, {**tensors, **parameters})
        propagate(attended, node)
        output = called(operator.getitem, attended, 0)
        if rank > 1:
            output = called(aten.flatten.using_ints, output, 1, rank)
        output = called(aten.transpose.int, output, 1, 2)
    replace_node(node, output)
