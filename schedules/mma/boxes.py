"""How many keys a box of queries sees along an axis, how many queries see a box of keys. Closed forms. Pure Python."""

from __future__ import annotations

import functools
from collections.abc import Callable

from na_compiler.counting import widest_inverse, widest_union
from na_compiler.problem import Problem
from na_compiler.window import SHIFT, group_length

__all__ = ["largest_inverse", "largest_inverses", "largest_union", "largest_unions", "usual_inverses"]


@functools.lru_cache(maxsize=4096)
def largest_union(length: int, kernel_size: int, stride: int, is_causal: bool, extent: int, border: str = SHIFT) -> int:
    """Return the most keys that the windows of ``extent`` queries, from a multiple of ``extent`` on, come to.

    Parameters
    ----------
    length
        Tokens of the dilation group.
    kernel_size, stride, is_causal
        As in `na_compiler.window`.
    extent
        Queries of the box.
    border
        As in `na_compiler.window`.

    Examples
    --------
    >>> largest_union(56, 7, 1, False, 4), largest_union(1 << 40, 7, 7, False, 4)
    (10, 14)
    """
    return widest_union(length, kernel_size, stride, is_causal, min(extent, length), border)


@functools.lru_cache(maxsize=4096)
def largest_inverse(
    length: int, kernel_size: int, stride: int, is_causal: bool, extent: int, border: str = SHIFT
) -> int:
    """Return the most queries that see one of ``extent`` keys, from a multiple of ``extent`` on.

    Parameters are those of `largest_union`. Keys near a border are seen by more queries than others, where windows are
    shifted.

    Examples
    --------
    >>> largest_inverse(56, 7, 1, False, 4), largest_inverse(56, 7, 1, True, 4)
    (11, 10)
    """
    return widest_inverse(length, kernel_size, stride, is_causal, min(extent, length), border)


def largest_unions(problem: Problem, box: tuple[int, ...]) -> tuple[int, ...]:
    """Return `largest_union` of each axis, over the dilation groups, for a box of queries."""
    return _largest(largest_union, problem, box)


def largest_inverses(problem: Problem, box: tuple[int, ...]) -> tuple[int, ...]:
    """Return `largest_inverse` of each axis, over the dilation groups, for a box of keys."""
    return _largest(largest_inverse, problem, box)


def usual_inverses(problem: Problem, box: tuple[int, ...]) -> tuple[int, ...]:
    """Return about how many queries see a box of keys along each axis, away from the borders."""
    extents = zip(largest_inverses(problem, box), box, problem.kernel_size, strict=True)
    return tuple(min(largest, extent + kernel_size - 1) for largest, extent, kernel_size in extents)


@functools.lru_cache(maxsize=4096)
def _largest(
    largest: Callable[[int, int, int, bool, int, str], int], problem: Problem, box: tuple[int, ...]
) -> tuple[int, ...]:
    found = []
    for axis, extent in enumerate(box):
        layout, dilation = problem.layout[axis], problem.dilation[axis]
        parameters = (
            problem.kernel_size[axis],
            problem.stride[axis],
            problem.is_causal[axis],
            extent,
            problem.border[axis],
        )
        lengths = {group_length(layout, dilation, group) for group in (0, dilation - 1)}
        found.append(max(largest(length, *parameters) for length in lengths))
    return tuple(found)
