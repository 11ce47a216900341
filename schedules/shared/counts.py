"""How many tiles meet along an axis: those of tokens that blocks own, and those that stream by. Pure Python and NumPy.

Tiles that lie away from the borders are all alike, but for where in its stride group one begins, and are counted once
for each such place. Where very many tiles lie at a border (a long window), or strides make very many places, some are
counted in place of all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from na_compiler.counting import group_lengths
from na_compiler.window import query_bounds, window_bounds

__all__ = ["tiles_met"]

_Numbers = NDArray[Any]

# Tiles of a border, or places of one in a stride group, up to which all are counted; and how many of more are.
_MOST, _COUNTED = 192, 64
# Multiples of it, modulo 1, are spread evenly, however many there are.
_GOLDEN = (math.sqrt(5) - 1) / 2


@functools.lru_cache(maxsize=4096)
def tiles_met(
    axis: tuple[int, int, int, int, bool],
    own: tuple[int, int, int],
    streams: tuple[int, ...],
    *,
    skips: bool,
    of_queries: bool = True,
    align: int = 1,
) -> _Numbers:
    """Count along one axis, over all dilation groups.

    Parameters
    ----------
    axis
        Of the problem: layout, kernel size, stride, dilation, causality.
    own
        Tokens of a part's box; of one warp's box in it, which divides it; parts of a block, one after another.
    streams
        Extents of tiles that stream by, to be counted each for itself.
    skips
        Whether a part leaves out tiles that only others need.
    of_queries
        Whether blocks own queries, and the keys that they see stream by; else it is the other way round.
    align
        The first tile begins at a multiple of it.

    Returns
    -------
    array
        Of shape ``[3, streams]``: tiles that parts visit; of these, those that every token of a warp needs as a whole,
        on the average of the warps; tiles that blocks load.
    """
    known = _known((axis, own, skips, of_queries, align))
    missing = [stream for stream in streams if stream not in known]
    if missing:
        counted = _met(axis, own, missing, skips, of_queries, align)
        known.update(zip(missing, counted.T, strict=True))
    total: _Numbers = np.stack([known[stream] for stream in streams], axis=1)
    total.flags.writeable = False
    return total


@functools.lru_cache(maxsize=1024)
def _known(_: Hashable) -> dict[int, _Numbers]:
    """Return what has been counted of so given tiles, by the extents: planners ask for the same ones in many sets."""
    return {}


def _met(
    axis: tuple[int, int, int, int, bool],
    own: tuple[int, int, int],
    streams: list[int],
    skips: bool,
    of_queries: bool,
    align: int,
) -> _Numbers:
    """Count as `tiles_met` does: all extents at once, since what NumPy takes is the number of its calls."""
    box, warp_box, parts = own
    stream = np.array(streams)[:, None, None]
    total: _Numbers = np.zeros((3, len(streams)))
    for groups, weights, (low, high), (start, end), (until, since) in _needs(axis, own, skips, of_queries, align):
        from_tile, to_tile = (start - low) // stream, -(-(end - low) // stream)
        visited = np.broadcast_to(to_tile - from_tile, (len(streams), parts, len(low))).sum(axis=1) @ weights
        of_warps = stream[:, None]
        whole = np.maximum(until // of_warps - np.maximum(-(-since // of_warps), from_tile[:, None]), 0)
        loaded = -(-(high - low) // stream[:, 0]) @ weights
        total += groups * np.array([visited, whole.sum(axis=(1, 2)) @ weights * (warp_box / box), loaded])
    return total


def _tiles(length: int, tile: int, kernel_size: int, stride: int, align: int) -> tuple[_Numbers, _Numbers]:
    """Return the numbers of tiles that stand for all, and for how many each stands."""
    tiles = -(-length // tile)
    # No window, nor the queries that see a key, is shifted so far from both ends.
    border = -(-(2 * kernel_size + 2 * stride) // tile) + 1
    if tiles <= max(2 * border, _MOST):
        return _spread(0, tiles)
    period = math.lcm(stride, align)
    places = period // math.gcd(tile, period)
    between = tiles - 2 * border
    if places > min(between, _MOST):
        inner = _spread(border, between)
    else:
        number = np.arange(places)
        inner = border + number, (between - number + places - 1) // places
    parts = (_spread(0, border), inner, _spread(tiles - border, border))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _spread(first: int, count: int) -> tuple[_Numbers, _Numbers]:
    """Return consecutive numbers, or of many some at equal distances, and for how many each stands."""
    if count <= _MOST:
        return first + np.arange(count), np.ones(count)
    edges = np.arange(_COUNTED + 1) * count // _COUNTED
    widths = np.diff(edges)
    # One of each stretch; not always the same place in it, which a stride might repeat.
    places = np.arange(_COUNTED) * _GOLDEN % 1 * widths
    return first + edges[:-1] + places.astype(int), widths


@functools.lru_cache(maxsize=256)
def _needs(
    axis: tuple[int, int, int, int, bool], own: tuple[int, int, int], skips: bool, of_queries: bool, align: int
) -> list[tuple[int, _Numbers, tuple[_Numbers, _Numbers], tuple[_Numbers, _Numbers], tuple[_Numbers, _Numbers]]]:
    """Return what tiles need, whatever the extent of those that stream by; for each length of a dilation group.

    Returns
    -------
    list
        How many groups there are, for how many tiles each stands, and pairs: begin and end of what tiles need, and of
        what parts visit; and of each warp, counted from the first, the end of what its first token needs and the begin
        of what its last does.
    """
    layout, kernel_size, stride, dilation, is_causal = axis
    rule = functools.partial(
        window_bounds if of_queries else functools.partial(query_bounds, choose=np.where),
        kernel_size=kernel_size, stride=stride, is_causal=is_causal, minimum=np.minimum, maximum=np.maximum,
    )  # fmt: skip
    box, warp_box, parts = own
    found = []
    for length, groups in group_lengths(layout, dilation).items():
        bounds = functools.partial(rule, length=length)
        numbers, weights = _tiles(length, box * parts, kernel_size, stride, align)
        first = numbers * (box * parts)
        low = bounds(first)[0] // align * align
        high = bounds(np.minimum(first + box * parts, length) - 1)[1]
        begin = np.minimum(first + box * np.arange(parts)[:, None], length - 1)
        last = np.minimum(begin + box, length) - 1
        visited = (bounds(begin)[0], bounds(last)[1]) if skips else (low, high)
        its_first = np.minimum(begin + np.arange(0, box, warp_box)[:, None, None], length - 1)
        its_last = np.minimum(its_first + warp_box, length) - 1
        of_warps = bounds(its_first)[1] - low, bounds(its_last)[0] - low
        found.append((groups, weights, (low, high), visited, of_warps))
    return found
