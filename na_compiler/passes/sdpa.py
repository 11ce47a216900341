"""Attention with a constant mask that is exactly a neighborhood becomes neighborhood attention."""

from __future__ import annotations

import dataclasses
import logging
import math
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
    range_of,
    replace_node,
    same_size,
    tensor_of,
)
from na_compiler.passes.lengths import LONGEST, corner
from na_compiler.passes.masked import attend, check_tensors, drop_unused, one_of
from na_compiler.passes.masks import LARGEST, Mask, Neighborhood, mask_of_bias, recognize
from na_compiler.window import CUT, border_kind

__all__ = ["replace_sdpa"]

# Masks of all layers are one, mostly, and looked at once: what each is, or why it is left.
Known = dict[tuple[fx.Node, frozenset[fx.Node]], Neighborhood | str]
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
    known: Known = {}
    replaced: dict[fx.Node, None] = {}
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _is_sdpa(node.target):
            continue
        arguments = _arguments(node)
        mask = arguments["attn_mask"]
        if not isinstance(mask, fx.Node):
            continue
        try:
            neighborhood = _neighborhood(constants, mask, node, known)
            tokens = tensor_of(mask).shape[-1]
            if constants.may_guard:
                _guard(arguments, tokens)
            _check(arguments, tokens)
            needed, inputs = constants.needed(mask, node), constants.inputs_of(mask, node)
            with attempt(node.graph):
                replace_node(node, attend(node, arguments, neighborhood))
        except DeclinedError as why:
            _LOG.info("%s: attention with a mask stays as it is: %s", layer_of(node), why)
            continue
        _LOG.info("%s: its mask is a neighborhood, %s", layer_of(node), neighborhood)
        count += 1
        replaced |= dict.fromkeys(needed)
        if used is not None:
            used |= inputs & set(held or ())
    if count:
        drop_unused(module.graph, replaced)
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


def _guard(arguments: dict[str, Any], tokens: int | torch.SymInt) -> None:
    """Let it be checked before each call that sizes which are called differently are as long as the mask."""
    for name in ("query", "key", "value"):
        tensor = tensor_of(arguments[name])
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and isinstance(tokens, torch.SymInt):
            need(bool(tensor.shape[2] == tokens), f"its mask is of {tokens} tokens, and {name} of {tensor.shape[2]}")


def _check(arguments: dict[str, Any], tokens: int | torch.SymInt) -> None:
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
    check_tensors(tensors, tokens, is_grouped)


def _neighborhood(constants: Constants, mask: fx.Node, at: fx.Node, known: Known) -> Neighborhood:
    """Return the neighborhood that a mask is for one of its readers.

    Raises
    ------
    DeclinedError
        If it is none; says why.
    """
    described = tensor_of(mask)
    need(isinstance(described, torch.Tensor), "the graph does not say what its mask is")
    shape = tuple(described.shape)
    square = 2 <= len(shape) <= 4 and same_size(shape[-1], shape[-2])
    need(square, f"its mask is {list(shape)}, and not one of all tokens")
    _check_broadcast(shape, tensor_of(_arguments(at)["query"]))
    if not isinstance(shape[-1], int):
        return _of_any_length(constants, mask, at, shape[-1], known)
    need(shape[-1] ** 2 <= LARGEST, f"a mask of {shape[-1]} tokens is too large to look at")
    while _is_expand(mask) and not all(isinstance(size, int) for size in tensor_of(mask).shape):
        # For a batch of any size: what is expanded is the same for all of it.
        mask = mask.args[0]  # type: ignore[assignment]

    def value(mask: fx.Node, at: fx.Node) -> torch.Tensor:
        return corner(constants, mask, at, None)

    return _recognized(constants, mask, at, known, value)


def _recognized(
    constants: Constants, mask: fx.Node, at: fx.Node, known: Known, value: Callable[[fx.Node, fx.Node], torch.Tensor]
) -> Neighborhood:
    """Return the neighborhood that the value of a mask is, as `known` has it or else by looking at it."""
    key = constants.key(mask, at)
    if key not in known:
        try:
            known[key] = recognize(_as_bool(one_of(value(mask, at).detach()))) or "its mask is no neighborhood"
        except DeclinedError as why:
            known[key] = str(why)
    found = known[key]
    if isinstance(found, str):
        raise DeclinedError(found)
    return found


def _of_any_length(
    constants: Constants, mask: fx.Node, at: fx.Node, length: torch.SymInt, known: Known
) -> Neighborhood:
    """Return the neighborhood that a mask is for all lengths that it may have; its layout is of the largest."""
    _, highest = range_of(length)
    bound = min(highest, LONGEST)

    def largest(mask: fx.Node, at: fx.Node) -> torch.Tensor:
        return corner(constants, mask, at, length, bound)

    found = _recognized(constants, mask, at, known, largest)
    need(len(found.layout) == 1, "its length is dynamic, and its mask is of more axes than one")
    (tokens,), (size,), (stride,), (dilation,) = found.layout, found.kernel_size, found.stride, found.dilation
    is_cut, is_causal = border_kind(found.border[0]) == CUT, found.is_causal == (True,)
    # Windows that are shifted, or wrap, depend on the length; causal ones are cut, but for the last of a stride.
    need(is_cut or is_causal, "its length is dynamic, and its mask is no window that is cut off at the ends")
    need(is_cut or size < tokens, "its length is dynamic, and its mask hides nothing but what comes later")
    is_same = is_cut or stride == 1 or tokens % (stride * dilation) == 0
    need(is_same, f"its length is dynamic, and {tokens} tokens, for which its mask was looked at, end within a stride")
    fits = bool(length <= tokens) if constants.may_guard else highest <= tokens
    need(fits, f"its length may be more than {tokens}: a dimension with a max would do, of {LONGEST} at most")
    return found if is_cut else dataclasses.replace(found, border=(CUT,))


def _check_broadcast(shape: tuple[Any, ...], query: object) -> None:
    """Decline a mask with a batch or heads that query has not."""
    if not isinstance(query, torch.Tensor) or query.dim() != 4:
        raise DeclinedError("query, key and value are not known to be [batch, heads, tokens, head_dim]")
    for size, own in zip(reversed(shape[:-2]), (query.shape[1], query.shape[0]), strict=False):
        need(same_size(size, 1) or same_size(size, own), f"its mask is {list(shape)}, and query {list(query.shape)}")


def _is_expand(node: fx.Node) -> bool:
    target = node.target
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else str(target)  # noqa: SLF001
    return name in {"aten::expand", "expand"} and isinstance(node.args[0], fx.Node)


def _as_bool(mask: torch.Tensor) -> Mask:
    """Return a mask as booleans; decline one that adds more to scores than nothing and minus infinity."""
    if mask.dtype is torch.bool:
        return np.asarray(mask.cpu().numpy())
    need(mask.is_floating_point(), f"its mask is in {mask.dtype}")
    bias = mask.cpu().to(torch.promote_types(mask.dtype, torch.float32))  # NumPy has no bfloat16.
    found = mask_of_bias(bias.numpy())
    need(found is not None, "its mask adds more to scores than 0 and, to hide, -1e4 or less")
    assert found is not None
    return found
