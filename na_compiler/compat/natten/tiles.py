"""Windows in tiles of queries: what makes products over windows into products of matrices.

Queries that are neighbors have nearly the same window. So a tile of them, a box of the layout, is multiplied with all
keys that any of them sees, which is one box as well, and each query's window is picked from that product. With tiles
about as long as the window is, twice as much is multiplied along each axis as windows have, by matrix products, which
are more than twice as fast as anything that goes from key to key.

Axes are independent, and so are their tables, which are small; those of tiles are made of them, some tiles at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from na_compiler.window import group_length, window_bounds

__all__ = ["Axis", "Tiles", "places", "tiles", "windows"]

# Queries along an axis of a tile, at most, by the number of axes: more make products larger than caches.
_LONGEST = {1: 64, 2: 8, 3: 4}
_SHORTEST = 4
# Elements of products that are made at a time, of all batch entries and heads.
_AT_A_TIME = 1 << 20


class Axis(NamedTuple):
    """The window of every query along one axis, each ``[tokens]``.

    Parameters
    ----------
    group, position
        The query's dilation group, and where in that it is.
    start, end
        The window's first key, and one past its last, in the group.
    """

    group: Tensor
    position: Tensor
    start: Tensor
    end: Tensor


def windows(extent: int, kernel_size: int, dilation: int, is_causal: bool, device: torch.device) -> Axis:
    """Return the windows along an axis of some extent.

    Examples
    --------
    >>> windows(5, 3, 1, False, torch.device("cpu")).start
    tensor([0, 0, 1, 2, 2])
    """
    token = torch.arange(extent, device=device)
    return _windows(token % dilation, token // dilation, extent, kernel_size, dilation, is_causal)


def _windows(group: Tensor, position: Tensor, extent: int, kernel_size: int, dilation: int, is_causal: bool) -> Axis:
    bounds = window_bounds(
        position,
        group_length(extent, dilation, group).expand_as(position),
        kernel_size,
        is_causal=is_causal,
        minimum=_minimum,
        maximum=_maximum,
    )
    return Axis(group, position, *bounds)


def _minimum(first: Any, second: Any) -> Tensor:
    like = first if isinstance(first, Tensor) else second
    return torch.minimum(torch.as_tensor(first, device=like.device), torch.as_tensor(second, device=like.device))


def _maximum(first: Any, second: Any) -> Tensor:
    like = first if isinstance(first, Tensor) else second
    return torch.maximum(torch.as_tensor(first, device=like.device), torch.as_tensor(second, device=like.device))


def places(axis: Axis, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Return where in a table of biases each column of a window is, and whether there is a key, ``[tokens, window]``.

    A column without a key is where the window's last one is.

    Examples
    --------
    >>> places(windows(4, 3, 1, False, torch.device("cpu")), 3)[0]
    tensor([[2, 3, 4],
            [1, 2, 3],
            [1, 2, 3],
            [0, 1, 2]])
    """
    wanted = axis.start[:, None] + torch.arange(kernel_size, device=axis.start.device)
    found = torch.minimum(wanted, axis.end[:, None] - 1)
    return found - axis.position[:, None] + (kernel_size - 1), wanted < axis.end[:, None]


@dataclass(frozen=True)
class Tiles:
    """Tiles of queries, and the keys that each sees.

    Parameters
    ----------
    queries
        ``[tiles, queries]``: their numbers, counted over the layout. A tile that reaches beyond the end has the number
        of tokens there, as nothing does that is a token.
    keys
        ``[tiles, keys]``. Beyond an end the last key again, which no window has there.
    columns
        ``[tiles, queries, window]``: which of the keys each column of a window is; all of a row differ. A column
        without a key has one that its query does not see, or that is beyond the end.
    is_seen
        Of the same shape: where there is a key; None where there always is.
    """

    queries: Tensor
    keys: Tensor
    columns: Tensor
    is_seen: Tensor | None


def tiles(
    layout: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    rows: int,
    device: torch.device,
) -> Iterator[Tiles]:
    """Yield all tiles of a layout, some at a time.

    Parameters
    ----------
    layout, kernel_size, dilation, is_causal
        With a value for each axis.
    rows
        Batch entries times heads, of which products are made at a time.
    device
        Where the tables are made.
    """
    longest = _LONGEST[len(layout)]
    axes = [_axis_tiles(*axis, longest, device) for axis in zip(layout, kernel_size, dilation, is_causal, strict=True)]
    counts = [len(axis.queries) for axis in axes]
    pairs = math.prod(axis.queries.shape[1] * axis.keys.shape[1] for axis in axes)
    total, step = math.prod(counts), max(_AT_A_TIME // (rows * pairs), 1)
    beyond = math.prod(layout) if any(bool(axis.is_beyond) for axis in axes) else None
    for first in range(0, total, step):
        rest = torch.arange(first, min(first + step, total), device=device)
        chosen = []
        for count, axis in zip(reversed(counts), reversed(axes), strict=True):
            chosen.append(axis.of(rest % count))
            rest = rest // count
        yield _product(chosen[::-1], layout, beyond, has_all=not any(is_causal))


class _AxisTiles(NamedTuple):
    """Tiles along one axis: as `Tiles` has them, numbers counted along it; -1 stands for beyond the end."""

    queries: Tensor
    keys: Tensor
    columns: Tensor
    is_seen: Tensor
    is_beyond: bool

    def of(self, tile: Tensor) -> _AxisTiles:
        """Return some of the tiles."""
        queries, keys, columns, is_seen = (table.index_select(0, tile) for table in self[:4])
        return _AxisTiles(queries, keys, columns, is_seen, self.is_beyond)


def _axis_tiles(
    extent: int, kernel_size: int, dilation: int, is_causal: bool, longest: int, device: torch.device
) -> _AxisTiles:
    length = -(-extent // dilation)
    size = min(max(kernel_size, _SHORTEST), longest, length)
    count = -(-length // size)
    group = torch.arange(dilation, device=device)[:, None, None]
    last = group_length(extent, dilation, group) - 1
    wanted = torch.arange(count, device=device)[:, None] * size + torch.arange(size, device=device)
    position = torch.minimum(wanted, last)
    axis = _windows(group, position, extent, kernel_size, dilation, is_causal)
    # Windows begin in order, and from query to query at most one key later.
    begin = axis.start[..., :1]
    keys = begin + torch.arange(size + kernel_size - 1, device=device)
    column = axis.start[..., None] + torch.arange(kernel_size, device=device)
    queries, keys, columns, is_seen = (
        torch.where(wanted <= last, position * dilation + group, -1),
        torch.minimum(keys, last) * dilation + group,
        column - begin[..., None],
        column < axis.end[..., None],
    )
    is_beyond = bool(extent % (dilation * size))
    return _AxisTiles(
        queries.flatten(0, 1), keys.flatten(0, 1), columns.flatten(0, 1), is_seen.flatten(0, 1), is_beyond
    )


def _product(axes: Sequence[_AxisTiles], layout: Sequence[int], beyond: int | None, *, has_all: bool) -> Tiles:
    queries, keys, columns, is_seen, _ = axes[0]
    for extent, axis in zip(layout[1:], axes[1:], strict=True):
        is_token = (queries >= 0)[:, :, None] & (axis.queries >= 0)[:, None]
        queries = torch.where(is_token, _sum(queries * extent, axis.queries), -1).flatten(1)
        keys = _sum(keys * extent, axis.keys).flatten(1)
        columns = _sum_of_pairs(columns * axis.keys.shape[1], axis.columns)
        is_seen = (is_seen[:, :, None, :, None] & axis.is_seen[:, None, :, None]).flatten(3).flatten(1, 2)
    if beyond is not None:
        queries = queries.masked_fill(queries < 0, beyond)
    return Tiles(queries, keys, columns, None if has_all else is_seen)


def _sum(before: Tensor, along: Tensor) -> Tensor:
    return before[:, :, None] + along[:, None]


def _sum_of_pairs(before: Tensor, along: Tensor) -> Tensor:
    flat: Tensor = (before[:, :, None, :, None] + along[:, None, :, None]).flatten(3).flatten(1, 2)
    return flat
