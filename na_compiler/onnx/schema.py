"""Schemas of the operators with type and shape inference, registered with the onnx package when this is imported."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import onnx
from onnx.defs import OpSchema

from na_compiler import operands
from na_compiler.onnx.signature import (
    ATTRIBUTES,
    DOMAIN,
    DTYPES,
    INPUTS,
    OPERATORS,
    OUTPUTS,
    VERSION,
    Signature,
    default_attribute,
)
from na_compiler.operands import PARAMETERS, SAME, Operand

if TYPE_CHECKING:
    from onnx.onnx_cpp2py_export.shape_inference import InferenceContext

    _Size = onnx.TensorShapeProto.Dimension

__all__ = ["register_schemas", "schema"]

_AXES = {1: "X", 2: "X, Y", 3: "X, Y, Z"}
_PARAMETERS = {
    "kernel_size": "Window along each axis in tokens of a dilation group, at least 1; times dilation at most the axis.",
    "stride": "Queries along each axis that share one window, in [1, kernel_size].",
    "dilation": "Distance between neighbors along each axis, at least 1.",
    "is_causal": "For each axis 1 if a query sees no key after itself, else 0.",
}
# Of operands whose type is not the model's.
_TYPES = {"float32": "tensor(float)", "bool": "tensor(bool)", "int64": "tensor(int64)"}
_ELEMENT_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.BOOL: "bool",
}


@functools.cache
def schema(operator: str) -> OpSchema:
    """Return the schema of an operator.

    Parameters
    ----------
    operator
        ``"NA1D"``, ``"NA2D"`` or ``"NA3D"``.

    Examples
    --------
    >>> [parameter.name for parameter in schema("NA2D").inputs]
    ['query', 'key', 'value', 'additional_keys', 'additional_values', 'relative_position_bias', 'key_mask']
    """
    rank = OPERATORS[operator]
    made = OpSchema(
        operator,
        DOMAIN,
        VERSION,
        doc=f"Neighborhood attention over {rank} ax{'es' if rank > 1 else 'is'}; see docs/onnx-operators.md.",
        inputs=[_parameter(operand, rank) for operand in operands.inputs()],
        # All but the first may be left out.
        outputs=[_parameter(operand, rank, optional=i > 0) for i, operand in enumerate(operands.outputs())],
        type_constraints=[("T", list(DTYPES.values()), "Of query, key, value and output.")],
        attributes=[
            *(_attribute(name, rank) for name in PARAMETERS),
            *map(_number, (*operands.scalars(), *operands.words())),
        ],
    )
    made.set_type_and_shape_inference_function(functools.partial(_infer, operator))
    return made


def register_schemas() -> None:
    """Register the schemas with the onnx package; a second time does nothing. Importing `na_compiler.onnx` does it."""
    for operator in OPERATORS:
        if not onnx.defs.has(operator, DOMAIN):
            onnx.defs.register_schema(schema(operator))


def _parameter(operand: Operand, rank: int, *, optional: bool = False) -> OpSchema.FormalParameter:
    kinds = OpSchema.FormalParameterOption
    shape = ", ".join(_AXES[rank] if term == "layout" else term for term in operand.shape)
    return OpSchema.FormalParameter(
        operand.name,
        "T" if operand.dtype == SAME else _TYPES[operand.dtype],
        f"[{shape}]{': ' if operand.text else ''}{operand.text}.",
        param_option=kinds.Optional if optional or operand.is_later else kinds.Single,
    )


def _attribute(name: str, rank: int) -> OpSchema.Attribute:
    if name == "kernel_size":
        return OpSchema.Attribute(name, OpSchema.AttrType.INTS, _PARAMETERS[name], required=True)
    return OpSchema.Attribute(name, onnx.helper.make_attribute(name, default_attribute(name, rank)), _PARAMETERS[name])


def _number(operand: Operand) -> OpSchema.Attribute:
    text = f"{operand.text[:1].upper()}{operand.text[1:]}."
    if operand.default is not None:
        return OpSchema.Attribute(operand.name, onnx.helper.make_attribute(operand.name, operand.default), text)
    kind = OpSchema.AttrType.INT if operand.dtype == "int64" else OpSchema.AttrType.FLOAT
    return OpSchema.Attribute(operand.name, kind, text, required=False)


def _infer(operator: str, context: InferenceContext) -> None:
    """Infer types and shapes of a node's outputs, or refuse the node."""
    types = [context.get_input_type(i) if context.has_input(i) else None for i in range(context.get_num_inputs())]
    # An input whose type is not known looks like one that is absent. What may be left out changes no output's shape.
    options = [operand.option for operand in operands.inputs()]
    there = {None, *(option for option, type_ in zip(options, types, strict=False) if type_ is not None)}
    given = [i for i in range(len(types)) if options[i] in there]
    attributes = {name: context.get_attribute(name) for name in ATTRIBUTES}
    try:
        signature = Signature(
            operator,
            tuple(_sizes(types[i]) for i in given),
            tuple(_dtype(types[i]) for i in given),
            {name: onnx.helper.get_attribute_value(a) for name, a in attributes.items() if a is not None},
            tuple(INPUTS[i] for i in given),
        )
        signature.problem()
    except (TypeError, ValueError) as error:
        raise onnx.shape_inference.InferenceError(f"{context.get_display_name()}: {error}") from None
    for i, result in enumerate(_outputs(signature.rank, types)[: context.get_num_outputs()]):
        context.set_output_type(i, result)


def _outputs(rank: int, types: list[onnx.TypeProto | None]) -> list[onnx.TypeProto]:
    """Return the types of the outputs; sizes that are not known keep their symbol."""
    element = next((t.tensor_type.elem_type for t in types if t is not None), onnx.TensorProto.FLOAT)
    dims: list[list[_Size | None]] = [[None] * (rank + 3) for _ in range(3)]
    for i, given in enumerate(types[:3]):
        if given is not None and given.tensor_type.HasField("shape"):
            dims[i] = list(given.tensor_type.shape.dim)
    # What one input does not know another may.
    tokens = [_best([dims[i][axis] for i in range(3)]) for axis in range(rank + 1)]
    lse = [*tokens, dims[0][-2]]
    results = []
    for kind, shape in ((element, [*lse, dims[2][-1]]), (onnx.TensorProto.FLOAT, lse)):
        proto = onnx.TypeProto()
        proto.tensor_type.elem_type = kind
        for size in shape:
            new = proto.tensor_type.shape.dim.add()
            if size is not None:
                new.CopyFrom(size)
        results.append(proto)
    assert len(results) == len(OUTPUTS)
    return results


def _best(dims: list[_Size | None]) -> _Size | None:
    """Return the first size that is a number, or else the first that has a symbol."""
    for field in ("dim_value", "dim_param"):
        for dim in dims:
            if dim is not None and dim.HasField(field):
                return dim
    return None


def _sizes(given: onnx.TypeProto | None) -> tuple[int | None, ...] | None:
    if given is None or not given.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in given.tensor_type.shape.dim)


def _dtype(given: onnx.TypeProto | None) -> str | None:
    if given is None or not given.tensor_type.elem_type:
        return None
    kind = given.tensor_type.elem_type
    return _ELEMENT_TYPES.get(kind) or str(onnx.TensorProto.DataType.Name(kind)).lower()


register_schemas()
