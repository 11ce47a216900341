"""Reading the operators' nodes in a model: which there are, and which problems they pose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from na_compiler.onnx import schema  # noqa: F401  (shape inference needs the schemas)
from na_compiler.onnx.signature import ATTRIBUTES, DOMAIN, INPUTS, OPERATORS, Signature
from na_compiler.problem import Problem

__all__ = ["attention_nodes", "load", "node_signature", "problems"]

Source = str | os.PathLike[str] | ir.Model | onnx.ModelProto
_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def load(model: Source) -> ir.Model:
    """Return a model as onnx-ir's, whatever it is given as: a path, a ``ModelProto``, or that already."""
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, onnx.ModelProto):
        return ir.serde.deserialize_model(model)
    return ir.load(Path(model))


def attention_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of the operators, in the graph, its subgraphs, and functions other than the bodies."""
    yield from filter(_is_attention, model.graph.all_nodes())
    for function in model.functions.values():
        if function.domain != DOMAIN:
            yield from filter(_is_attention, function.all_nodes())


def node_signature(node: ir.Node) -> Signature:
    """Return what a node says of itself, and of its inputs as far as the model knows them.

    Raises
    ------
    ValueError
        If only one of the additional inputs is there.
    """
    inputs = list(node.inputs)
    if any(value is not None for value in inputs[len(INPUTS) :]):
        raise ValueError(f"node {node.name!r}: {node.op_type} takes {len(INPUTS)} inputs, got {len(inputs)}")
    # Query, key and value are there whatever is known of them.
    named = enumerate(zip(INPUTS, inputs, strict=False))
    given = {name: value for i, (name, value) in named if i < 3 or value is not None}
    pair = ("additional_keys", "additional_values")
    if len(missing := [name for name in pair if name not in given]) == 1:
        raise ValueError(f"node {node.name!r}: {' and '.join(pair)} come together, {missing[0]} is missing")
    attributes = {name: _value(node.attributes[name]) for name in ATTRIBUTES if name in node.attributes}
    values = given.values()
    return Signature(node.op_type, tuple(map(_shape, values)), tuple(map(_dtype, values)), attributes, tuple(given))


def problems(model: Source) -> dict[Problem, int]:
    """Return the problems that a model poses, in the order of its nodes, and how many nodes pose each.

    Parameters
    ----------
    model
        A path, a ``ModelProto``, or an ``onnx_ir.Model``. Weights are not read.

    Returns
    -------
    dict
        From problem to number of nodes.

    Raises
    ------
    ValueError
        If a node's attributes and inputs do not fit each other, or its layout, heads or head_dim are not fixed; the
        message names the node.

    Examples
    --------
    >>> problems("classifier.onnx")  # doctest: +SKIP
    """
    loaded = load(model)
    if any(value is not None and value.shape is None for node in attention_nodes(loaded) for value in node.inputs):
        loaded = ShapeInferencePass(strict_mode=False, data_prop=True)(loaded).model
    found: dict[Problem, int] = {}
    for node in attention_nodes(loaded):
        try:
            problem = node_signature(node).problem()
        except ValueError as error:
            raise ValueError(f"node {node.name!r}: {error}") from error
        if problem is None:
            shapes = [None if value is None else str(value.shape) for value in node.inputs[:3]]
            raise ValueError(
                f"node {node.name!r} poses no fixed problem: its inputs have shapes {', '.join(map(str, shapes))}, and "
                "only the batch and the number of additional keys may be dynamic; export with a fixed layout"
            )
        found[problem] = found.get(problem, 0) + 1
    return found


def _is_attention(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in OPERATORS


def _value(attribute: ir.Attr) -> Any:
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _dtype(value: ir.Value | None) -> str | None:
    if value is None or value.dtype is None:
        return None
    return _DTYPES.get(value.dtype, value.dtype.name.lower())
