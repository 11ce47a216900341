"""Schemas of the operators with type and shape inference, registered with the onnx package when this is imported."""

from __future__ import annotations

import functools
from typing import Any

import onnx
from onnx.defs import OpSchema

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

__all__ = ["register_schemas", "schema"]

_AXES = {1: "X", 2: "X, Y", 3: "X, Y, Z"}
_DESCRIPTIONS = {
    "query": "[batch, {axes}, heads, head_dim].",
    "key": "[batch, {axes}, heads_kv, head_dim]; heads is a multiple of heads_kv.",
    "value": "[batch, {axes}, heads_kv, head_dim_v].",
    "additional_keys": "[batch, additional, heads_kv, head_dim]: seen by every query beside its window.",
    "additional_values": "[batch, additional, heads_kv, head_dim_v]; there if and only if additional_keys is.",
    "output": "[batch, {axes}, heads, head_dim_v].",
    "lse": "[batch, {axes}, heads]: natural logarithm of the sum of exponentials of the scaled scores.",
    "kernel_size": "Window along each axis in tokens of a dilation group, at least 1; times dilation at most the axis.",
    "stride": "Queries along each axis that share one window, in [1, kernel_size].",
    "dilation": "Distance between neighbors along each axis, at least 1.",
    "is_causal": "For each axis 1 if a query sees no key after itself, else 0.",
    "scale": "Of the scores. Default: 1 / sqrt(head_dim). 0 is 0.",
}
_ELEMENT_TYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
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
    ['query', 'key', 'value', 'additional_keys', 'additional_values']
    """
    rank = OPERATORS[operator]
    text = {name: description.format(axes=_AXES[rank]) for name, description in _DESCRIPTIONS.items()}
    optional = OpSchema.FormalParameterOption.Optional
    single = OpSchema.FormalParameterOption.Single
    made = OpSchema(
        operator,
        DOMAIN,
        VERSION,
        doc=f"Neighborhood attention over {rank} ax{'es' if rank > 1 else 'is'}; see docs/onnx-operators.md.",
        inputs=[
            OpSchema.FormalParameter(name, "T", text[name], param_option=optional if i >= 3 else single)
            for i, name in enumerate(INPUTS)
        ],
        outputs=[
            OpSchema.FormalParameter("output", "T", text["output"]),
            OpSchema.FormalParameter("lse", "tensor(float)", text["lse"], param_option=optional),
        ],
        type_constraints=[("T", list(DTYPES.values()), "Of query, key, value and output.")],
        attributes=[_attribute(name, rank, text[name]) for name in ATTRIBUTES],
    )
    made.set_type_and_shape_inference_function(functools.partial(_infer, operator))
    return made


def register_schemas() -> None:
    """Register the schemas with the onnx package; a second time does nothing. Importing `na_compiler.onnx` does it."""
    for operator in OPERATORS:
        if not onnx.defs.has(operator, DOMAIN):
            onnx.defs.register_schema(schema(operator))


def _attribute(name: str, rank: int, description: str) -> OpSchema.Attribute:
    if name == "scale":
        return OpSchema.Attribute(name, OpSchema.AttrType.FLOAT, description, required=False)
    if name == "kernel_size":
        return OpSchema.Attribute(name, OpSchema.AttrType.INTS, description, required=True)
    return OpSchema.Attribute(name, onnx.helper.make_attribute(name, default_attribute(name, rank)), description)


def _infer(operator: str, context: Any) -> None:
    """Infer types and shapes of a node's outputs, or refuse the node."""
    types = [context.get_input_type(i) if context.has_input(i) else None for i in range(context.get_num_inputs())]
    # An input whose type is not known looks like one that is absent. These two change nothing about the outputs.
    if not any(types[3:]):
        types = types[:3]
    attributes = {name: context.get_attribute(name) for name in ATTRIBUTES}
    try:
        signature = Signature(
            operator,
            tuple(map(_sizes, types)),
            tuple(map(_dtype, types)),
            {name: onnx.helper.get_attribute_value(a) for name, a in attributes.items() if a is not None},
        )
        signature.problem()
    except (TypeError, ValueError) as error:
        raise onnx.shape_inference.InferenceError(f"{context.get_display_name()}: {error}") from None
    for i, result in enumerate(_outputs(signature.rank, types)[: context.get_num_outputs()]):
        context.set_output_type(i, result)


def _outputs(rank: int, types: list[Any]) -> list[onnx.TypeProto]:
    """Return the types of the outputs; sizes that are not known keep their symbol."""
    element = next((t.tensor_type.elem_type for t in types if t is not None), onnx.TensorProto.FLOAT)
    dims: list[Any] = [[None] * (rank + 3) for _ in range(3)]
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


def _best(dims: list[Any]) -> Any:
    """Return the first size that is a number, or else the first that has a symbol."""
    for field in ("dim_value", "dim_param"):
        for dim in dims:
            if dim is not None and dim.HasField(field):
                return dim
    return None


def _sizes(given: Any) -> tuple[int | None, ...] | None:
    if given is None or not given.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in given.tensor_type.shape.dim)


def _dtype(given: Any) -> str | None:
    if given is None or not given.tensor_type.elem_type:
        return None
    kind = given.tensor_type.elem_type
    return _ELEMENT_TYPES.get(kind) or onnx.TensorProto.DataType.Name(kind).lower()


register_schemas()
