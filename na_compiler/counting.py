"""What the window rule comes to along an axis, in closed form: none of these walks over tokens.

Each holds for one dilation group of ``length`` tokens, with ``stride <= kernel_size``, and ``kernel_size <= length``
unless windows are cut.
The rule itself is in `na_compiler.window`; the tests compare with it, token by token.
"""

from __future__ import annotations

import math

from na_compiler.window import (
    CUT,
    SHIFT,
    WRAP,
    border_kind,
    group_length,
    group_range,
    keys_before,
    query_bounds,
    window_end,
    window_start,
)

__all__ = [
    "group_lengths",
    "keys_needed",
    "most_queries",
    "most_queries_anywhere",
    "visible_pairs",
    "widest_inverse",
    "widest_union",
    "widest_union_anywhere",
]


def group_lengths(layout: int, dilation: int) -> dict[int, int]:
    """Return how many dilation groups have each length: the first ones may be one token longer than the last ones.

    Examples
    --------
    >>> group_lengths(10, 4), group_lengths(8, 4)
    ({3: 2, 2: 2}, {2: 4})
    """
    length, longer = divmod(layout, dilation)
    return {length + 1: longer, length: dilation - longer} if longer else {length: dilation}


def keys_needed(
    layout: int,
    first: int,
    count: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    border: str = SHIFT,
) -> tuple[int, int]:
    """Return ``(first, end)`` of the tokens of an axis that a range of its queries sees: the smallest range with all.

    Parameters
    ----------
    layout
        Tokens of the whole axis.
    first, count
        The queries; at least one.
    kernel_size, stride, dilation, is_causal, border
        Of the axis. Where windows wrap the range is one modulo ``layout``, and may begin before 0.

    Examples
    --------
    >>> keys_needed(512, 128, 128, 25), keys_needed(512, 128, 1, 3, dilation=8)
    ((116, 268), (120, 137))
    """
    # Windows begin and end in order, so the first and the last query of each dilation group decide.
    lows, highs = [], []
    for token in range(first, first + min(dilation, count)):
        group = token % dilation
        index, end = group_range(first, count, dilation, group)
        rule = (group_length(layout, dilation, group), kernel_size, stride, is_causal, border)
        lows.append(window_start(index, *rule) * dilation + group)
        highs.append((window_end(end - 1, *rule) - 1) * dilation + group + 1)
    return min(lows), max(highs)


def visible_pairs(length: int, kernel_size: int, stride: int = 1, is_causal: bool = False, border: str = SHIFT) -> int:
    """Return how many pairs of a query and a key that it sees there are.

    Examples
    --------
    >>> visible_pairs(6, 3), visible_pairs(6, 3, is_causal=True), visible_pairs(6, 3, border="cut")
    (18, 15, 16)
    """
    if border_kind(border) == CUT:
        # What each window would have of an axis without ends, less what lies before the first key and after the last.
        reach = _reach(kernel_size, stride, is_causal, border)
        outside = _missing(length, stride, reach)
        if is_causal:
            # Of whole groups a window grows with the query, from the leader's start on: sums of arithmetic series.
            groups, rest = divmod(length, stride)
            begins = groups * (groups - 1) // 2 * stride * stride + rest * groups * stride
            return length * (length + 1) // 2 - (begins - length * reach + outside)
        # After the last key it is the same from the other end, with the short stride group first.
        beyond = _missing_after(length, stride, kernel_size - reach)
        return length * kernel_size - outside - beyond
    if not is_causal:
        return length * kernel_size
    # Query i sees the keys up to itself, from its window's start: the leader's, which leads `stride` queries, or in the
    # last stride group, where that is not whole, fewer.
    whole, rest = divmod(length, stride)
    # Of the groups that begin after the first key, the first; and the sum of an arithmetic series from there on.
    first = min(kernel_size // stride, whole)
    count = whole - first
    starts = count * (first * stride + stride - kernel_size) + stride * (count * (count - 1) // 2)
    return length * (length + 1) // 2 - stride * starts - rest * (length - kernel_size)


def _reach(kernel_size: int, stride: int, is_causal: bool, border: str) -> int:
    """Return how many keys before the first query of a stride group its window begins."""
    return kernel_size - stride if is_causal else keys_before(kernel_size, border) - stride // 2


def _missing(length: int, stride: int, reach: int) -> int:
    """Return the sum, over all queries, of the keys of their windows that would lie before the first one."""
    whole, rest = divmod(length, stride)
    groups = min(-(-reach // stride), whole)  # Whole ones that miss some.
    missing = stride * (groups * reach - stride * (groups * (groups - 1) // 2))
    return missing + rest * max(reach - whole * stride, 0)


def _missing_after(length: int, stride: int, ahead: int) -> int:
    """Return the same of those after the last one, where windows end ``ahead`` after a stride group's first query."""
    whole, rest = divmod(length, stride)
    missing = rest * max(whole * stride + ahead - length, 0)
    # Of whole groups, from the last one on: how much each misses falls by the stride.
    most = whole * stride - stride + ahead - length
    groups = min(max(-(-most // stride), 0), whole)
    return missing + stride * (groups * most - stride * (groups * (groups - 1) // 2))


def most_queries(length: int, kernel_size: int, stride: int = 1, is_causal: bool = False, border: str = SHIFT) -> int:
    """Return how many queries see one key, at most: more than kernel_size near a border, where windows are shifted.

    Examples
    --------
    >>> most_queries(9, 3), most_queries(4, 3), most_queries(9, 3, is_causal=True), most_queries(9, 3, border="cut")
    (4, 4, 3, 3)
    """
    if border != SHIFT:
        if not is_causal:
            return min(-(-kernel_size // stride) * stride, length)
        # Of the first key of a stride group, and of the one that a further group begins to see.
        whole, rest = divmod(kernel_size, stride)
        ahead = stride - rest
        return max(min(whole * stride, length), min((whole + 1) * stride, length) - ahead if rest else 0)
    # Up to the last key of the first window the first query is 0, and with every key more follow; from the first key of
    # the last window on it is the other way round. Between them no key is seen by more: windows are not shifted there.
    keys = (kernel_size - 1, length - kernel_size)
    seen: list[tuple[int, int]] = [query_bounds(key, length, kernel_size, stride, is_causal) for key in keys]
    return max(end - first for first, end in seen)


def most_queries_anywhere(kernel_size: int, is_causal: bool = False) -> int:
    """Return how many queries see one key, at most, in a dilation group of any length where windows are shifted.

    The key in the middle of a group of ``2 * kernel_size - 1`` tokens is in all of its windows; of causal windows a key
    is only in later ones.

    Examples
    --------
    >>> most_queries_anywhere(3), most_queries_anywhere(3, is_causal=True)
    (5, 3)
    """
    return kernel_size if is_causal else 2 * kernel_size - 1


def widest_union_anywhere(kernel_size: int, stride: int, is_causal: bool, queries: int) -> int:
    """Return the most keys that consecutive queries see together, in a dilation group of any length.

    Windows are shifted at the ends; the first of the queries may be any, as in a part of a layout.

    Examples
    --------
    >>> [widest_union_anywhere(3, 1, False, queries) for queries in (1, 2, 4)]
    [3, 4, 6]
    """
    # The first query may be the last of its stride group.
    behind = stride - 1
    if is_causal:
        # A leader beyond the end of the group is its last token, and the windows end there: no more than one window.
        return max(kernel_size, behind + queries + kernel_size - stride)
    groups = -(-(behind + queries) // stride)
    return (groups - 1) * stride + kernel_size


def widest_union(length: int, kernel_size: int, stride: int, is_causal: bool, queries: int, border: str = SHIFT) -> int:
    """Return the largest number of keys that a block of queries sees together.

    Parameters
    ----------
    length, kernel_size, stride, is_causal
        As everywhere in this module.
    queries
        Of a block, at most ``length``; blocks lie one after another from the first query on, and the last one may be
        shorter.
    border
        As everywhere in this module. Where windows wrap a union counts keys twice that it meets from both ends.

    Examples
    --------
    >>> [widest_union(10, 3, 1, False, queries) for queries in (1, 2, 4)]
    [3, 4, 6]
    """
    last = -(-length // queries) - 1
    rule = (length, kernel_size, stride, is_causal, border)

    def union(block: int) -> int:
        end: int = window_end(min((block + 1) * queries, length) - 1, *rule)
        start: int = window_start(block * queries, *rule)
        return end - start

    # Of the blocks that begin with the first key, the last has the widest union. (A query does where its leader is no
    # further from the first one than from the first key of its window.)
    reach = _reach(kernel_size, stride, is_causal, border)
    first = min((reach // stride * stride + stride - 1) // queries, last)
    if border == SHIFT and length == kernel_size and not is_causal:
        first = last
    if border == WRAP:
        # No block is at a border; only the last one may be shorter.
        first, beyond = -1, last
    elif is_causal and border != SHIFT:
        beyond = last
    elif is_causal:
        # In the last stride group all windows begin with the last one: there the last block is the widest.
        beyond = min(-(-(max(-(-(length - stride) // stride), 0) * stride) // queries), last)
    else:
        # Of the blocks that end with the last key, the first is.
        ends = -(-(length - kernel_size + reach) // stride) * stride
        beyond = min(max(-(-(ends - queries + 1) // queries), 0), last)
    widest = max(union(max(first, 0)), union(beyond), union(last))
    between = beyond - first - 1
    if between > 0:
        # Between them nothing is clamped, and what counts is where in its stride group a block begins.
        residue = _largest_residue(queries, stride, first + 1, between)
        if is_causal:
            inside = queries + kernel_size - stride + residue
        else:
            inside = (residue + queries - 1) // stride * stride + kernel_size
        widest = max(widest, inside)
    return widest


def widest_inverse(length: int, kernel_size: int, stride: int, is_causal: bool, keys: int, border: str = SHIFT) -> int:
    """Return the largest number of queries that see a block of keys: from the first that sees one to the last.

    Parameters
    ----------
    length, kernel_size, stride, is_causal
        As everywhere in this module.
    keys
        Of a block, at most ``length``; blocks lie as in `widest_union`.
    border
        As there.

    Examples
    --------
    >>> [widest_inverse(10, 3, 1, False, keys) for keys in (1, 2, 4)]
    [4, 5, 7]
    """
    last = -(-length // keys) - 1
    rule = (length, kernel_size, stride, is_causal, border)

    def inverse(block: int) -> int:
        first: int = query_bounds(block * keys, *rule)[0]
        end: int = query_bounds(min((block + 1) * keys, length) - 1, *rule)[1]
        return end - first

    # Of the blocks whose first key is seen by the first query, the last has most; of those whose last key is seen by
    # the last query, the first. (Where windows are causal, queries before a key do not see it.)
    reach = _reach(kernel_size, stride, is_causal, border)
    if border == WRAP:
        # No block is at a border; only the last one may be shorter.
        first, beyond = -1, last
    elif border != SHIFT:
        first = -1 if is_causal else min((kernel_size - reach - 1) // keys, last)
        ends = -(-length // stride) * stride - stride - reach
        beyond = min(max(-(-(ends + 1) // keys) - 1, 0), last)
    else:
        first = -1 if is_causal else min((kernel_size - 1) // keys, last)
        beyond = min(max(-(-(length - kernel_size + 1) // keys) - 1, 0), last)
    widest = max(inverse(block) for block in (max(first, 0), beyond, last))
    between = beyond - first - 1
    if between > 0:
        # Between them nothing is clamped, and what counts is where in a stride group a block begins.
        if is_causal:
            residue = _largest_residue(-keys % stride, stride, first + 1, between, -keys - kernel_size)
            inside = keys - 1 + kernel_size - (stride - 1 - residue)
        else:
            residue = _largest_residue(keys, stride, first + 1, between, reach - kernel_size)
            inside = ((keys + kernel_size - 2 - (stride - 1 - residue)) // stride + 1) * stride
        widest = max(widest, inside)
    return widest


def _largest_residue(step: int, modulus: int, first: int, count: int, offset: int = 0) -> int:
    """Return the largest ``(step * n + offset) % modulus`` of ``count`` numbers ``n`` from ``first`` on."""
    common = math.gcd(step, modulus)
    if count >= modulus // common:
        return modulus - common + offset % common
    # A residue is at least t where adding modulus - t to the number before division makes the quotient larger.
    begin = step * first + offset % modulus
    floor = _floor_sum(count, step, begin, modulus)
    low, high = 0, modulus - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _floor_sum(count, step, begin + modulus - middle, modulus) > floor:
            low = middle
        else:
            high = middle - 1
    return low


def _floor_sum(count: int, step: int, offset: int, divisor: int) -> int:
    """Return the sum of ``(step * n + offset) // divisor`` over n from 0 to ``count - 1``: Euclid's algorithm.

    The whole parts of slope and offset are summed at once; what is left counts lattice points below a line, which is
    the same with the axes exchanged (Graham, Knuth, Patashnik: Concrete Mathematics, 3.5).
    """
    total = 0
    while count > 0:
        total += step // divisor * (count * (count - 1) // 2) + offset // divisor * count
        step, offset = step % divisor, offset % divisor
        beyond = step * count + offset
        if beyond < divisor:
            break
        count, offset, step, divisor = beyond // divisor, beyond % divisor, divisor, step
    return total
