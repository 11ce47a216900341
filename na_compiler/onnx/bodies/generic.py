"""The generic body: one function for each rank, right for every layout, parameter and number of heads.

Index tables and masks are computed in the graph from the attributes and the shapes, so that nothing about the node
has to be known when it is written. Keys and values are gathered for every query: memory and time grow with
``tokens * window * head_dim``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from na_compiler.onnx.bodies.expression import Expression, Interface, Writer
from na_compiler.onnx.signature import OPERATORS
from na_compiler.operands import PARAMETERS
from na_compiler.window import group_length, window_start

__all__ = ["COMPUTED", "Heads", "attend", "generic_body", "masked"]

# What bodies compute, by the names of inputs and attributes. What `na_compiler.operands` has beside is refused.
COMPUTED = frozenset({"query", "key", "value", "additional_keys", "additional_values", "scale"})


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
    indices, visible = _window_tables(write, layout, rank)
    heads = Heads.make(write, query, key, value, rank)
    queries = heads.queries(query, tokens)
    keys = write("Gather", heads.keys(key, tokens), indices, axis=2)
    values = write("Gather", heads.values(value, tokens), indices, axis=2)
    scores = write("MatMul", queries, write("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    scores = masked(write, scores, write("Unsqueeze", visible, [1]))
    output, lse = attend(write, heads, queries, scores, values, interface)
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
    """
    additional = write.inputs("additional_keys", "additional_values")
    if not additional:
        lse = _logarithm(write, scores) if interface.lse else None
        return write("MatMul", write("Softmax", scores, axis=-1), values), lse
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
    return seen + write("MatMul", rest, more[1]), lse


def _logarithm(write: Writer, scores: Expression) -> Expression:
    """Return the logarithm of the softmax's denominator: NaN where an infinite score, or only hidden ones, undo it."""
    lse = write("ReduceLogSumExp", scores, [-1], keepdims=0)
    return write("Where", write("IsInf", lse), np.float32(np.nan), lse)


def _window_tables(write: Writer, layout: Expression, rank: int) -> tuple[Expression, Expression]:
    """Return for every query the numbers of the keys in its window, and which of them it sees, ``[tokens, window]``."""
    ints = ir.AttributeType.INTS
    kernel_size, stride, dilation, is_causal = (write.attribute(name, ints) for name in PARAMETERS)
    indices = visible = None
    for axis in range(rank):
        extent = write("Gather", layout, axis)
        kernel, step, gap, causal = (write("Gather", each, axis) for each in (kernel_size, stride, dilation, is_causal))
        places, sees = _axis_tables(write, extent, kernel, step, gap, write("Cast", causal, to=ir.DataType.BOOL))
        # [1, X, 1, 1, k, 1] of this axis against those of the others
        others = [i for i in range(2 * rank) if i not in {axis, rank + axis}]
        places, sees = write("Unsqueeze", places, others), write("Unsqueeze", sees, others)
        indices = places if indices is None else indices * extent + places
        visible = sees if visible is None else visible & sees
    assert indices is not None
    assert visible is not None
    shape = write.shape([-1], write("ReduceProd", kernel_size, keepdims=1))
    return write("Reshape", indices, shape), write("Reshape", visible, shape)


def _axis_tables(
    write: Writer,
    extent: Expression,
    kernel_size: Expression,
    stride: Expression,
    dilation: Expression,
    causal: Expression,
) -> tuple[Expression, Expression]:
    """Return the places of the keys in each query's window along an axis, and whether it sees them, ``[X, k]``."""
    place = write("Range", 0, extent, 1)
    group, index = place % dilation, place // dilation
    length = group_length(extent, dilation, group)  # type: ignore[arg-type]
    # The window rule of integers, tensors and TensorIR, here with arithmetic that writes nodes.
    starts = [
        window_start(
            index,
            length,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            is_causal,
            minimum=Expression.minimum,
            maximum=Expression.maximum,
        )
        for is_causal in (True, False)
    ]
    start = write("Where", causal, *starts)
    group, index, last = (write("Unsqueeze", each, [1]) for each in (group, index, length - 1))
    key = write("Unsqueeze", start, [1]) + write("Range", 0, kernel_size, 1)
    sees = write("Not", causal) | (key <= index)
    return key.minimum(last) * dilation + group, sees
