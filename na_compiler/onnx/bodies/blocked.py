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

from na_compiler.onnx.bodies.expression import Expression, Writer
from na_compiler.onnx.bodies.generic import Heads, attend, masked
from na_compiler.onnx.signature import ATTRIBUTES, DOMAIN, INPUTS, OUTPUTS
from na_compiler.problem import Problem
from na_compiler.window import group_length, window_bounds

__all__ = ["blocked_body", "choose_tile"]

_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class _Axis:
    """Tiles of one axis.

    Parameters
    ----------
    queries
        Tokens of each tile, ``[tiles, queries]``; the last one again where a tile has fewer.
    keys
        The tokens that these see, ``[tiles, keys]``; likewise.
    visible
        Which of the keys a query sees, ``[tiles, queries, keys]``.
    place
        Where a token's row is among those of all tiles, ``[tokens]``.
    """

    queries: np.ndarray[Any, Any]
    keys: np.ndarray[Any, Any]
    visible: np.ndarray[Any, Any]
    place: np.ndarray[Any, Any]

    @classmethod
    def cut(cls, tokens: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, tile: int) -> _Axis:
        """Cut an axis into tiles of queries of one dilation group."""
        rows: list[list[int]] = []
        boxes: list[list[int]] = []
        windows: list[list[tuple[int, int]]] = []
        place = np.zeros(tokens, np.int64)
        for group in range(dilation):
            length = group_length(tokens, dilation, group)
            for first in range(0, length, tile):
                indices = range(first, min(first + tile, length))
                bounds = [window_bounds(index, length, kernel_size, stride, is_causal) for index in indices]
                for row, index in enumerate(indices):
                    place[index * dilation + group] = len(rows) * tile + row
                # Windows never move back: the first begins the box, the last ends it.
                rows.append([index * dilation + group for index in indices])
                boxes.append([key * dilation + group for key in range(bounds[0][0], bounds[-1][1])])
                windows.append([(start - bounds[0][0], end - bounds[0][0]) for start, end in bounds])
        width = max(map(len, boxes))
        visible = np.zeros((len(rows), tile, width), np.bool_)
        for at, window in enumerate(windows):
            for row in range(tile):
                start, end = window[min(row, len(window) - 1)]
                visible[at, row, start:end] = True
        return cls(_padded(rows, tile), _padded(boxes, width), visible, place)


def blocked_body(operator: str, opset: int, problem: Problem, overload: str, additional_inputs: bool) -> ir.Function:
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
    additional_inputs
        Whether the function takes additional keys and values, be it none of them.
    """
    write = Writer(opset, INPUTS if additional_inputs else INPUTS[:3])
    query, key, value, *additional = write.inputs
    axes = [
        _Axis.cut(*axis)
        for axis in zip(
            problem.layout,
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.is_causal,
            choose_tile(problem),
            strict=True,
        )
    ]
    tiles = math.prod(len(axis.queries) for axis in axes)
    rows = math.prod(axis.queries.shape[1] for axis in axes)
    heads = Heads.make(write, query, key, value, problem.rank)
    tokens = write.constant([problem.tokens])
    queries = write("Gather", heads.queries(query, tokens), _indices(write, problem, [a.queries for a in axes]), axis=2)
    # [batch, heads_kv, tiles, rows, group, head_dim]: the queries of a group read the same keys.
    shape = write.shape([0, problem.heads_kv, tiles, rows * problem.group_size, problem.head_dim])
    queries = write("Reshape", queries, shape)
    boxes = _indices(write, problem, [axis.keys for axis in axes])
    keys = write("Gather", heads.keys(key, tokens), boxes, axis=2)
    values = write("Gather", heads.values(value, tokens), boxes, axis=2)
    scores = write("MatMul", queries, write("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    if not all(axis.visible.all() for axis in axes):
        scores = masked(write, scores, _visible(write, axes, problem.group_size))
    output, lse = attend(write, heads, queries, scores, values, additional)
    back = _places(write, axes)
    results = []
    for result, width in ((output, [problem.head_dim_v]), (lse, [])):
        split = write.shape([0, problem.heads_kv, tiles * rows, problem.group_size, *width])
        gathered = write("Gather", write("Reshape", result, split), back, axis=2)
        order = [0, 2, 1, 3, 4][: 4 + len(width)]
        shape = write.shape([0, *problem.layout, problem.heads, *width])
        results.append(write("Reshape", write("Transpose", gathered, perm=order), shape))
    results[0] = write("CastLike", results[0], query)
    return write.function(DOMAIN, operator, overload, dict(zip(OUTPUTS, results, strict=True)), ATTRIBUTES)


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


def _cost(problem: Problem, lengths: list[int], tile: tuple[int, ...]) -> float:
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


def _padded(lists: list[list[int]], width: int) -> np.ndarray[Any, Any]:
    return np.array([each + each[-1:] * (width - len(each)) for each in lists], np.int64)


def _indices(write: Writer, problem: Problem, tables: list[np.ndarray[Any, Any]]) -> Expression:
    """Combine ``[tiles, tokens]`` of each axis to numbers of tokens of the whole layout, over all axes."""
    rank = len(tables)
    combined = None
    for axis, table in enumerate(tables):
        others = [i for i in range(2 * rank) if i not in {axis, rank + axis}]
        along = write.constant(np.expand_dims(table, tuple(others)))
        combined = along if combined is None else combined * problem.layout[axis] + along
    assert combined is not None
    shape = [math.prod(table.shape[i] for table in tables) for i in range(2)]
    return write("Reshape", combined, write.constant(shape))


def _visible(write: Writer, axes: list[_Axis], group: int) -> Expression:
    """Combine ``[tiles, queries, keys]`` of each axis; rows are then repeated for the queries of a group."""
    rank = len(axes)
    combined = None
    for axis, each in enumerate(axes):
        others = [i for i in range(3 * rank) if i % rank != axis]
        along = write.constant(np.expand_dims(each.visible, tuple(others)))
        combined = along if combined is None else combined & along
    assert combined is not None
    tiles, rows, keys = (math.prod(each.visible.shape[i] for each in axes) for i in range(3))
    if group > 1:
        combined = write("Reshape", combined, write.constant([tiles, rows, 1, keys]))
        combined = write("Expand", combined, write.constant([tiles, rows, group, keys]))
    return write("Reshape", combined, write.constant([tiles, rows * group, keys]))


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
