"""*canonicalise* for ONNX models: attention whose constant mask is exactly a neighborhood becomes our operator.

Two spellings are known: the operator ``Attention`` of opset 23, and what torch's exporter writes before it, which is
``MatMul(Softmax(Add(MatMul(query, key^T), mask)), value)`` with the scale multiplied into query and key.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from na_compiler.onnx.bodies import add_bodies
from na_compiler.onnx.signature import DOMAIN, VERSION
from na_compiler.passes.masks import Mask, Neighborhood, mask_of_bias, recognize

__all__ = ["canonicalise_onnx"]

_LOG = logging.getLogger("na_compiler")
_HEADS_LAST = (0, 2, 1, 3)


@dataclass(frozen=True)
class _Masked:
    """Attention with a mask: ``[batch, heads, tokens, head_dim]`` in and out."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    scale: float | None
    output: ir.Value


def canonicalise_onnx(model: ir.Model) -> int:
    """Replace attention that a constant mask makes neighborhood attention, in place; returns how many there were.

    Parameters
    ----------
    model
        An ``onnx_ir.Model``. Nodes that become superfluous are removed; the new ones have bodies, so that the model
        runs in every runtime.
    """
    known: dict[ir.Value, Neighborhood | None] = {}
    count = 0
    for node in list(model.graph):
        masked = _attention(node) or _decomposed(node)
        if masked is None:
            continue
        if masked.mask not in known:
            mask = _mask(masked.mask)
            known[masked.mask] = None if mask is None else recognize(mask)
        neighborhood = known[masked.mask]
        if neighborhood is not None and _fits(masked, neighborhood):
            _LOG.info("%s: its mask is a neighborhood, %s", node.name, neighborhood)
            _replace(model, node, masked, neighborhood)
            count += 1
    if count:
        model.opset_imports[DOMAIN] = VERSION
        ir.passes.common.RemoveUnusedNodesPass()(model)
        add_bodies(model)
    return count


def _attention(node: ir.Node) -> _Masked | None:
    """Match the operator ``Attention``."""
    if node.op_type != "Attention" or node.domain not in {"", "ai.onnx"} or len(node.inputs) < 4:
        return None
    query, key, value, mask, *rest = node.inputs
    attributes = node.attributes
    is_plain = not any(
        name in attributes and attributes[name].value
        for name in ("is_causal", "softcap", "q_num_heads", "kv_num_heads")
    )
    uses = any(output.uses() for output in node.outputs[1:])
    if not is_plain or uses or any(rest) or query is None or key is None or value is None or mask is None:
        return None
    scale = attributes["scale"].as_float() if "scale" in attributes else None
    return _Masked(query, key, value, mask, scale, node.outputs[0])


def _decomposed(node: ir.Node) -> _Masked | None:
    """Match the last ``MatMul`` of attention that is spelled out."""
    if node.op_type != "MatMul" or node.domain:
        return None
    weights, value = node.inputs
    softmax = _producer(_without_nan_guard(weights), "Softmax")
    if softmax is None or value is None or softmax.attributes.get_int("axis", -1) not in {-1, 3}:
        return None
    add = _producer(softmax.inputs[0], "Add")
    if add is None:
        return None
    scores, mask = (
        add.inputs if add.inputs[1] is not None and _constant(add.inputs[1]) is not None else add.inputs[::-1]
    )
    product = _producer(scores, "MatMul")
    if product is None or mask is None or _constant(mask) is None:
        return None
    query, query_scale = _scaled(product.inputs[0])
    transposed, key_scale = _scaled(product.inputs[1])
    key = _transposed(transposed)
    if query is None or key is None:
        return None
    return _Masked(query, key, value, mask, query_scale * key_scale, node.outputs[0])


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and not node.domain else None


def _without_nan_guard(value: ir.Value | None) -> ir.Value | None:
    """Look through ``Where(IsNaN(x), 0, x)``: no row of a neighborhood is hidden as a whole."""
    where = _producer(value, "Where")
    if where is not None and _producer(where.inputs[0], "IsNaN") is not None:
        return where.inputs[2]
    return value


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Look through a multiplication by a constant number."""
    multiply = _producer(value, "Mul")
    if multiply is not None:
        for factor, other in (multiply.inputs, multiply.inputs[::-1]):
            number = _constant(factor)
            if number is not None and number.size == 1:
                return other, float(number.reshape(()))
    return value, 1.0


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """Return what a value is the transpose of, in its last two axes."""
    direct = _producer(value, "Transpose")
    if direct is not None:
        return direct.inputs[0] if _perm(direct) == (0, 1, 3, 2) else None
    # torch's exporter folds the leading axes into one around the transpose.
    unfold = _producer(value, "Reshape")
    transpose = _producer(unfold.inputs[0], "Transpose") if unfold else None
    fold = _producer(transpose.inputs[0], "Reshape") if transpose else None
    if unfold is None or transpose is None or fold is None or _perm(transpose) != (0, 2, 1):
        return None
    source = fold.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return None
    batch, heads, tokens, width = (_size(size) for size in source.shape)
    folded, unfolded = _shape_value(fold.inputs[1]), _shape_value(unfold.inputs[1])
    if folded != [-1, tokens, width] or unfolded != [batch, heads, width, tokens]:
        return None
    return source


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size)


def _shape_value(value: ir.Value | None) -> list[int | str] | None:
    """Return what a tensor of sizes holds: numbers, and names of dynamic dimensions."""
    number = _constant(value)
    if number is not None:
        return [int(size) for size in number.reshape(-1)]
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Shape":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        return None if shape is None else [_size(size) for size in shape]
    if node.op_type == "Concat":
        parts = [_shape_value(part) for part in node.inputs]
        return None if any(part is None for part in parts) else [size for part in parts for size in part or ()]
    if node.op_type == "Slice" and len(node.inputs) == 3:
        whole, bounds = _shape_value(node.inputs[0]), [_constant(bound) for bound in node.inputs[1:]]
        if whole is not None and bounds[0] is not None and bounds[1] is not None:
            return whole[int(bounds[0].item()) : int(bounds[1].item())]
    return None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def _mask(value: ir.Value) -> Mask | None:
    """Return a constant mask as booleans; ``None`` where it is none, or adds more than nothing and minus infinity."""
    found = _constant(value)
    if found is None or found.ndim < 2 or any(size != 1 for size in found.shape[:-2]):
        return None
    mask = found.reshape(found.shape[-2:])
    if mask.dtype == bool:
        return mask
    try:
        lowest = ml_dtypes.finfo(mask.dtype).min  # type: ignore[no-untyped-call]  # Of bfloat16 too, which NumPy does not know.
    except ValueError:
        return None
    return mask_of_bias(mask.astype(np.float64), float(lowest))


def _fits(masked: _Masked, neighborhood: Neighborhood) -> bool:
    """Return whether query, key and value are ``[batch, heads, tokens, head_dim]`` of as many tokens as the mask."""
    tokens = int(np.prod(neighborhood.layout))
    for value in (masked.query, masked.key, masked.value):
        if value.shape is None or len(value.shape) != 4 or value.shape[2] != tokens:
            return False
        if not isinstance(value.shape[1], int) or not isinstance(value.shape[3], int):
            return False
    return True


def _replace(model: ir.Model, node: ir.Node, masked: _Masked, neighborhood: Neighborhood) -> None:
    layout, rank = neighborhood.layout, len(neighborhood.layout)
    made: list[ir.Node] = []

    def call(kind: str, *inputs: ir.Value, domain: str = "", outputs: int = 1, **attributes: object) -> ir.Value:
        found = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]  # type: ignore[arg-type]
        added = ir.Node(domain, kind, inputs, found, num_outputs=outputs, name=f"{node.name}_{kind}_{len(made)}")
        for place, output in enumerate(added.outputs):
            output.name = f"{added.name}_{place}"
        made.append(added)
        return added.outputs[0]

    def sizes(*values: int) -> ir.Value:
        return call("Constant", value=ir.tensor(np.array(values, np.int64)))

    def as_layout(value: ir.Value) -> ir.Value:
        assert value.shape is not None
        batch, heads, _, width = value.shape
        turned = call("Transpose", value, perm=_HEADS_LAST)
        shaped = turned if rank == 1 else call("Reshape", turned, sizes(0, *layout, int(heads), int(width)))  # type: ignore[arg-type]
        _describe(shaped, value.dtype, ir.Shape([batch, *layout, heads, width]))
        return shaped

    query, key, value = (as_layout(tensor) for tensor in (masked.query, masked.key, masked.value))
    head_dim = int(query.shape[-1])  # type: ignore[index, arg-type]
    attended = call(
        f"NA{rank}D",
        query,
        key,
        value,
        domain=DOMAIN,
        outputs=2,
        kernel_size=list(neighborhood.kernel_size),
        stride=list(neighborhood.stride),
        dilation=list(neighborhood.dilation),
        is_causal=[int(flag) for flag in neighborhood.is_causal],
        scale=float(head_dim**-0.5 if masked.scale is None else masked.scale),
    )
    made[-1].metadata_props.update(node.metadata_props)
    assert query.shape is not None
    assert value.shape is not None
    _describe(attended, query.dtype, ir.Shape([*list(query.shape)[:-1], value.shape[-1]]))
    tokens = int(np.prod(layout))
    heads, width = int(query.shape[-2]), int(value.shape[-1])  # type: ignore[arg-type]
    flat = attended if rank == 1 else call("Reshape", attended, sizes(0, tokens, heads, width))
    output = call("Transpose", flat, perm=_HEADS_LAST)
    _describe(output, masked.output.dtype, masked.output.shape)
    model.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(masked.output, output, replace_graph_outputs=True)


def _describe(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    value.shape = shape
    if dtype is not None:
        value.dtype = dtype
