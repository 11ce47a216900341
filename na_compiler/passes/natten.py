"""NATTEN's modules, functions and operators become ours. They are known by their names: natten is never imported."""

from __future__ import annotations

import operator
import re
from typing import Any

from torch import fx, nn

from na_compiler.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from na_compiler.passes.graph import Attention, attentions, operator_node, propagate, replace_node, tensor_of
from na_compiler.problem import flags_per_axis, ints_per_axis

__all__ = ["convert", "replace_natten"]

_MODULE = re.compile(r"NeighborhoodAttention([123])D")
_OURS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}


def convert(model: nn.Module) -> nn.Module:
    """Swap NATTEN's modules in a model for ours.

    Parameters
    ----------
    model
        Changed in place. Parameters, buffers, hooks and the training flag are kept, not copied: an optimizer that has
        the parameters still has them.

    Returns
    -------
    nn.Module
        The model; or its replacement, where the model is one of NATTEN's modules itself.

    Raises
    ------
    NotImplementedError
        For a module with something that ours have not: relative position bias, dropout of attention weights. Nothing
        is changed then.

    Examples
    --------
    >>> import natten  # doctest: +SKIP
    >>> model = na_compiler.convert(MyModelWithNatten())  # doctest: +SKIP
    """
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if _rank(module)]
    made: dict[int, nn.Module] = {}
    for name, module in found:
        if id(module) not in made:
            made[id(module)] = _converted(name, module)
    for name, module in found:
        if name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[id(module)])
    return made.get(id(model), model)


def _rank(module: nn.Module) -> int | None:
    """Return the rank of a NATTEN module, unless it is of a class that computes something of its own."""
    for base in type(module).__mro__:
        found = _MODULE.fullmatch(base.__name__)
        if found and base.__module__.partition(".")[0] == "natten":
            kept = getattr(type(module), "forward", None) is getattr(base, "forward", None)
            return int(found[1]) if kept else None
    return None


def _converted(name: str, module: Any) -> nn.Module:
    rank = _rank(module)
    assert rank is not None
    if getattr(module, "rpb", None) is not None:
        raise NotImplementedError(f"{name or 'the model'} has a relative position bias (rpb), which ours have not")
    dropout = getattr(module, "attn_drop", None)
    if getattr(dropout, "p", dropout or 0.0):
        raise NotImplementedError(
            f"{name or 'the model'} has attn_drop={getattr(dropout, 'p', dropout)}, which ours have not; set it to 0"
        )
    made = _OURS[rank].__new__(_OURS[rank])
    # All that a module carries: parameters, submodules, hooks, mode.
    made.__dict__.update(module.__dict__)
    embed_dim = module.qkv.in_features
    made.embed_dim, made.num_heads, made.head_dim = embed_dim, module.num_heads, embed_dim // module.num_heads
    made.scale = float(module.scale)
    for parameter, default in (("kernel_size", None), ("stride", 1), ("dilation", 1)):
        setattr(made, parameter, ints_per_axis(parameter, getattr(module, parameter, default), rank))
    causal = getattr(module, "is_causal", False)
    made.is_causal = flags_per_axis("is_causal", causal if isinstance(causal, bool) else tuple(map(bool, causal)), rank)
    if not hasattr(made, "proj_drop"):
        made.proj_drop = nn.Dropout(0.0)
    return made


def replace_natten(module: fx.GraphModule) -> int:
    """Replace NATTEN's operators, functions and modules in a graph by our operators; returns how many there were."""
    count = 0
    if any(_rank(child) for child in module.children()) or any(map(_rank, module.modules())):
        count += sum(1 for child in module.modules() if _rank(child))
        convert(module)
    for found in list(attentions(module)):
        if not found.is_ours and found.direction == "forward" and _is_plain(found):
            _replace(found)
            count += 1
    return count


def _is_plain(found: Attention) -> bool:
    """Return whether a node takes tokens as a layout, and nothing that our operators have not."""
    return not found.arguments.get("num_extra_kv") and found.arguments.get("rel_pos_bias") is None


def _replace(found: Attention) -> None:
    node, graph, arguments = found.node, found.node.graph, dict(found.arguments)
    arguments["kernel_size"] = list(ints_per_axis("kernel_size", arguments["kernel_size"], found.rank))
    for name in ("stride", "dilation"):
        value = arguments[name]
        arguments[name] = list(ints_per_axis(name, 1 if value is None else value, found.rank))
    causal = arguments["is_causal"]
    arguments["is_causal"] = list(flags_per_axis("is_causal", False if causal is None else causal, found.rank))
    with graph.inserting_before(node):
        query = arguments["query"]
        tensor = tensor_of(query)
        if arguments["scale"] is None:
            if tensor is None:
                raise ValueError(f"the graph says no shape for {query}, of which the scale is made")
            arguments["scale"] = float(tensor.shape[-1]) ** -0.5
        layout = arguments.get("qkv_shape")
        is_flat = layout is not None and tensor is not None and tensor.dim() != found.rank + 3
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
    import torch  # noqa: PLC0415

    target = {"unflatten": torch.ops.aten.unflatten.int, "flatten": torch.ops.aten.flatten.using_ints}[name]
    node = graph.call_function(target, arguments)
    propagate(node, like)
    return node
