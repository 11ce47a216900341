"""The blocked body: for one node with a fixed layout, a fraction of the generic body's time and memory.

Queries are cut into tiles; all queries of a tile share a gathered box of keys, those that any of them sees, and a dense
product with a mask does the rest. Tables are small and kept for each axis; the graph combines them, which a runtime
does once, when it folds constants.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from na_compiler.onnx.bodies.expression import Expression, Interface, Writer
from na_compiler.onnx.bodies.generic import Heads, attend, masked
from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.window import WRAP, group_length, window_bounds

__all__ = ["blocked_body", "choose_tile"]

_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class _Axis:
    """Tiles of one axis, each of queries of one dilation group.

    Parameters
    ----------
    queries
        Tokens of each tile, ``[tiles, rows]``; the last one again where a tile has fewer.
    boxes
        For each tile the group, and the indices in it of the first and the last key that any of the queries sees,
        ``[3, tiles, 1]``.
    windows
        First and one past the last key that each query sees, counted from the box's first, ``[2, tiles, rows, 1]``.
    width
        Keys of the widest box.
    dilation
        Number of groups.
    around
        Keys of a group, modulo which places count where windows wrap; ``None`` where they do not.
    place
        Where a token's row is among those of all tiles, ``[tokens]``.
    """

    queries: np.ndarray[Any, Any]
    boxes: np.ndarray[Any, Any]
    windows: np.ndarray[Any, Any]
    width: int
    dilation: int
    around: int | None
    place: np.ndarray[Any, Any]

    @classmethod
    def cut(
        cls, tokens: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, border: str, rows: int
    ) -> _Axis:
        """Cut an axis into tiles of some queries."""
        queries: list[list[int]] = []
        boxes: list[tuple[int, int, int]] = []
        windows: list[list[tuple[int, int]]] = []
        place = np.zeros(tokens, np.int64)
        for group in range(dilation):
            length = group_length(tokens, dilation, group)
            for first in range(0, length, rows):
                indices = [min(first + row, length - 1) for row in range(rows)]
                bounds = [window_bounds(index, length, kernel_size, stride, is_causal, border) for index in indices]
                for row, index in reversed(list(enumerate(indices))):
                    place[index * dilation + group] = len(queries) * rows + row
                queries.append([index * dilation + group for index in indices])
                # Windows never move back: the first begins the box, the last ends it.
                start, end = bounds[0][0], bounds[-1][1]
                boxes.append((group, start, end - 1))
                windows.append([(window[0] - start, window[1] - start) for window in bounds])
        width = max(last - start + 1 for _, start, last in boxes)
        return cls(
            np.array(queries),
            np.array(boxes).T[..., None],
            np.moveaxis(np.array(windows), -1, 0)[..., None],
            width,
            dilation,
            tokens // dilation if border == WRAP else None,
            place,
        )

    @property
    def sees_all(self) -> bool:
        """Whether every query sees all keys of its box, and no box is filled up."""
        return bool((self.windows[0] == 0).all() and (self.windows[1] == self.width).all())

    def keys(self, write: Writer) -> Expression:
        """Return the tokens of each tile's box, ``[tiles, width]``; the last one again where a box has fewer."""
        group, first, last = (write.constant(each) for each in self.boxes)
        place = (write("Range", 0, self.width, 1) + first).minimum(last)
        return (place if self.around is None else place % self.around) * self.dilation + group

    def relative(self, write: Writer, kernel_size: int) -> Expression:
        """Return places in a table of biases, ``[tiles, rows, width]``; any for what is not seen."""
        first = self.boxes[1][..., None] - self.queries[..., None] // self.dilation + (kernel_size - 1)
        places = write.constant(first) + write("Range", 0, self.width, 1)
        return places.minimum(2 * kernel_size - 2).maximum(0)

    def visible(self, write: Writer) -> Expression:
        """Return which keys of its box a query sees, ``[tiles, rows, width]``."""
        start, end = (write.constant(each) for each in self.windows)
        key = write("Range", 0, self.width, 1)
        return (start <= key) & write("Less", key, end)


def blocked_body(operator: str, opset: int, problem: Problem, overload: str, interface: Interface) -> ir.Function:
    """Write the body for a problem.

    Parameters
    ----------
    operator
        ``"NA1D"``, ``"NA2D"`` or ``"NA3D"``.
    opset
        Version of ONNX's own operators, 18 or later.
    problem
        Fixes everything but the batch, the scale and the number of additional keys.
    overload
        Of the function: a model may have one for each of its problems.
    interface
        What the function takes and returns.
    """
    write = Writer(opset, interface)
    query, key, value = write.inputs("query", "key", "value")
    axes = [
        _Axis.cut(*axis)
        for axis in zip(
            problem.layout,
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.is_causal,
            problem.border,
            choose_tile(problem),
            strict=True,
        )
    ]
    tiles = math.prod(len(axis.queries) for axis in axes)
    rows = math.prod(axis.queries.shape[1] for axis in axes)
    heads = Heads.make(write, query, key, value, problem.rank)
    tokens = write.constant([problem.tokens])
    tokens_of_rows = _indices(write, problem, [write.constant(axis.queries) for axis in axes], tiles, rows)
    queries = write("Gather", heads.queries(query, tokens), tokens_of_rows, axis=2)
    # [batch, heads_kv, tiles, rows, group, head_dim]: the queries of a group read the same keys.
    shape = write.shape([0, problem.heads_kv, tiles, rows * problem.group_size, problem.head_dim])
    queries = write("Reshape", queries, shape)
    width = math.prod(axis.width for axis in axes)
    boxes = _indices(write, problem, [axis.keys(write) for axis in axes], tiles, width)
    keys = write("Gather", heads.keys(key, tokens), boxes, axis=2)
    values = write("Gather", heads.values(value, tokens), boxes, axis=2)
    scores = write("MatMul", queries, write("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    for bias in write.inputs(RELATIVE_POSITION_BIAS):
        biases = heads.biases(bias, _relative(write, axes, problem))
        shape = write.shape(problem.heads_kv, tiles, rows * problem.group_size, width)
        scores = scores + write("Reshape", write("Transpose", biases, perm=[0, 2, 3, 1, 4]), shape)
    visible = None if all(axis.sees_all for axis in axes) else _visible(write, axes, problem.group_size)
    key_mask = write.inputs(KEY_MASK)
    for mask in key_mask:
        seen = heads.seen(mask, tokens, boxes)
        visible = seen if visible is None else visible & seen
    if visible is not None:
        scores = masked(write, scores, visible)
    output, lse = attend(write, heads, queries, scores, values, interface, visible if key_mask else None)
    back = _places(write, axes)
    results = []
    for result, last in ((output, [problem.head_dim_v]), (lse, [])):
        if result is None:
            continue
        split = write.shape([0, problem.heads_kv, tiles * rows, problem.group_size, *last])
        gathered = write("Gather", write("Reshape", result, split), back, axis=2)
        order = [0, 2, 1, 3, 4][: 4 + len(last)]
        shape = write.shape([0, *problem.layout, problem.heads, *last])
        results.append(write("Reshape", write("Transpose", gathered, perm=order), shape))
    results[0] = write("CastLike", results[0], query)
    return write.function(operator, overload, *results)


def choose_tile(problem: Problem) -> tuple[int, ...]:
    """Return the queries of a tile along each axis: those for which the least is read, and multiplied in vain.

    Examples
    --------
    >>> choose_tile(Problem((56, 56), heads=4, head_dim=32, kernel_size=13))
    (8, 8)
    """
    lengths = [
        group_length(tokens, dilation) for tokens, dilation in zip(problem.layout, problem.dilation, strict=True)
    ]
    candidates = ([size for size in _SIZES if size == 1 or size < 2 * length] for length in lengths)
    return min(itertools.product(*candidates), key=lambda tile: _cost(problem, lengths, tile))


def _cost(problem: Problem, lengths: list[int], tile: tuple[int, ...]) -> int:
    """Return an estimate of time: scores of all tiles, and what is gathered for them, which costs more a number."""
    tiles, rows, box = 1, 1, 1
    for axis, (length, size) in enumerate(zip(lengths, tile, strict=True)):
        tiles *= problem.dilation[axis] * -(-length // size)
        rows *= size
        stride = problem.stride[axis]
        shared = size - 1 if stride == 1 else (size - 1 + stride - 1) // stride * stride
        box *= min(problem.kernel_size[axis] + shared, length)
    return tiles * box * (rows * problem.group_size + _GATHER)


# A key gathered costs as much as this many scores with it; measured with ONNX Runtime on the problems of the benchmark.
_GATHER = 24


def _indices(write: Writer, problem: Problem, tables: list[Expression], tiles: int, width: int) -> Expression:
    """Combine ``[tiles, tokens]`` of each axis to numbers of tokens of the whole layout, over all axes."""
    rank = len(tables)
    combined = None
    for axis, table in enumerate(tables):
        along = write("Unsqueeze", table, [i for i in range(2 * rank) if i not in {axis, rank + axis}])
        combined = along if combined is None else combined * problem.layout[axis] + along
    assert combined is not None
    return write("Reshape", combined, [tiles, width])


def _visible(write: Writer, axes: list[_Axis], group: int) -> Expression:
    """Combine what is visible on each axis to ``[tiles, rows, keys]``; rows are repeated for the queries of a group."""
    rank = len(axes)
    combined = None
    for axis, each in enumerate(axes):
        along = write("Unsqueeze", each.visible(write), [i for i in range(3 * rank) if i % rank != axis])
        combined = along if combined is None else combined & along
    assert combined is not None
    tiles, rows = (math.prod(each.queries.shape[i] for each in axes) for i in range(2))
    keys = math.prod(each.width for each in axes)
    if group > 1:
        combined = write("Reshape", combined, [tiles, rows, 1, keys])
        combined = write("Expand", combined, [tiles, rows, group, keys])
    return write("Reshape", combined, [tiles, rows * group, keys])


def _relative(write: Writer, axes: list[_Axis], problem: Problem) -> Expression:
    """Combine places in a table of biases on each axis to ``[tiles, rows, keys]`` of a flattened one."""
    rank = len(axes)
    combined = None
    for axis, (each, kernel_size) in enumerate(zip(axes, problem.kernel_size, strict=True)):
        along = write("Unsqueeze", each.relative(write, kernel_size), [i for i in range(3 * rank) if i % rank != axis])
        combined = along if combined is None else combined * (2 * kernel_size - 1) + along
    assert combined is not None
    tiles, rows = (math.prod(each.queries.shape[i] for each in axes) for i in range(2))
    return write("Reshape", combined, [tiles, rows, math.prod(each.width for each in axes)])


def _places(write: Writer, axes: list[_Axis]) -> Expression:
    """Return for every token the number of its row among those of all tiles."""
    # A row is tile by tile, and within a tile query by query; both run over the axes in order.
    tile = row = write.constant(0)
    for i, axis in enumerate(axes):
        tiles, rows = axis.queries.shape
        others = tuple(j for j in range(len(axes)) if j != i)
        tile = tile * tiles + np.expand_dims(axis.place // rows, others)
        row = row * rows + np.expand_dims(axis.place % rows, others)
    rows = math.prod(axis.queries.shape[1] for axis in axes)
    return write("Reshape", tile * rows + row, [-1])
