"""Attention with a constant mask that is exactly a neighborhood becomes neighborhood attention."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.nn import functional

from na_compiler.passes.graph import graph_module, is_pure, layer_of, operator_node, propagate, replace_node, tensor_of
from na_compiler.passes.masks import Mask, Neighborhood, mask_of_bias, recognize

__all__ = ["replace_sdpa"]

_LOG = logging.getLogger("na_compiler")
# Beyond this many elements recognising one takes longer than it is worth.
_LARGEST = 1 << 28


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
    constants = _Constants(program, held or {})
    known: dict[fx.Node, Neighborhood | None] = {}
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _is_sdpa(node.target):
            continue
        arguments = _arguments(node)
        mask = arguments["attn_mask"]
        if not isinstance(mask, fx.Node) or arguments["dropout_p"] or arguments["is_causal"]:
            continue
        if mask not in known:
            known[mask] = _neighborhood(constants, mask)
        neighborhood = known[mask]
        if neighborhood is not None and _fits(arguments, neighborhood):
            _LOG.info("%s: its mask is a neighborhood, %s", layer_of(node), neighborhood)
            _replace(node, arguments, neighborhood)
            count += 1
            if used is not None:
                used |= constants.inputs_of(mask) & set(held or ())
    if count:
        module.graph.eliminate_dead_code()
    return count


def _is_sdpa(target: Any) -> bool:
    return target is functional.scaled_dot_product_attention or (
        isinstance(target, torch._ops.OpOverload)  # noqa: SLF001
        and target._schema.name == "aten::scaled_dot_product_attention"  # noqa: SLF001
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    defaults: dict[str, Any] = dict(zip(names, (None, None, None, None, 0.0, False, None, False), strict=True))
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _fits(arguments: dict[str, Any], neighborhood: Neighborhood) -> bool:
    """Return whether query, key and value are ``[batch, heads, tokens, head_dim]``, with as many tokens as the mask."""
    tensors = [tensor_of(arguments[name]) for name in ("query", "key", "value")]
    if any(not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 for tensor in tensors):
        return False
    query, key, value = tensors
    tokens = int(np.prod(neighborhood.layout))
    if not (query.shape[2] == key.shape[2] == value.shape[2] == tokens and query.shape[0] == key.shape[0]):
        return False
    return bool(query.shape[1] == key.shape[1] or arguments["enable_gqa"])


def _neighborhood(constants: _Constants, node: fx.Node) -> Neighborhood | None:
    described = tensor_of(node)
    if not isinstance(described, torch.Tensor) or not all(isinstance(size, int) for size in described.shape):
        return None
    shape = tuple(described.shape)
    if len(shape) < 2 or any(size != 1 for size in shape[:-2]) or shape[-1] != shape[-2]:
        return None
    if shape[-1] ** 2 > _LARGEST:
        _LOG.info("%s: a mask of %d tokens is too large to look at", layer_of(node), shape[-1])
        return None
    tensor = constants.value(node)
    if tensor is None:
        return None
    mask = _as_bool(tensor.detach().reshape(shape[-2:]))
    return None if mask is None else recognize(mask)


def _as_bool(mask: torch.Tensor) -> Mask | None:
    """Return a mask as booleans; ``None`` where it adds more to scores than nothing and minus infinity."""
    if mask.dtype is torch.bool:
        return np.asarray(mask.cpu().numpy())
    if not mask.is_floating_point():
        return None
    bias = mask.cpu().to(torch.promote_types(mask.dtype, torch.float32))  # NumPy has no bfloat16.
    return mask_of_bias(bias.numpy(), torch.finfo(mask.dtype).min)


class _Constants:
    """Values of nodes that do not depend on the program's inputs."""

    def __init__(self, program: ExportedProgram | fx.GraphModule, held: Mapping[str, torch.Tensor]) -> None:
        self.module = graph_module(program)
        self.held: dict[str, torch.Tensor] = dict(held)
        if isinstance(program, ExportedProgram):
            signature = program.graph_signature
            everything = {**program.state_dict, **program.constants}
            mutated = set(signature.buffers_to_mutate.values())
            for names in (signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants):
                for node, name in names.items():
                    if name in everything and name not in mutated:
                        self.held[node] = everything[name]
        self.values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """Return the value of a node, or ``None`` if it is no constant."""
        try:
            with torch.no_grad():
                value = self._evaluate(node)
        except _NotConstantError:
            return None
        return value if isinstance(value, torch.Tensor) else None

    def inputs_of(self, node: fx.Node) -> set[str]:
        """Return the names of the inputs that a node is computed from."""
        if node.op == "placeholder":
            return {node.name}
        return {name for before in node.all_input_nodes for name in self.inputs_of(before)}

    def _evaluate(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._compute(node)
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder" and node.name in self.held:
            return self.held[node.name]
        if node.op == "get_attr":
            value: Any = self.module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                return value
        if node.op == "call_function" and (is_pure(node.target) or node.target is operator.getitem):
            arguments = fx.map_arg((node.args, node.kwargs), self._evaluate)
            target: Any = node.target
            return target(*arguments[0], **arguments[1])
        raise _NotConstantError


class _NotConstantError(Exception):
    pass


def _replace(node: fx.Node, arguments: dict[str, Any], neighborhood: Neighborhood) -> None:
    graph = node.graph
    aten = torch.ops.aten

    def called(target: Any, *parameters: Any) -> fx.Node:
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
            "additional_keys": None,
            "additional_values": None,
        }
        attended = operator_node(graph, rank, {**tensors, **parameters})
        propagate(attended, node)
        output = called(operator.getitem, attended, 0)
        if rank > 1:
            output = called(aten.flatten.using_ints, output, 1, rank)
        output = called(aten.transpose.int, output, 1, 2)
    replace_node(node, output)
