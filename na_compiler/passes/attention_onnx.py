"""Attention in ONNX models whose mask or window hides keys: what it reads, and which keys a query sees.

Two spellings are known: the operator ``Attention`` of opset 23 to 25, and what torch's exporter writes before it, which
is ``MatMul(Softmax(Add(MatMul(query, key^T), mask)), value)`` with the scale multiplied into query and key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from na_compiler.parameters import LONGEST_HEAD
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.passes.masks import LARGEST, Mask, Neighborhood, mask_of_bias, recognize
from na_compiler.window import CUT, SHIFT

__all__ = ["MaskedAttention", "match"]

# Versions of Attention, and what they have.
_VERSIONS = {23, 24, 25}
_ATTRIBUTES = {
    "is_causal", "kv_num_heads", "left_window_size", "q_num_heads", "qk_matmul_output_mode", "right_window_size",
    "scale", "softcap", "softmax_precision",
}  # fmt: skip
_ELEMENTS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
# Before this version Softmax is over all axes from one on.
_OLDEST = 13
# Constants that are numbers or shapes.
_SMALL = 64


@dataclass(frozen=True)
class MaskedAttention:
    """Attention that hides keys from queries.

    Parameters
    ----------
    query, key, value
        ``[batch, heads, tokens, head_dim]``, or ``[batch, tokens, heads * head_dim]``.
    output
        In the same order.
    heads
        Of queries, and of keys and values.
    scale
        Of the scores; ``None`` where it follows from head_dim.
    mask
        Constant; ``None`` where only the window hides anything.
    left, right
        Keys before and after itself that a query sees; -1 for all.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    heads: tuple[int, int]
    scale: float | None
    mask: ir.Value | None
    left: int = -1
    right: int = -1

    @property
    def is_flat(self) -> bool:
        """Whether heads lie beside each other in one axis."""
        return self.query.shape is not None and len(self.query.shape) == 3

    @property
    def tokens(self) -> int:
        """Tokens of queries, and of keys."""
        assert self.query.shape is not None
        return int(self.query.shape[-2])  # type: ignore[arg-type]

    def widths(self) -> tuple[int, int]:
        """Return the head_dim of queries and keys, and that of values."""
        sizes = []
        for tensor, heads in ((self.query, self.heads[0]), (self.value, self.heads[1])):
            assert tensor.shape is not None
            sizes.append(int(tensor.shape[-1]) // (heads if self.is_flat else 1))  # type: ignore[arg-type]
        return sizes[0], sizes[1]

    def neighborhood(self) -> Neighborhood:
        """Return the neighborhood that it is over.

        Raises
        ------
        DeclinedError
            If it is over none.
        """
        if self.mask is None:
            need(0 <= self.left < self.tokens - 1, "its window hides nothing but what comes later")
            need(self.right >= 0, "its window hides nothing but what came before")
            size, border = self.left + self.right + 1, SHIFT
            if self.right:
                border = CUT if self.left == size // 2 else f"{CUT}:{self.left}"
            return Neighborhood((self.tokens,), (size,), (1,), (1,), (not self.right,), (border,))
        mask = _mask(self.mask, self.tokens)
        if self.right >= 0:
            mask = np.tril(mask, self.right)
        if self.left >= 0:
            mask = np.triu(mask, -self.left)
        found = recognize(mask)
        if found is None:
            raise DeclinedError("its mask is no neighborhood")
        return found


def match(node: ir.Node, opset: int) -> MaskedAttention | None:
    """Return the attention that a node ends; ``None`` for one that is none, or hides no keys.

    Parameters
    ----------
    node
        ``Attention``, or the last ``MatMul`` of attention that is spelled out.
    opset
        Version of ONNX's own operators in its model.

    Raises
    ------
    DeclinedError
        If it has something that is not known here, or that our operators have not.
    """
    if node.domain not in {"", "ai.onnx"}:
        return None
    found = _attention(node, opset) if node.op_type == "Attention" else _decomposed(node)
    if found is not None:
        need(opset >= _OLDEST, f"the model is of opset {opset}; {_OLDEST} and later are known")
        _check(found)
    return found


def _attention(node: ir.Node, opset: int) -> MaskedAttention | None:
    """Match the operator ``Attention``."""
    inputs = [*node.inputs, *[None] * 4]
    query, key, value, mask = inputs[:4]
    numbers = {name: _number(attribute) for name, attribute in node.attributes.items()}
    left, right = numbers.get("left_window_size", -1), numbers.get("right_window_size", -1)
    if mask is None and left < 0 and right < 0:
        return None
    need(opset <= onnx.defs.onnx_opset_version(), f"opset {opset} is not known here")
    version = onnx.defs.get_schema("Attention", opset).since_version if opset >= min(_VERSIONS) else 0
    need(version in _VERSIONS, f"version {version} of Attention is not known here")
    unknown = sorted(set(numbers) - _ATTRIBUTES)
    need(not unknown, f"it has attributes that are not known here: {', '.join(unknown)}")
    need(not any(inputs[4:]), "it has a cache or a number of keys of each batch entry")
    need(not numbers.get("softcap"), "it has a soft cap")
    precision = numbers.get("softmax_precision", ir.DataType.FLOAT)
    need(precision in _ELEMENTS, "its softmax is in another precision than ours")
    need(not any(_is_read(output) for output in node.outputs[1:]), "it has more than one output that is read")
    need(numbers.get("is_causal", 0) in {0, 1}, "is_causal is neither 0 nor 1")
    if numbers.get("is_causal"):
        right = 0
    if query is None or key is None or value is None:
        raise DeclinedError("query, key or value is missing")
    heads = _heads(query, key, value, numbers)
    return MaskedAttention(query, key, value, node.outputs[0], heads, numbers.get("scale"), mask, left, right)


def _number(attribute: ir.Attr) -> Any:  # noqa: ANN401 - an int or a float, by its name
    need(not attribute.is_ref(), f"{attribute.name} is an attribute of the function around it")
    return attribute.value


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _heads(query: ir.Value, key: ir.Value, value: ir.Value, numbers: dict[str, Any]) -> tuple[int, int]:
    """Return the heads of queries and of keys and values, from shapes or, where these do not say, attributes."""
    shapes = [one.shape for one in (query, key, value)]
    ranks = {None if shape is None else len(shape) for shape in shapes}
    given = (numbers.get("q_num_heads", 0), numbers.get("kv_num_heads", 0))
    if ranks == {3}:
        need(min(given) > 0, "it does not say how many heads there are")
        return given
    need(ranks == {4} and given in {(0, 0), _sizes(shapes, 1)[:2]}, "the ranks of query, key and value are not known")
    return _four_heads(shapes)


def _sizes(shapes: list[Any], axis: int) -> tuple[Any, ...]:
    return tuple(shape[axis] for shape in shapes)


def _four_heads(shapes: list[Any]) -> tuple[int, int]:
    heads, of_key, of_value = _sizes(shapes, 1)
    known = all(isinstance(size, int) for size in (heads, of_key, of_value))
    need(known and of_key == of_value, f"heads of query, key and value are {heads}, {of_key} and {of_value}")
    return int(heads), int(of_key)


def _decomposed(node: ir.Node) -> MaskedAttention | None:
    """Match the last ``MatMul`` of attention that is spelled out."""
    if node.op_type != "MatMul" or len(node.inputs) != 2:
        return None
    weights, value = node.inputs
    softmax = _producer(_without_nan_guard(weights), "Softmax")
    if softmax is None or value is None or softmax.attributes.get_int("axis", -1) not in {-1, 3}:
        return None
    add = _producer(softmax.inputs[0], "Add")
    if add is None:
        return None
    scores, mask = add.inputs if _tensor(add.inputs[1]) is not None else add.inputs[::-1]
    product = _producer(scores, "MatMul")
    if product is None or mask is None or _tensor(mask) is None:
        return None
    query, query_scale = _scaled(product.inputs[0])
    transposed, key_scale = _scaled(product.inputs[1])
    key = _transposed(transposed)
    if query is None or key is None:
        return None
    shapes = [one.shape for one in (query, key, value)]
    need(all(shape is not None and len(shape) == 4 for shape in shapes), "query, key or value is not known to be 4-D")
    heads = _four_heads(shapes)
    # Products broadcast one head; other numbers of heads do not fit.
    need(heads[1] in {1, heads[0]}, f"heads of query and key are {heads[0]} and {heads[1]}")
    return MaskedAttention(query, key, value, node.outputs[0], heads, query_scale * key_scale, mask)


def _check(found: MaskedAttention) -> None:
    """Decline what our operators could not compute."""
    tensors = (found.query, found.key, found.value)
    dtypes = {tensor.dtype for tensor in tensors}
    names = ", ".join(sorted("unknown" if dtype is None else dtype.name.lower() for dtype in dtypes))
    known = len(dtypes) == 1 and dtypes <= _ELEMENTS
    need(known, f"kernels compute in float32, float16 and bfloat16, and it is in {names}")
    shapes = [list(tensor.shape or ()) for tensor in tensors]
    need(len({len(shape) for shape in shapes}) == 1, "query, key and value differ in rank")
    batches = {_size(shape[0]) for shape in shapes}
    need(len(batches) == 1 and batches != {"None"}, "query, key and value are not known to have one batch")
    tokens = {_size(shape[-2]) for shape in shapes}
    fixed = len(tokens) == 1 and all(isinstance(size, int) for size in tokens)
    need(fixed, "tokens of query and key differ, or are dynamic")
    need(all(isinstance(shape[-1], int) and shape[-1] > 0 for shape in shapes), "head_dim is dynamic")
    heads, heads_kv = found.heads
    need(heads_kv > 0 and heads % heads_kv == 0, f"heads of query and key are {heads} and {heads_kv}")
    if found.is_flat:
        fits = not shapes[0][-1] % heads and not any(shape[-1] % heads_kv for shape in shapes[1:])
        need(fits, "widths are no multiples of the heads")
        need(shapes[0][-1] // heads == shapes[1][-1] // heads_kv, "query and key differ in head_dim")
    else:
        need(shapes[0][-1] == shapes[1][-1], "query and key differ in head_dim")
    width = max(found.widths())
    need(width <= LONGEST_HEAD, f"head_dim is at most {LONGEST_HEAD} here, and it is {width}")
    need(found.scale is None or math.isfinite(found.scale), f"its scale is {found.scale}")


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and node.domain in {"", "ai.onnx"} else None


def _without_nan_guard(value: ir.Value | None) -> ir.Value | None:
    """Look through ``Where(IsNaN(x), 0, x)``: no row of a neighborhood is hidden as a whole."""
    where = _producer(value, "Where")
    guard = None if where is None else _producer(where.inputs[0], "IsNaN")
    if where is None or guard is None or guard.inputs[0] is not where.inputs[2]:
        return value
    instead = _constant(where.inputs[1])
    return where.inputs[2] if instead is not None and not instead.any() else value


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Look through a multiplication by a constant number."""
    multiply = _producer(value, "Mul")
    if multiply is not None:
        for factor, other in (multiply.inputs, multiply.inputs[::-1]):
            number = _constant(factor)
            if number is not None and number.size == 1 and number.ndim <= 4:
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


def _shape_value(value: ir.Value | None, depth: int = 8) -> list[int | str] | None:
    """Return what a tensor of sizes holds: numbers, and names of dynamic dimensions; not through endless chains."""
    number = _constant(value)
    if number is not None:
        return [int(size) for size in number.reshape(-1)]
    node = None if value is None or not depth else value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return None
    if node.op_type == "Shape":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return None if shape is None else [_size(size) for size in shape][start:end]
    if node.op_type == "Concat":
        return _joined(node, depth - 1)
    if node.op_type == "Slice" and len(node.inputs) == 3:
        whole, bounds = _shape_value(node.inputs[0], depth - 1), [_constant(bound) for bound in node.inputs[1:]]
        if whole is not None and bounds[0] is not None and bounds[1] is not None:
            return whole[int(bounds[0].item()) : int(bounds[1].item())]
    return None


def _joined(node: ir.Node, depth: int) -> list[int | str] | None:
    sizes: list[int | str] = []
    for part in node.inputs:
        more = _shape_value(part, depth)
        if more is None or len(sizes) > _SMALL:
            return None
        sizes += more
    return sizes


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor that a value always is; ``None`` where it is none, or a default that a caller may override."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """Return a constant that is a number or a shape."""
    tensor = _tensor(value)
    return tensor.numpy() if tensor is not None and tensor.size <= _SMALL else None


def _mask(value: ir.Value, tokens: int) -> Mask:
    """Return a constant mask as booleans."""
    tensor = _tensor(value)
    if tensor is None:
        raise DeclinedError("its mask is not constant")
    shape = tuple(size for size in tensor.shape if isinstance(size, int))  # All of a constant's are.
    fits = 2 <= len(shape) <= 4 and shape[-2:] == (tokens, tokens) and math.prod(shape[:-2]) == 1
    need(fits, f"its mask is {list(shape)}, and not one of all tokens for all heads and batch entries")
    need(tokens**2 <= LARGEST, f"a mask of {tokens} tokens is too large to look at")
    mask = tensor.numpy().reshape(tokens, tokens)
    if mask.dtype == bool:
        return np.asarray(mask, bool)
    try:
        ml_dtypes.finfo(mask.dtype)  # type: ignore[no-untyped-call]  # Of bfloat16 too, which NumPy does not know.
    except ValueError:
        raise DeclinedError(f"its mask is of {mask.dtype}") from None
    found = mask_of_bias(mask.astype(np.float64))
    if found is None:
        raise DeclinedError("its mask adds more to scores than 0 and, to hide, -1e4 or less")
    return found
