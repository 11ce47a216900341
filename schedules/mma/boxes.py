"""How many keys the windows of a box of queries come to, along one axis. Closed forms in the layout. Pure Python."""

from __future__ import annotations

import functools

from na_compiler.counting import widest_union
from na_compiler.problem import Problem
from na_compiler.window import group_length

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

    Examples
    --------
    >>> largest_union(56, 7, 1, False, 4), largest_union(1 << 40, 7, 7, False, 4)
    (10, 14)
    """
    return widest_union(length, kernel_size, stride, is_causal, min(extent, length))


def largest_unions(problem: Problem, box: tuple[int, ...]) -> tuple[int, ...]:
    """Return `largest_union` of each axis, over the dilation groups, for a box of queries."""
    found = []
    for axis, extent in enumerate(box):
        layout, dilation = problem.layout[axis], problem.dilation[axis]
        parameters = problem.kernel_size[axis], problem.stride[axis], problem.is_causal[axis], extent
        lengths = {group_length(layout, dilation, group) for group in (0, dilation - 1)}
        found.append(max(largest_union(length, *parameters) for length in lengths))
    return tuple(found)
