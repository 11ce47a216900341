"""The window rule: which keys a query attends to, along one axis.

Axes are independent: a key is a neighbor when it is one on every axis. With dilation ``d`` an axis of
``layout`` tokens splits into ``d`` groups (token ``x`` is in group ``x % d`` at index ``x // d``) and the rule is
applied inside the group. The rule is that of NATTEN 0.21; written once, here, for Python integers, torch
tensors and TensorIR expressions alike, so that the reference, the description, the planner and the tests
cannot disagree about it.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

__all__ = ["group_length", "query_bounds", "window_bounds", "window_end", "window_start"]

# Anything with +, - and //: int, torch.Tensor, tvm.tirx.PrimExpr.
Index = Any


def group_length(layout: int, dilation: int, group: Index = 0) -> Index:
    """Return the number of tokens in one dilation group.

    Parameters
    ----------
    layout
        Tokens along the axis.
    dilation
        Number of groups the axis splits into.
    group
        Which group, in ``[0, dilation)``. The first ones may be one token longer than the last ones.

    Examples
    --------
    >>> [group_length(10, 4, group) for group in range(4)]
    [3, 3, 2, 2]
    """
    return (layout - group + dilation - 1) // dilation


def window_start(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    *,
    minimum: Callable[[Index, Index], Index] = builtins.min,
    maximum: Callable[[Index, Index], Index] = builtins.max,
) -> Index:
    """Return the first key of a query's window.

    Parameters
    ----------
    index
        The query's position in its dilation group.
    length
        Tokens in the group; at least ``kernel_size``.
    kernel_size, stride, is_causal
        The axis' parameters.
    minimum, maximum
        The two comparisons in the arithmetic of ``index``: the built-in ones for integers, ``torch.minimum`` or
        ``tvm.tirx.min`` for tensors and expressions.

    Notes
    -----
    All queries of a stride group share the window of their leader. NATTEN writes the window that is not causal
    as ``max(leader - left, 0)`` plus a shift where it would pass the end; for ``kernel_size <= length`` this is
    the same as clamping ``leader - left`` into ``[0, length - kernel_size]``.

    Examples
    --------
    >>> [window_start(index, 6, 3) for index in range(6)]
    [0, 0, 1, 2, 3, 3]
    """
    group_start = index if stride == 1 else index // stride * stride
    if is_causal:
        leader = minimum(group_start + (stride - 1), length - 1)
        return maximum(leader - (kernel_size - 1), 0)
    leader = index if stride == 1 else minimum(group_start + stride // 2, length - 1)
    return maximum(minimum(leader - kernel_size // 2, length - kernel_size), 0)


def window_end(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    *,
    minimum: Callable[[Index, Index], Index] = builtins.min,
    maximum: Callable[[Index, Index], Index] = builtins.max,
) -> Index:
    """Return one past the last key of a query's window; see `window_start`.

    Examples
    --------
    >>> [window_end(index, 6, 3, is_causal=True) for index in range(6)]
    [1, 2, 3, 4, 5, 6]
    """
    if is_causal:
        return minimum(index + 1, length)
    start = window_start(index, length, kernel_size, stride, minimum=minimum, maximum=maximum)
    return start + kernel_size


def window_bounds(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    *,
    minimum: Callable[[Index, Index], Index] = builtins.min,
    maximum: Callable[[Index, Index], Index] = builtins.max,
) -> tuple[Index, Index]:
    """Return ``(start, end)`` of a query's window; see `window_start` and `window_end`.

    Examples
    --------
    >>> window_bounds(5, 10, 4, stride=2)
    (3, 7)
    """
    arguments = (index, length, kernel_size, stride, is_causal)
    start = window_start(*arguments, minimum=minimum, maximum=maximum)
    return start, window_end(*arguments, minimum=minimum, maximum=maximum)


def query_bounds(
    key: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    *,
    minimum: Callable[[Index, Index], Index] = builtins.min,
    maximum: Callable[[Index, Index], Index] = builtins.max,
    choose: Callable[[Any, Index, Index], Index] = lambda condition, yes, no: yes if condition else no,
) -> tuple[Index, Index]:
    """Return ``(first, end)`` of the queries that see a key: the window rule the other way round.

    Windows begin and end in order, so these are consecutive.

    Parameters
    ----------
    key
        The key's position in its dilation group.
    length, kernel_size, stride, is_causal, minimum, maximum
        As in `window_start`.
    choose
        The choice between two values in the arithmetic of ``key``: ``torch.where``, ``tvm.tirx.Select``.

    Notes
    -----
    The stride groups that see the key are those whose leader lies in an interval: the window that is not causal begins
    at ``leader - kernel_size // 2`` unless a border shifts it, the causal one at ``leader - kernel_size + 1``. A key
    so near to the end that even the last window reaches it is seen by all queries from the first one on.

    Examples
    --------
    >>> [query_bounds(key, 6, 3) for key in range(6)]
    [(0, 2), (0, 3), (0, 4), (2, 6), (3, 6), (4, 6)]
    """
    if is_causal:
        # The last token of a stride group leads it.
        last = maximum(key + (kernel_size - stride), 0) // stride
        end = choose(key + (kernel_size - 1) >= length - 1, length, minimum((last + 1) * stride, length))
        return key, end
    left, lead = kernel_size // 2, stride // 2
    needed = maximum(key - (kernel_size - 1) + (left - lead), 0)
    first = choose(key < kernel_size, 0, (needed + (stride - 1)) // stride * stride)
    last = maximum(key + (left - lead), 0) // stride
    end = choose(key >= length - kernel_size, length, minimum((last + 1) * stride, length))
    return first, end
