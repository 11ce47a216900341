"""Reading the operators' nodes in a model: which there are, and which problems they pose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from na_compiler import operands
from na_compiler.onnx import schema  # noqa: F401  (shape inference needs the schemas)
from na_compiler.onnx.signature import ATTRIBUTES, DOMAIN, INPUTS, OPERATORS, OUTPUTS, VERSION, Signature
from na_compiler.operands import PARAMETERS
from na_compiler.problem import Problem

__all__ = [
    "attention_nodes",
    "check_version",
    "load",
    "located_nodes",
    "name_of",
    "node_signature",
    "problems",
    "with_functions_inlined",
    "with_shapes",
]

Source = str | os.PathLike[str] | ir.Model | onnx.ModelProto
# Of attributes that are numbers.
_KINDS = {
    operand.name: ir.AttributeType.INT if operand.dtype == "int64" else ir.AttributeType.FLOAT
    for operand in operands.scalars()
} | {operand.name: ir.AttributeType.STRING for operand in operands.words()}
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
    return (node for _, node in located_nodes(model))


def located_nodes(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Yield the nodes of the operators, each with the path of the graph that it is in; ``""`` is the model's own.

    Nodes of different graphs may have one name: they are told apart by the path.
    """
    graphs = [("", model.graph)]
    graphs += [
        ("::".join(filter(None, function.identifier())), function.graph)
        for function in model.functions.values()
        if function.domain != DOMAIN
    ]
    for path, graph in graphs:
        yield from _located(graph, path)


def _located(graph: ir.Graph, path: str) -> Iterator[tuple[str, ir.Node]]:
    seen: set[str] = set()
    for place, node in enumerate(graph):
        if _is_attention(node):
            yield path, node
        bodies = [(name, body) for name, attribute in node.attributes.items() for body in _graphs(attribute)]
        if not bodies:
            continue
        name = node.name or node.op_type
        unique = f"{name}#{place}" if name in seen else name
        seen.add(name)
        for i, (attribute, body) in enumerate(bodies):
            several = f"[{i}]" if [name for name, _ in bodies].count(attribute) > 1 else ""
            yield from _located(body, f"{path}{'/' if path else ''}{unique}.{attribute}{several}")


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def name_of(node: ir.Node) -> str:
    """Return what a node is called: its name, which it need not have, or else its first output's."""
    return node.name or next((output.name for output in node.outputs if output.name), None) or node.op_type


def with_functions_inlined(model: ir.Model) -> ir.Model:
    """Return a model in which every node of the operators is in a graph: one in a function may pose several problems.

    The model itself where that is so already, or else a copy. Bodies of the operators are not kept in that.
    """
    functions = [function for function in model.functions.values() if function.domain != DOMAIN]
    if not any(_is_attention(node) for function in functions for node in function.all_nodes()):
        return model
    made = model.clone()
    for identifier in [identifier for identifier in made.functions if identifier[0] == DOMAIN]:
        del made.functions[identifier]
    return InlinePass()(made).model


def with_shapes(model: ir.Model) -> ir.Model:
    """Return a model with shapes inferred, where those of attention are not all known: itself, or a copy."""
    if _is_complete(model):
        return model
    made = model.clone()
    for node in attention_nodes(made):
        for output in node.outputs:
            output.shape = None  # It follows from the inputs; exporters may have written symbols of their own.
    made = _inferred(made)
    if not _is_complete(made):
        # Inference follows the values of few operators: torch's exporter before the one on torch.export computes
        # the shape of a Reshape with others, of constants.
        from onnxscript.optimizer import fold_constants  # noqa: PLC0415 - it takes a second to load

        fold_constants(made)
        made = _inferred(made)
    return made


def _inferred(model: ir.Model) -> ir.Model:
    return ShapeInferencePass(strict_mode=False, data_prop=True)(model).model


def _is_complete(model: ir.Model) -> bool:
    return not any(map(_is_unknown, attention_nodes(model)))


def _is_unknown(node: ir.Node) -> bool:
    """Return whether a size that is part of the problem is not known."""
    for place, value in enumerate(node.inputs):
        if value is None:
            continue
        if value.shape is None:
            return True
        if place < 3 and not all(isinstance(size, int) for size in list(value.shape)[1:]):
            return True
    return False


def check_version(model: ir.Model) -> None:
    """Check that a model's nodes of the operators are of the version that is known here.

    Raises
    ------
    ValueError
        If it imports another version of the domain.
    """
    owners = [(model.graph, model.opset_imports)]
    owners += [
        (function.graph, function.opset_imports) for function in model.functions.values() if function.domain != DOMAIN
    ]
    for graph, imports in owners:
        version = imports.get(DOMAIN, VERSION)
        if version != VERSION and any(map(_is_attention, graph.all_nodes())):
            raise ValueError(
                f"the model's operators are of version {version} of the domain {DOMAIN}, and version {VERSION} is what "
                f"is known here; export it anew, or update na-compiler"
            )


def node_signature(node: ir.Node) -> Signature:
    """Return what a node says of itself, and of its inputs as far as the model knows them.

    Raises
    ------
    ValueError
        If it has an attribute, an input or an output that the operator has not, lacks one that it needs, or only one of
        the additional inputs is there.
    """
    inputs = list(node.inputs)
    if any(value is not None for value in inputs[len(INPUTS) :]):
        raise ValueError(f"{node.op_type} takes {len(INPUTS)} inputs, got {len(inputs)}")
    given = {name: value for name, value in zip(INPUTS, inputs, strict=False) if value is not None}
    absent = [operand.name for operand in operands.inputs() if not operand.is_later and operand.name not in given]
    if absent:
        raise ValueError(f"{node.op_type} needs {', '.join(absent)}, and the node has none")
    for option in operands.options():
        names = operands.together(option)
        missing = [name for name in names if name not in given]
        if missing and len(missing) < len(names):
            raise ValueError(f"{' and '.join(names)} come together, {missing[0]} is missing")
    if len(node.outputs) > len(OUTPUTS):
        raise ValueError(f"{node.op_type} has the outputs {' and '.join(OUTPUTS)}, got {len(node.outputs)} outputs")
    attributes = {name: _value(node.op_type, name, attribute) for name, attribute in node.attributes.items()}
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
    check_version(loaded)
    loaded = with_functions_inlined(loaded)
    loaded = with_shapes(loaded)
    found: dict[Problem, int] = {}
    for node in attention_nodes(loaded):
        try:
            problem = node_signature(node).problem()
        except ValueError as error:
            raise ValueError(f"node {name_of(node)!r}: {error}") from error
        if problem is None:
            shapes = ", ".join(str(None if value is None else value.shape) for value in node.inputs[:3])
            raise ValueError(
                f"node {name_of(node)!r} poses no fixed problem: its inputs have shapes {shapes}, and "
                "only the batch and the number of additional keys may be dynamic; export with a fixed layout"
            )
        found[problem] = found.get(problem, 0) + 1
    return found


def _is_attention(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in OPERATORS


def _value(operator: str, name: str, attribute: ir.Attr) -> object:
    if name not in ATTRIBUTES:
        raise ValueError(f"{operator} has no attribute {name}; its attributes are {', '.join(ATTRIBUTES)}")
    if attribute.is_ref():
        raise ValueError(f"{name} is an attribute of the function around the node, and not known")
    kind = ir.AttributeType.INTS if name in PARAMETERS else _KINDS[name]
    if attribute.type != kind:
        raise ValueError(f"{name} must be of type {kind.name}, got {attribute.type.name}")
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _dtype(value: ir.Value | None) -> str | None:
    if value is None or value.dtype is None:
        return None
    return _DTYPES.get(value.dtype, value.dtype.name.lower())
