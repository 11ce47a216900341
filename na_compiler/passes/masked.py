"""Masked attention and neighborhood attention in a graph: what the first must be like, and the second in its place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from na_compiler.borders import joined
from na_compiler.parameters import DTYPES, LONGEST_HEAD
from na_compiler.passes.decline import need
from na_compiler.passes.effects import writes
from na_compiler.passes.graph import operator_node, propagate, same_size, tensor_of
from na_compiler.passes.grouped import unrepeated
from na_compiler.passes.masks import Neighborhood

__all__ = ["attend", "check_tensors", "drop_unused", "one_of"]


def attend(node: fx.Node, arguments: dict[str, Any], neighborhood: Neighborhood) -> fx.Node:
    """Return a node that attends in a neighborhood, and is made in front of another.

    Parameters
    ----------
    node
        What it stands for.
    arguments
        ``query``, ``key`` and ``value``, nodes of ``[batch, heads, tokens, head_dim]``, and ``scale``.
    neighborhood
        Of which layout the tokens are, and which of them see each other.
    """
    graph = node.graph
    aten = torch.ops.aten

    def called(target: Callable[..., object], *parameters: fx.node.Argument) -> fx.Node:
        made = graph.call_function(target, parameters)
        propagate(made, node)
        return made

    layout, rank = list(neighborhood.layout), len(neighborhood.layout)
    once = unrepeated(arguments["key"], arguments["value"], axis=1)
    if once is not None:
        arguments = arguments | dict(zip(("key", "value"), once, strict=True))
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
            "border": joined(neighborhood.border),
        }
        attended = operator_node(graph, rank, {**tensors, **parameters})
        propagate(attended, node)
        output = called(operator.getitem, attended, 0)
        if rank > 1:
            output = called(aten.flatten.using_ints, output, 1, rank)
        return called(aten.transpose.int, output, 1, 2)


def check_tensors(tensors: list[torch.Tensor], tokens: int | torch.SymInt, is_grouped: bool) -> None:
    """Decline tensors that our operators could not attend with.

    Parameters
    ----------
    tensors
        Query, key and value, ``[batch, heads, tokens, head_dim]``.
    tokens
        How many the mask has.
    is_grouped
        Whether there may be more heads of queries than of keys and values.

    Raises
    ------
    DeclinedError
        Says why.
    """
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


def one_of(mask: torch.Tensor) -> torch.Tensor:
    """Return what a mask is for each head and batch entry."""
    while mask.dim() > 2:
        one = mask[0]
        # Expanded ones have no memory for others.
        need(mask.stride(0) == 0 or bool((mask == one).all()), "its mask differs between heads or batch entries")
        mask = one
    return mask


def drop_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase what made masks, with what was written into them, if nobody else reads any of it; and what is dead."""
    inner = {node for node in nodes if node.op not in {"placeholder", "get_attr"}}
    if all(user in inner for node in inner for user in node.users):
        for node in reversed(list(graph.nodes)):
            if node in inner:
                graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or writes(node))
