"""Where queries and keys lie, as TensorIR expressions: the window rule applied to strips, tiles and patches.

All that depends on the layout's extents, or on where windows are, is asked of an axis' `AxisPlaces`. The strips of an
axis are numbered dilation group by dilation group; that number is what the parallel loop runs over. A *position* counts
keys from the first one of the strip's box.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from na_compiler.schedules.cpu.plan import AxisTiling
from na_compiler.window import SHIFT, WRAP, group_length, window_end, window_start

__all__ = ["AxisPlaces"]

Expr = Any  # tvm.ir.Expr, which has no types.


# Keys. Below, building a bias takes less than the branch that would skip it.
_WIDE = 64


class AxisPlaces:
    """Expressions of one axis."""

    def __init__(self, axis: AxisTiling) -> None:
        self.axis = axis

    @property
    def extent(self) -> int:
        """Tokens of the layout along the axis."""
        return self.axis.layout

    @property
    def strips(self) -> int:
        """Strips of all dilation groups: iterations of the parallel loop along the axis."""
        return self.axis.strips * self.axis.dilation

    @property
    def strips_of_group(self) -> int:
        """Strips of one dilation group, the longest."""
        return self.axis.strips

    def group(self, strip: Expr) -> Expr:
        """Return the dilation group of a strip."""
        return 0 if self.axis.dilation == 1 else strip // self.strips_of_group

    def length(self, strip: Expr) -> Expr:
        """Return the tokens of the strip's dilation group."""
        if self.axis.longest == self.axis.shortest:
            return self.axis.longest
        return group_length(self.extent, self.axis.dilation, self.group(strip))

    def token(self, strip: Expr, index: Expr) -> Expr:
        """Return the place in the layout of a token, given its index in the dilation group."""
        return index if self.axis.dilation == 1 else index * self.axis.dilation + self.group(strip)

    def _first(self, strip: Expr, tile: Expr = 0) -> Expr:
        number = strip if self.axis.dilation == 1 else strip % self.strips_of_group
        return number * self.axis.strip + tile * self.axis.tile

    def _clamp(self, strip: Expr, index: Expr) -> Expr:
        return tirx.min(index, self.length(strip) - 1) if self.axis.is_ragged else index

    def query(self, strip: Expr, tile: Expr, lane: Expr) -> Expr:
        """Return the index of a tile's query; beyond the end of the group, the group's last one again."""
        return self._clamp(strip, self._first(strip, tile) + lane)

    def is_query(self, strip: Expr, tile: Expr, lane: Expr) -> Expr | bool:
        """Return whether a tile's query exists."""
        if not self.axis.is_ragged and self.axis.longest % self.axis.strip == 0:
            return True
        return self._first(strip, tile) + lane < self.length(strip)

    def start(self, strip: Expr, index: Expr) -> Expr:
        """Return the first key of a query's window."""
        return window_start(index, self.length(strip), *self._rule, minimum=tirx.min, maximum=tirx.max)

    def end(self, strip: Expr, index: Expr) -> Expr:
        """Return one past the last key of a query's window."""
        return window_end(index, self.length(strip), *self._rule, minimum=tirx.min, maximum=tirx.max)

    @property
    def _rule(self) -> tuple[int, int, bool, str]:
        return self.axis.kernel_size, self.axis.stride, self.axis.is_causal, self.axis.border

    def box(self, strip: Expr) -> Expr:
        """Return the index of the first key of the strip's box, moved left where the box would pass the end.

        Where windows wrap boxes may lie anywhere, and begin before the first token: indices count modulo the axis.
        """
        axis = self.axis
        if axis.border == WRAP:
            return self.start(strip, self._clamp(strip, self._first(strip)))
        if axis.strip_box >= axis.longest:
            return 0
        first = self.start(strip, self._clamp(strip, self._first(strip)))
        base = tirx.min(first, self.length(strip) - axis.strip_box)
        return tirx.max(base, 0) if axis.strip_box > axis.shortest else base

    def key(self, strip: Expr, position: Expr) -> Expr:
        """Return the place in the layout of the key at a position; beyond the group's end, of its last key."""
        axis = self.axis
        index = self.box(strip) + position
        if axis.border == WRAP:
            return self.token(strip, self._around(index))
        # The box itself ends with the group, or earlier; the last chunk may reach beyond it.
        if axis.chunk * axis.chunks > min(axis.strip_box, axis.shortest):
            index = tirx.min(index, self.length(strip) - 1)
        return self.token(strip, index)

    def _around(self, index: Expr) -> Expr:
        """Return an index modulo the axis; no less than minus its length."""
        return (index + self.axis.longest) % self.axis.longest

    def tile_offset(self, strip: Expr, tile: Expr) -> Expr:
        """Return the position where a tile's own box begins; 0 where it visits whole chunks."""
        axis = self.axis
        if axis.chunks > 1 or axis.tile_box == axis.strip_box:
            return 0
        first = self.start(strip, self._clamp(strip, self._first(strip, tile)))
        return tirx.min(first - self.box(strip), axis.strip_box - axis.tile_box)

    def patch_offset(self, strip: Expr, tile: Expr, patch: Expr) -> Expr:
        """Return where a patch's own box begins inside the tile's."""
        axis = self.axis
        if axis.chunks > 1 or axis.patch_box == axis.tile_box:
            return 0
        first = self.start(strip, self.query(strip, tile, patch * axis.patch))
        return tirx.min(first - self.box(strip) - self.tile_offset(strip, tile), axis.tile_box - axis.patch_box)

    def low(self, strip: Expr, tile: Expr, lane: Expr) -> Expr:
        """Return the first key that a tile's query sees, as a position."""
        return self.start(strip, self.query(strip, tile, lane)) - self.box(strip)

    def high(self, strip: Expr, tile: Expr, lane: Expr) -> Expr:
        """Return the last key that a tile's query sees, as a position."""
        return self.end(strip, self.query(strip, tile, lane)) - 1 - self.box(strip)

    def relative(self, strip: Expr, tile: Expr, chunk: Expr) -> Expr:
        """Return the first key that a tile visits of a chunk, counted from its first query."""
        first = self.box(strip) + self.tile_offset(strip, tile) + chunk * self.axis.chunk
        return first - self._first(strip, tile)

    def bias(self, strip: Expr, tile: Expr, chunk: Expr, position: Expr, lane: Expr) -> Expr:
        """Return where in a table of biases that of a visited key and a query is; of what no query sees, any place."""
        kernel_size = self.axis.kernel_size
        if kernel_size == 1:
            return 0
        place = self.relative(strip, tile, chunk) + position - lane + (kernel_size - 1)
        return tirx.max(tirx.min(place, 2 * kernel_size - 2), 0)

    def window_key(self, strip: Expr, tile: Expr, lane: Expr, number: Expr) -> tuple[Expr, Expr]:
        """Return the place in the layout of the ``number``'th key of a query's window, and whether there is one."""
        query = self.query(strip, tile, lane)
        start = self.start(strip, query)
        key = start + number
        if self.axis.border == WRAP:
            return self.token(strip, self._around(key)), tirx.const(True, "bool")
        has_all = not self.axis.is_causal and self.axis.border == SHIFT
        is_there = tirx.const(True, "bool") if has_all else key < self.end(strip, query)
        if self.axis.border != SHIFT:
            key = tirx.min(key, self.length(strip) - 1)
        return self.token(strip, key), is_there

    def meets(self, strip: Expr, tile: Expr, chunk: Expr) -> Expr | bool:
        """Return whether any of a tile's queries sees any key of a chunk."""
        axis = self.axis
        if axis.chunks == 1:
            return True
        first = chunk * axis.chunk
        last = axis.tile - 1
        return tirx.all(first <= self.high(strip, tile, last), first + axis.chunk > self.low(strip, tile, 0))

    @property
    def is_wide(self) -> bool:
        """Whether enough keys of a tile's box are seen by all of its queries for a branch to pay."""
        axis = self.axis
        return axis.visited >= _WIDE and 2 * axis.kernel_size - axis.tile_box >= _WIDE // 2

    def seen_by_all(self, strip: Expr, tile: Expr, position: Expr) -> Expr:
        """Return whether all of a tile's queries see the key at a position; windows begin and end in order."""
        return tirx.all(position >= self.low(strip, tile, self.axis.tile - 1), position <= self.high(strip, tile, 0))

    @property
    def coverings(self) -> int:
        """Strips of a group, times the places in a strip's box that one token may have."""
        return self.strips_of_group * self.axis.turns

    def covering(self, token: Expr, number: Expr) -> tuple[Expr, Expr, Expr]:
        """Return the ``number``-th strip of a token's group, the token's position there, and if it is in the box."""
        axis = self.axis
        group, index = (0, token) if axis.dilation == 1 else (token % axis.dilation, token // axis.dilation)
        if axis.border == WRAP:
            strip = group * self.strips_of_group + number // axis.turns
            turn = number % axis.turns * axis.longest
            position = self._around(index - self.box(strip)) + turn
            return strip, position, position < axis.strip_box
        strip = group * self.strips_of_group + number
        position = index - self.box(strip)
        return strip, position, tirx.all(position >= 0, position < axis.strip_box)
