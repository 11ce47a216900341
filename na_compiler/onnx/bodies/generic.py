"""The generic body: one function for each rank, right for every layout, parameter and number of heads.

Index tables and masks are computed in the graph from the attributes and the shapes, so that nothing about the node but
its border has to be known when it is written. Keys and values are gathered for every query: memory and time grow with
``tokens * window * head_dim``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from na_compiler.onnx.bodies.expression import Expression, Interface, Writer
from na_compiler.onnx.signature import OPERATORS
from na_compiler.operands import KEY_MASK, PARAMETERS, RELATIVE_POSITION_BIAS
from na_compiler.window import SHIFT, WRAP, group_length, window_bounds

__all__ = ["COMPUTED", "Heads", "attend", "generic_body", "masked"]

# What bodies compute, by the names of inputs and attributes. What `na_compiler.operands` has beside is refused.
COMPUTED = frozenset(
    {
        "query",
        "key",
        "value",
        "additional_keys",
        "additional_values",
        RELATIVE_POSITION_BIAS,
        KEY_MASK,
        "scale",
        "border",
    }
)


def generic_body(operator: str, opset: int, interface: Interface) -> ir.Function:
    """Write the body of an operator.

    Parameters
    ----------
    operator
        ``"NA1D"``, ``"NA2D"`` or ``"NA3D"``.
    opset
        Version of ONNX's own operators, 18 or later.
    interface
        What the function takes and returns.
    """
    rank = OPERATORS[operator]
    write = Writer(opset, interface)
    query, key, value = write.inputs("query", "key", "value")
    sizes = write("Shape", query)
    layout = write("Slice", sizes, [1], [1 + rank])
    tokens = write("ReduceProd", layout, keepdims=1)
    bias, key_mask = write.inputs(RELATIVE_POSITION_BIAS), write.inputs(KEY_MASK)
    border = interface.border or (SHIFT,) * rank
    indices, visible, places = _window_tables(write, layout, border, with_places=bool(bias))
    heads = Heads.make(write, query, key, value, rank)
    queries = heads.queries(query, tokens)
    keys = write("Gather", heads.keys(key, tokens), indices, axis=2)
    values = write("Gather", heads.values(value, tokens), indices, axis=2)
    scores = write("MatMul", queries, write("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    if places is not None:
        scores = scores + write("Transpose", heads.biases(bias[0], places), perm=[0, 2, 1, 3])
    visible = write("Unsqueeze", visible, [1])
    if key_mask:
        visible = visible & heads.seen(key_mask[0], tokens, indices)
    scores = masked(write, scores, visible)
    output, lse = attend(write, heads, queries, scores, values, interface, visible if key_mask else None)
    # [batch, heads_kv, tokens, group, ...] back to [batch, *layout, heads, ...]
    output = write("Transpose", output, perm=[0, 2, 1, 3, 4])
    tokens_and_heads = write.shape([0], write("Slice", sizes, [1], [2 + rank]))
    output = write("Reshape", write("CastLike", output, query), write.shape(tokens_and_heads, heads.head_dim_v))
    if lse is None:
        return write.function(operator, "", output)
    lse = write("Reshape", write("Transpose", lse, perm=[0, 2, 1, 3]), tokens_and_heads)
    return write.function(operator, "", output, lse)


@dataclass(frozen=True)
class Heads:
    """Sizes of heads, as tensors of one element, and how tensors are laid out by them.

    Parameters
    ----------
    write
        Writes the nodes.
    heads_kv, group
        Heads of keys and values, and query heads for each of them.
    head_dim, head_dim_v
        Widths.
    scale
        What scores are multiplied with.
    """

    write: Writer
    heads_kv: Expression
    group: Expression
    head_dim: Expression
    head_dim_v: Expression
    scale: Expression

    @classmethod
    def make(cls, write: Writer, query: Expression, key: Expression, value: Expression, rank: int) -> Heads:
        """Read the sizes off the inputs' shapes."""

        def size(tensor: Expression, axis: int) -> Expression:
            return write("Slice", write("Shape", tensor), [axis], [axis + 1])

        heads_kv = size(key, rank + 1)
        group = size(query, rank + 1) // heads_kv
        scale = write.attribute("scale", ir.AttributeType.FLOAT)
        return cls(write, heads_kv, group, size(query, rank + 2), size(value, rank + 2), scale)

    def queries(self, query: Expression, tokens: Expression) -> Expression:
        """Return scaled queries in float32, ``[batch, heads_kv, tokens, group, head_dim]``."""
        write = self.write
        shape = write.shape([0], tokens, self.heads_kv, self.group, self.head_dim)
        flat = write("Cast", write("Reshape", query, shape), to=ir.DataType.FLOAT)
        return write("Transpose", flat * self.scale, perm=[0, 2, 1, 3, 4])

    def keys(self, key: Expression, tokens: Expression) -> Expression:
        """Return keys in float32, ``[batch, heads_kv, tokens, head_dim]``."""
        return self._heads_first(key, write_shape=(tokens, self.heads_kv, self.head_dim))

    def values(self, value: Expression, tokens: Expression) -> Expression:
        """Return values in float32, ``[batch, heads_kv, tokens, head_dim_v]``."""
        return self._heads_first(value, write_shape=(tokens, self.heads_kv, self.head_dim_v))

    def biases(self, table: Expression, places: Expression) -> Expression:
        """Return biases of places in a flattened table, ``[heads_kv, group, *places]``."""
        write = self.write
        flat = write("Reshape", table, write.shape(self.heads_kv, self.group, [-1]))
        return write("Gather", flat, places, axis=2)

    def seen(self, key_mask: Expression, tokens: Expression, indices: Expression) -> Expression:
        """Return which keys a mask lets see, of ``[blocks, keys]`` numbers: ``[batch, 1, blocks, 1, keys]``."""
        write = self.write
        flat = write("Reshape", key_mask, write.shape([0], tokens))
        return write("Unsqueeze", write("Gather", flat, indices, axis=1), [1, 3])

    def _heads_first(self, tensor: Expression, write_shape: tuple[Expression, ...]) -> Expression:
        write = self.write
        flat = write("Cast", write("Reshape", tensor, write.shape([0], *write_shape)), to=ir.DataType.FLOAT)
        return write("Transpose", flat, perm=[0, 2, 1, 3])


def masked(write: Writer, scores: Expression, visible: Expression) -> Expression:
    """Return scores that are minus infinity where a key is not visible, whatever they were."""
    return write("Where", visible, scores, np.float32(-np.inf))


def attend(
    write: Writer,
    heads: Heads,
    queries: Expression,
    scores: Expression,
    values: Expression,
    interface: Interface,
    visible: Expression | None = None,
) -> tuple[Expression, Expression | None]:
    """Return softmax(scores) @ values and, if it is returned, the logarithm of the softmax's denominator.

    Parameters
    ----------
    write
        Writes the nodes.
    heads
        Sizes.
    queries, scores, values
        ``[batch, heads_kv, blocks, rows, head_dim]``, ``[..., rows, keys]`` and ``[..., keys, head_dim_v]``.
    interface
        What the function takes and returns. Additional keys, if there are any, are more columns of scores.
    visible
        Which keys are seen, like scores, where a query may see none: its output is 0 then, and lse minus infinity.
    """
    sees = None if visible is None else _any(write, visible)
    additional = write.inputs("additional_keys", "additional_values")
    if not additional:
        lse = _logarithm(write, scores) if interface.lse else None
        return _where_seen(write, sees, write("MatMul", write("Softmax", scores, axis=-1), values), lse)
    count = write("Slice", write("Shape", additional[0]), [1], [2])
    # A dimension for the blocks of queries, all of which see the same keys. Padded with one key that nobody sees:
    # products over no keys at all are not to be relied on.
    more = [
        write("Unsqueeze", write("Pad", tensor, [0, 0, 0, 0, 0, 0, 1, 0]), [2])
        for tensor in (heads.keys(additional[0], count), heads.values(additional[1], count))
    ]
    more_scores = write("MatMul", queries, write("Transpose", more[0], perm=[0, 1, 2, 4, 3]))
    places = write("Range", 0, write("Squeeze", count, [0]) + 1, 1)
    more_scores = masked(write, more_scores, write("Less", places, count))
    window = write("Slice", write("Shape", scores), [4], [5])
    together = write("Concat", scores, more_scores, axis=-1)
    lse = _logarithm(write, together) if interface.lse else None
    weights = write("Softmax", together, axis=-1)
    seen = write("MatMul", write("Slice", weights, [0], window, [4]), values)
    rest = write("Slice", weights, window, write("Shape", weights, start=4), [4])
    if sees is not None:
        sees = sees | write("Less", 0, count)
    return _where_seen(write, sees, seen + write("MatMul", rest, more[1]), lse)


def _any(write: Writer, visible: Expression) -> Expression:
    """Return whether any key is seen, with a last dimension of 1."""
    numbers = write("Cast", visible, to=ir.DataType.FLOAT)
    return write("Greater", write("ReduceMax", numbers, [-1], keepdims=1), np.float32(0))


def _where_seen(
    write: Writer, sees: Expression | None, output: Expression, lse: Expression | None
) -> tuple[Expression, Expression | None]:
    """Return output and lse; 0 and minus infinity for a query that sees no key."""
    if sees is None:
        return output, lse
    if lse is not None:
        lse = write("Where", write("Squeeze", sees, [-1]), lse, np.float32(-np.inf))
    return write("Where", sees, output, np.float32(0)), lse


def _logarithm(write: Writer, scores: Expression) -> Expression:
    """Return the logarithm of the softmax's denominator: NaN where an infinite score, or only hidden ones, undo it."""
    lse = write("ReduceLogSumExp", scores, [-1], keepdims=0)
    return write("Where", write("IsInf", lse), np.float32(np.nan), lse)


def _window_tables(
    write: Writer, layout: Expression, border: Sequence[str], *, with_places: bool
) -> tuple[Expression, Expression, Expression | None]:
    """Return for every query the numbers of the keys in its window, which of them it sees, and places of their biases.

    All are ``[tokens, window]``; places only where they are asked for.
    """
    ints = ir.AttributeType.INTS
    kernel_size, stride, dilation, is_causal = (write.attribute(name, ints) for name in PARAMETERS)
    indices = visible = relative = None
    rank = len(border)
    for axis in range(rank):
        extent = write("Gather", layout, axis)
        kernel, step, gap, causal = (write("Gather", each, axis) for each in (kernel_size, stride, dilation, is_causal))
        causal = write("Cast", causal, to=ir.DataType.BOOL)
        tables = _axis_tables(write, extent, kernel, step, gap, causal, border[axis])
        # [1, X, 1, 1, k, 1] of this axis against those of the others
        others = [i for i in range(2 * rank) if i not in {axis, rank + axis}]
        places, sees = (write("Unsqueeze", table, others) for table in tables[:2])
        indices = places if indices is None else indices * extent + places
        visible = sees if visible is None else visible & sees
        if with_places:
            along = write("Unsqueeze", tables[2] + (kernel - 1), others)
            relative = along if relative is None else relative * (kernel * 2 - 1) + along
    assert indices is not None
    assert visible is not None
    shape = write.shape([-1], write("ReduceProd", kernel_size, keepdims=1))
    if relative is not None:
        relative = write("Reshape", relative, shape)
    return write("Reshape", indices, shape), write("Reshape", visible, shape), relative


def _axis_tables(
    write: Writer,
    extent: Expression,
    kernel_size: Expression,
    stride: Expression,
    dilation: Expression,
    causal: Expression,
    border: str,
) -> tuple[Expression, Expression, Expression]:
    """Return the places of the keys in each query's window along an axis, whether it sees them, and how far they are.

    All are ``[X, k]``; distances are counted in the dilation group.
    """
    place = write("Range", 0, extent, 1)
    group, index = place % dilation, place // dilation
    length = group_length(extent, dilation, group)  # type: ignore[arg-type]
    # The window rule of integers, tensors and TensorIR, here with arithmetic that writes nodes.
    bounds = [
        window_bounds(
            index,
            length,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            is_causal,
            border,
            minimum=Expression.minimum,
            maximum=Expression.maximum,
        )
        for is_causal in (True, False)
    ]
    start, end = (write("Unsqueeze", write("Where", causal, *each), [1]) for each in zip(*bounds, strict=True))
    group, index, length = (write("Unsqueeze", each, [1]) for each in (group, index, length))
    key = start + write("Range", 0, kernel_size, 1)
    place = key % length if border == WRAP else key.minimum(length - 1)
    return place * dilation + group, write("Less", key, end), key - index
