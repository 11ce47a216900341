"""Where queries and keys lie, as TensorIR expressions: the window rule applied to strips, tiles and patches.

All that depends on the layout's extents, or on where windows are, is asked of an axis' `AxisPlaces`, and what is the
same for a whole strip of the strip. The strips of an axis are numbered dilation group by dilation group; that number is
what the parallel loop runs over, or group and number where the axis is open. A *position* counts keys from the first
one of the strip's box.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx
from tvm.tirx.script import builder as T

from na_compiler.schedules.cpu.plan import AxisTiling
from na_compiler.schedules.cpu.strips import ClosedStrip, Coverings, OpenStrip, Range, Strip, end_of, start_of
from na_compiler.tensorir.blocks import local
from na_compiler.window import SHIFT, WRAP

__all__ = ["AxisPlaces"]

Expr = Any  # tvm.ir.Expr, which has no types.


# Keys. Below, building a bias takes less than the branch that would skip it.
_WIDE = 64


class AxisPlaces:
    """Expressions of one axis.

    Parameters
    ----------
    axis
        Its extents.
    queries, keys
        Tokens that the tensors hold, of an axis that is open: int64.
    trims
        Whether only the keys are visited that a tile's queries see, in a loop whose extent is known when it runs.
    """

    def __init__(self, axis: AxisTiling, queries: Expr = None, keys: Expr = None, *, trims: bool = False) -> None:
        self.axis, self.trims = axis, trims
        self.extent: Expr = axis.layout if queries is None else queries
        self.key_extent: Expr = axis.layout if keys is None else keys
        # What the whole axis is, and where in it the tensors lie; of an open axis, once the function has begun.
        self.range: Range | None = None

    @property
    def strips(self) -> tuple[Expr, ...]:
        """Iterations of the parallel loop along the axis: strips of all dilation groups.

        Of an open axis groups, and strips of each: no division by a number that is not known.
        """
        axis = self.axis
        if not axis.is_open:
            return (axis.strips * axis.dilation,)
        number = tirx.ceildiv(self.extent, tirx.IntImm("int64", axis.dilation * axis.strip))
        return (number,) if axis.dilation == 1 else (axis.dilation, number)

    def strip(self, *iterators: Expr) -> Strip:
        """Return the strip of an iteration of the parallel loop; of an open axis, emits what it is."""
        if not self.axis.is_open:
            return ClosedStrip(self.axis, iterators[0])
        assert self.range is not None
        *group, number = (tirx.Cast("int32", iterator) for iterator in iterators)
        return OpenStrip(self.axis, self.range, group[0] if group else 0, number, trims=self.trims)

    def _first(self, strip: Strip, tile: Expr = 0) -> Expr:
        return strip.first + tile * self.axis.tile

    def _clamp(self, strip: Strip, index: Expr) -> Expr:
        return tirx.min(index, strip.end - 1) if self.axis.is_ragged else index

    def query(self, strip: Strip, tile: Expr, lane: Expr) -> Expr:
        """Return the index of a tile's query; beyond the last one that there is, that one again."""
        return self._clamp(strip, self._first(strip, tile) + lane)

    def is_query(self, strip: Strip, tile: Expr, lane: Expr) -> Expr | bool:
        """Return whether a tile's query exists."""
        if not self.axis.is_ragged and self.axis.longest % self.axis.strip == 0:
            return True
        return self._first(strip, tile) + lane < strip.end

    def start(self, strip: Strip, index: Expr) -> Expr:
        """Return the first key of a query's window."""
        return start_of(self.axis, index, strip.length)

    def end(self, strip: Strip, index: Expr) -> Expr:
        """Return one past the last key of a query's window."""
        return end_of(self.axis, index, strip.length)

    def key(self, strip: Strip, position: Expr) -> Expr:
        """Return the place in its tensor of the key at a position; beyond the last one that there is, of that one."""
        axis = self.axis
        index = strip.box + position
        if axis.border == WRAP:
            return strip.key_token(self._around(index))
        # The box itself ends with the group, or earlier; the last chunk may reach beyond it.
        if axis.is_open or axis.chunk * axis.chunks > min(axis.strip_box, axis.shortest):
            index = tirx.min(index, strip.keys_end - 1)
        return strip.key_token(index)

    def _around(self, index: Expr) -> Expr:
        """Return an index modulo the axis; no less than minus its length."""
        return (index + self.axis.longest) % self.axis.longest

    def tile_offset(self, strip: Strip, tile: Expr) -> Expr:
        """Return the position where a tile's own box begins; 0 where it visits whole chunks."""
        axis = self.axis
        if axis.chunks > 1 or (axis.tile_box == axis.strip_box and not self.trims):
            return 0
        first = self.start(strip, self._clamp(strip, self._first(strip, tile)))
        # Where the box is trimmed this is always so; but without a bound that the compiler sees, indices into what is
        # staged are slow.
        return tirx.min(first - strip.box, axis.strip_box - axis.tile_box)

    def rows(self, strip: Strip, tile: Expr) -> Expr:
        """Return how many keys from its offset on a tile's queries see; emits an array that keeps it."""
        kept = local((1,), "int32")
        with T.sblock("rows"):
            T.reads()
            T.writes(tirx.BufferRegion(kept, [ir.Range(0, 1)]))
            count = self.high(strip, tile, self.axis.tile - 1) + 1 - self.tile_offset(strip, tile)
            T.buffer_store(kept, count, [0])
        return kept[0]

    def patch_offset(self, strip: Strip, tile: Expr, patch: Expr) -> Expr:
        """Return where a patch's own box begins inside the tile's."""
        axis = self.axis
        if axis.chunks > 1 or axis.patch_box == axis.tile_box:
            return 0
        first = self.start(strip, self.query(strip, tile, patch * axis.patch))
        return tirx.min(first - strip.box - self.tile_offset(strip, tile), axis.tile_box - axis.patch_box)

    def low(self, strip: Strip, tile: Expr, lane: Expr) -> Expr:
        """Return the first key that a tile's query sees, as a position."""
        return self.start(strip, self.query(strip, tile, lane)) - strip.box

    def high(self, strip: Strip, tile: Expr, lane: Expr) -> Expr:
        """Return the last key that a tile's query sees, as a position."""
        return self.end(strip, self.query(strip, tile, lane)) - 1 - strip.box

    def relative(self, strip: Strip, tile: Expr, chunk: Expr) -> Expr:
        """Return the first key that a tile visits of a chunk, counted from its first query."""
        first = strip.box + self.tile_offset(strip, tile) + chunk * self.axis.chunk
        return first - self._first(strip, tile)

    def bias(self, strip: Strip, tile: Expr, chunk: Expr, position: Expr, lane: Expr) -> Expr:
        """Return where in a table of biases that of a visited key and a query is; of what no query sees, any place."""
        kernel_size = self.axis.kernel_size
        if kernel_size == 1:
            return 0
        place = self.relative(strip, tile, chunk) + position - lane + (kernel_size - 1)
        return tirx.max(tirx.min(place, 2 * kernel_size - 2), 0)

    def window_key(self, strip: Strip, tile: Expr, lane: Expr, number: Expr) -> tuple[Expr, Expr]:
        """Return the place in its tensor of the ``number``'th key of a query's window, and whether there is one."""
        query = self.query(strip, tile, lane)
        start = self.start(strip, query)
        key = start + number
        if self.axis.border == WRAP:
            return strip.key_token(self._around(key)), tirx.const(True, "bool")
        has_all = not self.axis.is_causal and self.axis.border == SHIFT
        is_there = tirx.const(True, "bool") if has_all else key < self.end(strip, query)
        if self.axis.border != SHIFT:
            key = tirx.min(key, strip.length - 1)
        return strip.key_token(key), is_there

    def meets(self, strip: Strip, tile: Expr, chunk: Expr) -> Expr | bool:
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

    def seen_by_all(self, strip: Strip, tile: Expr, position: Expr) -> Expr:
        """Return whether all of a tile's queries see the key at a position; windows begin and end in order."""
        return tirx.all(position >= self.low(strip, tile, self.axis.tile - 1), position <= self.high(strip, tile, 0))

    @property
    def coverings(self) -> int:
        """Numbers that `covering` has to be asked for.

        Strips of a group, times the places in a strip's box that one token may have; of an open axis, strips that the
        queries lie in that see one key.
        """
        axis = self.axis
        return axis.key_strips if axis.is_open else axis.strips * axis.turns

    def covering(self, token: Expr) -> Callable[[Expr], tuple[tuple[Expr, ...], Expr, Expr]]:
        """Return what finds the strips whose boxes may hold a token.

        A function of a number, which returns a strip as the parallel loop has it, the token's position there, and if it
        is in the box.
        """
        axis = self.axis
        if axis.is_open:
            assert self.range is not None
            return Coverings(axis, self.range, token)
        group, index = (0, token) if axis.dilation == 1 else (token % axis.dilation, token // axis.dilation)

        def of(number: Expr) -> tuple[tuple[Expr, ...], Expr, Expr]:
            if axis.border == WRAP:
                strip = group * axis.strips + number // axis.turns
                turn = number % axis.turns * axis.longest
                position = self._around(index - ClosedStrip(axis, strip).box) + turn
                return (strip,), position, position < axis.strip_box
            strip = group * axis.strips + number
            position = index - ClosedStrip(axis, strip).box
            return (strip,), position, tirx.all(position >= 0, position < axis.strip_box)

        return of
