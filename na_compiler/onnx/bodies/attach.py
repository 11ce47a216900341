"""`add_bodies`: gives a model a function for each operator it uses."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnx_ir.tape import Tape

from na_compiler import operands
from na_compiler.borders import CLAMP
from na_compiler.onnx.bodies.blocked import blocked_body
from na_compiler.onnx.bodies.expression import Interface
from na_compiler.onnx.bodies.generic import COMPUTED, generic_body
from na_compiler.onnx.names import FreshNames
from na_compiler.onnx.nodes import attention_nodes, check_version, name_of, node_signature, with_shapes
from na_compiler.onnx.signature import DOMAIN, INPUTS, VERSION, Signature, default_attribute
from na_compiler.operands import PARAMETERS
from na_compiler.problem import Problem
from na_compiler.window import SHIFT

__all__ = ["BODIES", "MINIMUM_OPSET", "add_bodies"]

_LOG = logging.getLogger("na_compiler")

BODIES = ("generic", "blocked")
MINIMUM_OPSET = 18


def add_bodies(model: ir.Model, body: str = "generic") -> None:
    """Give a model a function for each of the operators that it uses, in place.

    Parameters
    ----------
    model
        Changed: its nodes get the attributes that they leave to defaults, which a function could not see.
    body
        ``"generic"``: one function for each operator, right for every layout. ``"blocked"``: for each node with a
        fixed layout another one besides, which takes a fraction of the time and the memory.

    Raises
    ------
    ValueError
        For another body, a model of an opset under 18, a node whose inputs do not fit its attributes, or one with an
        operand or a border that bodies do not compute, or with another border than one before it.
    """
    if body not in BODIES:
        raise ValueError(f"body must be one of {', '.join(BODIES)}, got {body!r}")
    nodes = list(attention_nodes(model))
    if not nodes:
        return
    opset = model.opset_imports.get("", 0)
    if opset < MINIMUM_OPSET:
        raise ValueError(f"bodies need opset {MINIMUM_OPSET} or later, the model has {opset}; export with a later one")
    check_version(model)
    names = FreshNames(model)
    _prepare(model, nodes)
    for operator in dict.fromkeys(node.op_type for node in nodes):
        own = [node for node in nodes if node.op_type == operator]
        interface = Interface(_agree_on_options(own, names), _agree_on_lse(own, names), _agree_on_border(own))
        if body == "blocked":
            _specialise(model, own, opset, interface)
        # After the specialised ones: onnx's evaluator, which ignores overloads, takes the last of a name.
        function = generic_body(operator, opset, interface)
        model.functions[function.identifier()] = function


def _prepare(model: ir.Model, nodes: list[ir.Node]) -> None:
    """Remove bodies that there are, and have nodes say everything that a body needs to know."""
    model.opset_imports.setdefault(DOMAIN, VERSION)
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    for node, known in zip(nodes, attention_nodes(with_shapes(model)), strict=True):
        for value, inferred in zip(node.inputs, known.inputs, strict=True):
            if value is not None and inferred is not None and inferred.shape is not None:
                value.shape = inferred.shape
                if inferred.dtype is not None:
                    value.dtype = inferred.dtype
    for node in nodes:
        node.overload = ""
        _complete(node)


def _specialise(model: ir.Model, nodes: list[ir.Node], opset: int, interface: Interface) -> None:
    """Give each node with a fixed layout a function for its problem, by an overload of the operator."""
    for node in nodes:
        problem = node_signature(node).problem()
        if problem is None:
            _LOG.warning("node %s has no fixed layout: it gets the generic body", name_of(node))
            continue
        node.overload = _overload(problem)
        function = blocked_body(node.op_type, opset, problem, node.overload, interface)
        model.functions[function.identifier()] = function


def _overload(problem: Problem) -> str:
    """Return a name for a problem: readable, and with the rest of it as a hash."""
    rest = hashlib.sha256(repr(problem.replace(dtype="float32")).encode()).hexdigest()[:8]
    return f"{'x'.join(map(str, problem.layout))}_k{'x'.join(map(str, problem.kernel_size))}_{rest}"


def _complete(node: ir.Node) -> None:
    """Write the attributes that a node leaves to their defaults: inside a function an absent attribute is an error."""
    try:
        signature = node_signature(node)
        signature.problem()
        scale = signature.scale()
        _check_computed(signature)
    except ValueError as error:
        raise ValueError(f"node {name_of(node)!r}: {error}") from error
    for name, default in operands.defaults().items():
        # A function has no such attribute: what it computes is that default.
        if name in node.attributes and node.attributes[name].value == default:
            del node.attributes[name]
    for name in PARAMETERS:
        if name not in node.attributes:
            node.attributes.add(ir.AttrInt64s(name, default_attribute(name, signature.rank)))
    if "scale" not in node.attributes:
        if scale is None:
            raise ValueError(
                f"node {name_of(node)!r} needs the attribute scale: head_dim, which it would follow from, is not known"
            )
        node.attributes.add(ir.AttrFloat32("scale", scale))


def _check_computed(signature: Signature) -> None:
    """Refuse what bodies would leave out. A number that is its default may be left out."""
    numbers = {name: value for name, value in signature.attributes.items() if name not in PARAMETERS}
    given = [*signature.names, *(name for name, value in numbers.items() if value != operands.defaults().get(name))]
    unknown = [name for name in given if name not in COMPUTED]
    if CLAMP in signature.border():
        unknown.append(f"border={CLAMP!r}")
    if unknown:
        raise ValueError(
            f"bodies do not compute {' and '.join(unknown)}: leave bodies out (torch.onnx.export with "
            "translation_table()), and run the model with the operator library"
        )


def _agree_on_border(nodes: list[ir.Node]) -> tuple[str, ...]:
    """Return what windows of an operator's function do at the ends of axes; none where nodes do not say it.

    Raises
    ------
    ValueError
        If nodes differ: onnx's evaluator takes one function for all nodes of an operator.
    """
    first, *others = [node_signature(node).border() for node in nodes]
    for node, border in zip(nodes[1:], others, strict=True):
        if border != first:
            raise ValueError(
                f"node {name_of(node)!r}: bodies compute one border for all nodes of {node.op_type}, got {border} "
                f"beside {first}; leave bodies out (translation_table()), and run the model with the operator library"
            )
    return () if set(first) == {SHIFT} else first


def _agree_on_lse(nodes: list[ir.Node], names: FreshNames) -> bool:
    """Return whether an operator's function returns lse: if that of any node is read.

    Then all of its nodes name theirs: ONNX Runtime refuses one with fewer outputs than its function. Where nobody reads
    any, no node has it: a float32 output that is not needed is what converters to float16 break on.
    """
    reads = [any(output.uses() or output.is_graph_output() for output in node.outputs[1:]) for node in nodes]
    for node in nodes:
        node.resize_outputs(2 if any(reads) else 1)
        for output in node.outputs[1:]:
            output.name = output.name or names(f"{node.outputs[0].name}_lse")
    return any(reads)


def _agree_on_options(nodes: list[ir.Node], names: FreshNames) -> frozenset[str]:
    """Return what an operator's function takes beside query, key and value; all its nodes have that from now on."""
    owners = {operand.name: operand.option for operand in operands.inputs() if operand.option is not None}
    takes = [{owners[name] for name in node_signature(node).names if name in owners} for node in nodes]
    options = frozenset[str]().union(*takes)
    for option in sorted(options):
        for node in (node for node, own in zip(nodes, takes, strict=True) if option not in own):
            _STAND_INS[option](node, names)
    return options


def _add_additional(node: ir.Node, names: FreshNames) -> None:
    """Give a node without additional keys some: none of them. A function has one number of inputs for all its nodes."""
    rank = node_signature(node).rank
    tape = Tape()
    empty = []
    for tensor in node.inputs[1:3]:
        axes = list(range(1, rank + 1))
        ints = [tape.op("Constant", [], {"value_ints": each}) for each in ([0] * rank, [0] + [1] * (rank - 1), axes)]
        sliced = tape.op("Slice", [tensor, *ints])
        if rank > 1:
            last = tape.op("Constant", [], {"value_ints": axes[1:]})
            sliced = tape.op("Squeeze", [sliced, last])
        empty.append(sliced)
        assert tensor is not None
        if tensor.dtype is not None:
            sliced.dtype = tensor.dtype
        if tensor.shape is not None:
            sliced.shape = ir.Shape([tensor.shape[0], 0, *tensor.shape[-2:]])
    _give(node, names, tape, dict(zip(("additional_keys", "additional_values"), empty, strict=True)))


def _add_bias(node: ir.Node, names: FreshNames) -> None:
    """Give a node without a bias by relative position one of zeros."""
    rank = node_signature(node).rank
    tape = Tape()
    heads = tape.op("Shape", [node.inputs[0]], {"start": rank + 1, "end": rank + 2})
    places = [2 * extent - 1 for extent in node.attributes["kernel_size"].as_ints()]
    shape = tape.op("Concat", [heads, tape.op("Constant", [], {"value_ints": places})], {"axis": 0})
    bias = tape.op("ConstantOfShape", [shape], {"value": ir.tensor([0.0], dtype=ir.DataType.FLOAT)})
    bias.dtype = ir.DataType.FLOAT
    bias.shape = ir.Shape([None, *places])
    _give(node, names, tape, {operands.RELATIVE_POSITION_BIAS: bias})


def _add_mask(node: ir.Node, names: FreshNames) -> None:
    """Give a node without a key mask one that hides nothing."""
    rank = node_signature(node).rank
    tape = Tape()
    shape = tape.op("Shape", [node.inputs[0]], {"start": 0, "end": rank + 1})
    mask = tape.op("ConstantOfShape", [shape], {"value": ir.tensor([True], dtype=ir.DataType.BOOL)})
    mask.dtype = ir.DataType.BOOL
    query = node.inputs[0]
    if query is not None and query.shape is not None:
        mask.shape = ir.Shape(query.shape[: rank + 1])
    _give(node, names, tape, {operands.KEY_MASK: mask})


def _give(node: ir.Node, names: FreshNames, tape: Tape, inputs: Mapping[str, ir.Value]) -> None:
    """Give a node more inputs, by name, and put what makes them before it."""
    graph = node.graph
    assert graph is not None
    for made in tape.nodes:
        made.name = names(f"{name_of(node)}_{made.op_type}")
        for output in made.outputs:
            output.name = names(f"{made.name}_output")
    graph.insert_before(node, tape.nodes)
    places = {INPUTS.index(name): value for name, value in inputs.items()}
    node.resize_inputs(max(len(node.inputs), max(places) + 1))
    for place, value in places.items():
        node.replace_input_with(place, value)


# What nodes without an option get where others of their operator have it: inputs that change nothing.
_STAND_INS: Mapping[str, Callable[[ir.Node, FreshNames], None]] = {
    operands.ADDITIONAL_KV: _add_additional,
    operands.RELATIVE_POSITION_BIAS: _add_bias,
    operands.KEY_MASK: _add_mask,
}
