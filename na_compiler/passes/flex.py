"""flex_attention with a block mask that is a neighborhood becomes neighborhood attention."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from na_compiler.passes.constants import Constants
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.effects import is_pure
from na_compiler.passes.graph import attempt, graph_module, layer_of, replace_node, tensor_of
from na_compiler.passes.masked import attend, check_tensors, drop_unused, one_of
from na_compiler.passes.masks import LARGEST, Mask, Neighborhood, recognize

__all__ = ["replace_flex"]

_LOG = logging.getLogger("na_compiler")
# What torch's operator is called with.
_ARGUMENTS = (
    "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_mod_other_buffers",
    "mask_mod_other_buffers",
)  # fmt: skip
# The entries of a block mask: lengths; how many blocks of keys each block of queries sees a part of, and which; the
# same of those that it sees all of; ... ; sizes of blocks; what says which elements of the former are seen.
_LENGTHS, _PARTIAL, _FULL, _SIZES = slice(0, 2), slice(2, 4), slice(4, 6), slice(-3, -1)
# Pairs of a query and a key that a mask_mod is asked for at a time.
_PAIRS = 1 << 22


def replace_flex(
    program: ExportedProgram | fx.GraphModule,
    held: Mapping[str, torch.Tensor] | None = None,
    used: set[str] | None = None,
) -> int:
    """Replace flex_attention whose block mask is a constant neighborhood; returns how many there were.

    Parameters
    ----------
    program
        Changed in place.
    held, used
        See `na_compiler.passes.sdpa.replace_sdpa`.
    """
    module = graph_module(program)
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and _is_flex(node.target)]
    constants = Constants(program, held or {}) if nodes else None
    known: dict[tuple[Any, ...], Neighborhood | None] = {}
    replaced: dict[fx.Node, None] = {}
    for node in nodes:
        assert constants is not None
        try:
            needed = _replace(constants, node, known)
        except DeclinedError as why:
            _LOG.info("%s: flex_attention stays as it is: %s", layer_of(node), why)
            continue
        replaced |= needed
        if used is not None:
            used |= {each.name for each in needed if each.op == "placeholder"} & set(held or ())
    if replaced:
        drop_unused(module.graph, replaced)
    return sum(node.graph is None or node not in module.graph.nodes for node in nodes)


def _is_flex(target: object) -> bool:
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() == "flex_attention"  # noqa: SLF001


def _replace(
    constants: Constants, node: fx.Node, known: dict[tuple[Any, ...], Neighborhood | None]
) -> dict[fx.Node, None]:
    """Put neighborhood attention in a node's place, and return what its mask was made of."""
    names = [*_ARGUMENTS, *map(str, range(len(node.args)))]
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    need(not set(arguments) - set(_ARGUMENTS), "it has arguments that are not known here")
    outputs = list(node.users)
    for user in outputs:
        need(user.target is operator.getitem, "what reads it is not known here")
        need(not user.users or user.args[1:] == (0,), "its lse is read, or its largest score")
    score = _inside(constants.module, arguments["score_mod"])
    is_plain = bool(_result(score) is score.graph.find_nodes(op="placeholder")[0])
    need(is_plain, "it has a score_mod")
    block_mask, buffers = arguments["block_mask"], arguments.get("mask_mod_other_buffers", ())
    # Masks of all layers are one, and looked at once.
    made_of = (
        constants.key(each, node) if isinstance(each, fx.Node) else each for each in (*block_mask[:-1], *buffers)
    )
    key = (*made_of, str(_inside(constants.module, block_mask[-1]).graph))
    if key not in known:
        mask = _mask(constants, node, block_mask, buffers)
        known[key] = recognize(mask)
    neighborhood = known[key]
    need(neighborhood is not None, "its block mask is no neighborhood")
    assert neighborhood is not None
    tensors = [tensor_of(arguments[name]) for name in _ARGUMENTS[:3]]
    is_known = all(isinstance(tensor, torch.Tensor) and len(tensor.shape) == 4 for tensor in tensors)
    need(is_known, "query, key and value are not known to be [batch, heads, tokens, head_dim]")
    check_tensors(tensors, math.prod(neighborhood.layout), is_grouped=True)
    scale = arguments.get("scale")
    need(scale is None or (isinstance(scale, (int, float)) and math.isfinite(scale)), f"its scale is {scale}")
    read = [each for each in (*block_mask, *buffers) if isinstance(each, fx.Node) and each.op != "get_attr"]
    needed = dict.fromkeys(each for one in read for each in constants.needed(one, node))
    with attempt(node.graph):
        output = attend(node, {**arguments, "scale": scale}, neighborhood)
    for user in outputs:
        if user.args[1] == 0:
            replace_node(user, output)
        else:
            node.graph.erase_node(user)
    node.graph.erase_node(node)
    _LOG.info("%s: its block mask is a neighborhood, %s", layer_of(node), neighborhood)
    return needed


def _mask(constants: Constants, node: fx.Node, block_mask: tuple[Any, ...], buffers: tuple[Any, ...]) -> Mask:
    """Return which keys queries see: all of some blocks, of others what ``mask_mod`` says, and none of the rest."""
    queries, keys = block_mask[_LENGTHS]
    square = type(queries) is int and queries == keys
    need(square, f"its block mask is of {queries} queries and {keys} keys")
    need(queries**2 <= LARGEST, f"a mask of {queries} tokens is too large to look at")
    partial, full = (_blocks(constants, node, block_mask[entries]) for entries in (_PARTIAL, _FULL))
    need(partial is not None, "it has no blocks")
    assert partial is not None

    def spread(blocks: torch.Tensor) -> torch.Tensor:
        rows, columns = block_mask[_SIZES]
        return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:queries, :keys]

    mask = _elements(constants, node, block_mask[-1], buffers, queries, partial.device) & spread(partial)
    if full is not None:
        mask |= spread(full)
    result: Mask = mask.cpu().numpy()
    return result


def _blocks(constants: Constants, node: fx.Node, entries: tuple[Any, Any]) -> torch.Tensor | None:
    """Return which blocks of keys (columns) blocks of queries (rows) see, from how many they are and which."""
    if entries[0] is None:
        return None
    need(all(isinstance(entry, fx.Node) for entry in entries), "its block mask is not known here")
    indices = constants.value(entries[1], node)
    counts, indices = one_of(constants.value(entries[0], node)[..., None])[:, 0], one_of(indices)
    is_counted = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    made = torch.zeros(len(indices), indices.shape[1] + 1, dtype=torch.bool, device=indices.device)
    # What is not counted goes to one more column.
    made.scatter_(1, torch.where(is_counted, indices, indices.shape[1]).long(), value=True)
    return made[:, :-1]


def _elements(
    constants: Constants, node: fx.Node, mask_mod: object, buffers: tuple[Any, ...], tokens: int, device: torch.device
) -> torch.Tensor:
    """Return what ``mask_mod`` says of all queries and keys."""
    inside = _inside(constants.module, mask_mod)
    for each in inside.graph.nodes:
        known = each.op in {"placeholder", "output"} or is_pure(each)
        need(known, f"its mask_mod has {each.name}, which is not known to give the same each time")
    batch, head, *_ = inside.graph.find_nodes(op="placeholder")
    need(not batch.users and not head.users, "its mask_mod differs between heads or batch entries")
    values = [constants.value(each, node) if isinstance(each, fx.Node) else each for each in buffers]
    zero, index = torch.zeros((), dtype=torch.int32, device=device), torch.arange(tokens, device=device)

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = inside(zero, zero, query, key, *values)
        return result

    try:
        with torch.no_grad():
            # Some rows at a time: what a mask_mod computes on its way takes 8 bytes for each pair.
            rows = max(_PAIRS // tokens, 1)
            found = torch.vmap(torch.vmap(sees, in_dims=(None, 0)), in_dims=(0, None), chunk_size=rows)(index, index)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise DeclinedError(f"its mask_mod cannot be computed here: {str(error).partition(chr(10))[0]}") from error
    return found.bool()


def _inside(module: fx.GraphModule, node: object) -> fx.GraphModule:
    found = getattr(module, str(node.target), None) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    if not isinstance(found, fx.GraphModule):
        raise DeclinedError("its mask_mod or score_mod is not known here")
    return found


def _result(inside: fx.GraphModule) -> object:
    (output,) = inside.graph.find_nodes(op="output")
    returned = output.args[0]
    return returned[0] if isinstance(returned, (list, tuple)) and len(returned) == 1 else returned
