"""How many keys the windows of a box of queries come to, along one axis. Closed forms in the layout. Pure Python."""

from __future__ import annotations

import functools
import math

from na_compiler.problem import Problem
from na_compiler.window import group_length, window_bounds

__all__ = ["largest_union", "largest_unions"]


@functools.lru_cache(maxsize=4096)
def largest_union(length: int, kernel_size: int, stride: int, is_causal: bool, extent: int) -> int:
    """Return the most keys that the windows of ``extent`` queries, from a multiple of ``extent`` on, come to.

    Parameters
    ----------
    length
        Tokens of the dilation group.
    kernel_size, stride, is_causal
        As in `na_compiler.window`.
    extent
        Queries of the box.

    Notes
    -----
    Away from the borders what a box sees repeats with the least common multiple of stride and extent. A border shifts
    the windows of at most ``kernel_size + stride`` queries: looking at one period between, and at what lies nearer to
    the borders than that, is looking at everything, whatever the length.

    Examples
    --------
    >>> largest_union(56, 7, 1, False, 4), largest_union(1 << 40, 7, 7, False, 4)
    (10, 14)
    """
    boxes = -(-length // extent)
    near = -(-(kernel_size + stride) // extent) + math.lcm(stride, extent) // extent + 1
    firsts = range(boxes) if boxes <= 2 * near else (*range(near), *range(boxes - near, boxes))

    def union(box: int) -> int:
        first, last = box * extent, min((box + 1) * extent, length) - 1
        low, _ = window_bounds(first, length, kernel_size, stride, is_causal)
        _, high = window_bounds(last, length, kernel_size, stride, is_causal)
        return int(high - low)

    return max(map(union, firsts))


def largest_unions(problem: Problem, box: tuple[int, ...]) -> tuple[int, ...]:
    """Return `largest_union` of each axis, over the dilation groups, for a box of queries."""
    found = []
    for axis, extent in enumerate(box):
        layout, dilation = problem.layout[axis], problem.dilation[axis]
        parameters = problem.kernel_size[axis], problem.stride[axis], problem.is_causal[axis], extent
        lengths = {group_length(layout, dilation, group) for group in (0, dilation - 1)}
        found.append(max(largest_union(length, *parameters) for length in lengths))
    return tuple(found)
