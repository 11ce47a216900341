"""*canonicalise* for ONNX models: attention whose constant mask or window is a neighborhood becomes our operator."""

from __future__ import annotations

import logging
import math

import numpy as np
import onnx_ir as ir

from na_compiler.borders import joined
from na_compiler.onnx.bodies import MINIMUM_OPSET, add_bodies
from na_compiler.onnx.names import FreshNames
from na_compiler.onnx.nodes import check_version, name_of, node_signature
from na_compiler.onnx.signature import DOMAIN, VERSION
from na_compiler.passes.attention_onnx import MaskedAttention, match
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.masks import Neighborhood
from na_compiler.window import SHIFT

__all__ = ["canonicalise_onnx"]

_LOG = logging.getLogger("na_compiler")
_HEADS_LAST = (0, 2, 1, 3)


def canonicalise_onnx(model: ir.Model, *, bodies: bool = True) -> int:
    """Replace attention over a neighborhood, in place; returns how many there were.

    Parameters
    ----------
    model
        An ``onnx_ir.Model``: its graph and the graphs inside it. Nodes that become superfluous are removed.
    bodies
        Whether the new nodes get bodies, so that the model runs in every runtime. They are of opset 18 and later: a
        model of an older one stays as it is. Without, it runs with the operator library only.
    """
    check_version(model)
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    names = FreshNames(model)
    known: dict[tuple[object, ...], Neighborhood | str] = {}
    borders: dict[str, tuple[str, ...]] = {}
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            borders.setdefault(node.op_type, node_signature(node).border())
    count = 0
    for node in list(model.graph.all_nodes()):
        try:
            found = match(node, opset)
            if found is None:
                continue
            need(not bodies or opset >= MINIMUM_OPSET, f"bodies need opset {MINIMUM_OPSET}, the model has {opset}")
            neighborhood = _neighborhood(found, known)
            if bodies:
                _agree(borders, f"NA{len(neighborhood.layout)}D", neighborhood.border)
        except DeclinedError as why:
            _LOG.info("%s: attention with a mask or a window stays as it is: %s", name_of(node), why)
            continue
        _LOG.info("%s: what it sees is a neighborhood, %s", name_of(node), neighborhood)
        _Replacement(node, found, neighborhood, names).make()
        count += 1
    if count:
        model.opset_imports[DOMAIN] = VERSION
        ir.passes.common.RemoveUnusedNodesPass()(model)
        if bodies:
            is_blocked = any(function.domain == DOMAIN and function.overload for function in model.functions.values())
            add_bodies(model, "blocked" if is_blocked else "generic")
    return count


def _agree(borders: dict[str, tuple[str, ...]], operator: str, border: tuple[str, ...]) -> None:
    """Decline a border of a node that gets a body where other nodes of its operator have another."""
    first = borders.setdefault(operator, border)
    need(
        first == border,
        f"bodies compute one border for all nodes of {operator}, which is {joined(first)}, and it has "
        f"{joined(border)}: bodies=False would do",
    )


def _neighborhood(found: MaskedAttention, known: dict[tuple[object, ...], Neighborhood | str]) -> Neighborhood:
    """Return a neighborhood; each mask is looked at once."""
    place = (found.mask, found.tokens, found.left, found.right)
    if place not in known:
        try:
            known[place] = found.neighborhood()
        except DeclinedError as why:
            known[place] = str(why)
    result = known[place]
    if isinstance(result, str):
        raise DeclinedError(result)
    return result


class _Replacement:
    """The nodes that take the place of one.

    Parameters
    ----------
    node, found, neighborhood
        The node, what was found to end there, and over which neighborhood.
    names
        Names that nothing has.
    """

    def __init__(self, node: ir.Node, found: MaskedAttention, neighborhood: Neighborhood, names: FreshNames) -> None:
        self.node, self.found, self.neighborhood, self.names = node, found, neighborhood, names
        self.made: list[ir.Node] = []

    def make(self) -> None:
        """Write the nodes, and let the readers of the old one read them."""
        found, neighborhood = self.found, self.neighborhood
        rank = len(neighborhood.layout)
        head_dim, head_dim_v = found.widths()
        heads, heads_kv = found.heads
        query = self._heads_last(found.query, heads, head_dim)
        key = self._heads_last(found.key, heads_kv, head_dim)
        value = self._heads_last(found.value, heads_kv, head_dim_v)
        attended = self._call(
            f"NA{rank}D",
            query,
            key,
            value,
            domain=DOMAIN,
            kernel_size=list(neighborhood.kernel_size),
            stride=list(neighborhood.stride),
            dilation=list(neighborhood.dilation),
            is_causal=[int(flag) for flag in neighborhood.is_causal],
            scale=float(head_dim**-0.5 if found.scale is None else found.scale),
            **({} if set(neighborhood.border) == {SHIFT} else {"border": joined(neighborhood.border)}),
        )
        self.made[-1].metadata_props.update(self.node.metadata_props)
        assert query.shape is not None
        _describe(attended, query.dtype, ir.Shape([*list(query.shape)[:-1], head_dim_v]))
        tokens = math.prod(neighborhood.layout)
        if found.is_flat:
            output = self._call("Reshape", attended, self._sizes(0, tokens, heads * head_dim_v))
        else:
            flat = attended if rank == 1 else self._call("Reshape", attended, self._sizes(0, tokens, heads, head_dim_v))
            output = self._call("Transpose", flat, perm=_HEADS_LAST)
        _describe(output, found.output.dtype, found.output.shape)
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, self.made)
        ir.convenience.replace_all_uses_with(found.output, output, replace_graph_outputs=True)

    def _heads_last(self, value: ir.Value, heads: int, width: int) -> ir.Value:
        """Return query, key or value as ``[batch, *layout, heads, width]``."""
        layout = self.neighborhood.layout
        turned = value if self.found.is_flat else self._call("Transpose", value, perm=_HEADS_LAST)
        if self.found.is_flat or len(layout) > 1:
            turned = self._call("Reshape", turned, self._sizes(0, *layout, heads, width))
        assert value.shape is not None
        _describe(turned, value.dtype, ir.Shape([value.shape[0], *layout, heads, width]))
        return turned

    def _call(self, kind: str, *inputs: ir.Value, domain: str = "", **attributes: object) -> ir.Value:
        found = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]  # type: ignore[arg-type]
        name = self.names(f"{name_of(self.node)}_{kind}")
        made = ir.Node(domain, kind, inputs, found, num_outputs=1, name=name)
        made.outputs[0].name = self.names(f"{name}_output")
        self.made.append(made)
        return made.outputs[0]

    def _sizes(self, *values: int) -> ir.Value:
        return self._call("Constant", value=ir.tensor(np.array(values, np.int64)))


def _describe(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    value.shape = shape
    if dtype is not None:
        value.dtype = dtype
