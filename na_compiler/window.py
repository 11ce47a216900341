"""The window rule: which keys a query attends to, along one axis.

Axes are independent: a key is a neighbor when it is one on every axis. With dilation ``d`` an axis of
``layout`` tokens splits into ``d`` groups (token ``x`` is in group ``x % d`` at index ``x // d``) and the rule is
applied inside the group. The rule is that of NATTEN 0.21; written once, here, for Python integers, torch
tensors and TensorIR expressions alike, so that the reference, the description, the planner and the tests
cannot disagree about it.

What windows do at the ends of an axis is its *border*:

``"shift"``
    They move inwards, and keep their size: NATTEN's rule, and the default.
``"cut"``
    They keep their place, and lose what lies outside. The kernel size may exceed the axis.
``"cut:LEFT"``
    The same, with ``LEFT`` keys before the query and the rest after it.
``"wrap"``
    The axis is a circle: positions beyond an end are those from the other one on.

Tensors may hold a part of an axis (`na_compiler.place.Place`): the queries ``[first, first + count)`` of it, and the
keys of another such range, which holds all that these queries see. The rule knows nothing of that: positions, lengths
and ends are those of the whole axis, and `group_range` says which tokens of a dilation group a range has.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

__all__ = ["BORDERS", "border_kind", "group_length", "group_range", "keys_before", "query_bounds", "window_bounds",
           "window_end", "window_start"]  # fmt: skip

SHIFT, CUT, WRAP = BORDERS = ("shift", "cut", "wrap")

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


def group_range(first: Index, count: Index, dilation: int, group: Index = 0) -> tuple[Index, Index]:
    """Return ``(first, end)`` of one dilation group's tokens that lie in a range of the axis, counted in the group.

    Parameters
    ----------
    first, count
        The range, in tokens of the axis. It may hold no token of the group.
    dilation, group
        As in `group_length`.

    Examples
    --------
    >>> [group_range(5, 3, 4, group) for group in range(4)]
    [(2, 2), (1, 2), (1, 2), (1, 2)]
    """
    return group_length(first, dilation, group), group_length(first + count, dilation, group)


def border_kind(border: str) -> str:
    """Return a border's word, without the number of keys before a query.

    Examples
    --------
    >>> border_kind("cut:5")
    'cut'
    """
    return border.partition(":")[0]


def keys_before(kernel_size: int, border: str = SHIFT) -> int:
    """Return how many keys of a window that is not causal lie before the query that leads it.

    Examples
    --------
    >>> keys_before(7), keys_before(8), keys_before(8, "cut:0")
    (3, 4, 0)
    """
    _, _, left = border.partition(":")
    return int(left) if left else kernel_size // 2


def window_start(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    border: str = SHIFT,
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
        Tokens in the group; at least ``kernel_size`` unless the border is ``"cut"``.
    kernel_size, stride, is_causal, border
        The axis' parameters.
    minimum, maximum
        The two comparisons in the arithmetic of ``index``: the built-in ones for integers, ``torch.minimum`` or
        ``tvm.tirx.min`` for tensors and expressions.

    Notes
    -----
    All queries of a stride group share the window of their leader. NATTEN writes the window that is not causal
    as ``max(leader - left, 0)`` plus a shift where it would pass the end; for ``kernel_size <= length`` this is
    the same as clamping ``leader - left`` into ``[0, length - kernel_size]``.

    Where windows are cut or wrap, the leader of the last stride group may lie beyond the end. Those that wrap begin at
    ``leader - left`` as it is, from ``-left`` on: positions count modulo ``length``.

    Examples
    --------
    >>> [window_start(index, 6, 3) for index in range(6)]
    [0, 0, 1, 2, 3, 3]
    >>> [window_start(index, 6, 3, border="cut") for index in range(6)]
    [0, 0, 1, 2, 3, 4]
    """
    if border != SHIFT:
        start = _unclamped(index, kernel_size, stride, is_causal, border)
        return start if border == WRAP else maximum(start, 0)
    group_start = index if stride == 1 else index // stride * stride
    if is_causal:
        leader = minimum(group_start + (stride - 1), length - 1)
        return maximum(leader - (kernel_size - 1), 0)
    leader = index if stride == 1 else minimum(group_start + stride // 2, length - 1)
    return maximum(minimum(leader - kernel_size // 2, length - kernel_size), 0)


def _unclamped(index: Index, kernel_size: int, stride: int, is_causal: bool, border: str) -> Index:
    """Return where a window begins on an axis without ends."""
    group_start = index if stride == 1 else index // stride * stride
    before = kernel_size - stride if is_causal else keys_before(kernel_size, border) - stride // 2
    return group_start - before


def window_end(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    border: str = SHIFT,
    *,
    minimum: Callable[[Index, Index], Index] = builtins.min,
    maximum: Callable[[Index, Index], Index] = builtins.max,
) -> Index:
    """Return one past the last key of a query's window; see `window_start`.

    Examples
    --------
    >>> [window_end(index, 6, 3, is_causal=True) for index in range(6)]
    [1, 2, 3, 4, 5, 6]
    >>> [window_end(index, 6, 3, border="cut") for index in range(6)]
    [2, 3, 4, 5, 6, 6]
    """
    if is_causal:
        return minimum(index + 1, length)
    if border != SHIFT:
        end = _unclamped(index, kernel_size, stride, is_causal, border) + kernel_size
        return end if border == WRAP else minimum(end, length)
    start = window_start(index, length, kernel_size, stride, minimum=minimum, maximum=maximum)
    return start + kernel_size


def window_bounds(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    border: str = SHIFT,
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
    arguments = (index, length, kernel_size, stride, is_causal, border)
    start = window_start(*arguments, minimum=minimum, maximum=maximum)
    return start, window_end(*arguments, minimum=minimum, maximum=maximum)


def query_bounds(
    key: Index,
    length: Index,
    kernel_size: int,
    stride: int = 1,
    is_causal: bool = False,
    border: str = SHIFT,
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
    length, kernel_size, stride, is_causal, border, minimum, maximum
        As in `window_start`.
    choose
        The choice between two values in the arithmetic of ``key``: ``torch.where``, ``tvm.tirx.Select``.

    Notes
    -----
    The stride groups that see the key are those whose leader lies in an interval: the window that is not causal begins
    at ``leader - kernel_size // 2`` unless a border shifts it, the causal one at ``leader - kernel_size + 1``. A key
    so near to the end that even the last window reaches it is seen by all queries from the first one on. Where windows
    are cut no border shifts any. Where they wrap the queries that see a key are consecutive modulo ``length``: the
    first may be negative, as a window's start is.

    Examples
    --------
    >>> [query_bounds(key, 6, 3) for key in range(6)]
    [(0, 2), (0, 3), (0, 4), (2, 6), (3, 6), (4, 6)]
    >>> [query_bounds(key, 6, 3, border="cut") for key in range(6)]
    [(0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 6)]
    """
    if border != SHIFT:
        # Windows that are not causal begin `reach` before their stride group does, causal ones end with the query.
        reach = kernel_size - stride if is_causal else keys_before(kernel_size, border) - stride // 2
        end = ((key + reach) // stride + 1) * stride
        if is_causal:
            return key, minimum(end, length)
        first = (key + (reach - kernel_size + stride)) // stride * stride
        return (first, end) if border == WRAP else (maximum(first, 0), minimum(end, length))
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
