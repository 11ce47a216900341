"""Which scores of a tile are those of a window: the others become minus infinity."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from na_compiler.schedules.shared.bits import stretch
from na_compiler.schedules.shared.key_mask import KeyMask
from na_compiler.schedules.shared.tiles import Fragments, Rows
from na_compiler.schedules.shared.trace import I, T, both, let, minimum, put, register, when
from na_compiler.schedules.shared.work import StreamCursor, Work

__all__ = ["Mask", "columns_before"]

Expr = Any
_ROWS = 2


def columns_before(column: Expr) -> Expr:
    """Return how many of a thread's columns lie before one, seen from its first: two of every eight."""
    if isinstance(column, int):
        return column // 8 * 2 + min(column % 8, 2)
    return T.shift_right(column, 3) * 2 + minimum(T.bitwise_and(column, 7), 2)


class Mask:
    """Emits the mask for one tile of queries.

    A tile of keys that lies in every window of the warp's queries needs none, which is found out for the whole warp;
    with a key mask, where that hides none of them.
    """

    def __init__(
        self, products: Fragments, rows: Rows, work: Work, additional: Expr | None, key_mask: KeyMask | None = None
    ) -> None:
        self.key_mask = key_mask
        self.plan, self.scores, self.rows, self.work = products.plan, products.scores, rows, work
        self.additional = additional
        self.queries = [rows.position(row, work.first) for row in rows.rows]
        self.exist = [work.within(query, self.plan.own_tile) for query in self.queries]
        pair = let(T.bitwise_and(rows.lane, 3) * 2)
        self.pair = pair
        self._windows: list[list[tuple[Expr, Expr]]] = []
        for query in self.queries:
            windows = []
            for axis in range(self.plan.rank):
                start, end = work.bounds(axis, work.clamp(axis, query[axis]))
                extent = register(end - start) if work.extent(axis) is None else work.extent(axis)
                # Along the last axis, seen from the thread's first key.
                windows.append((register(start - pair if axis == self.plan.rank - 1 else start), extent))
            self._windows.append(windows)
        first, last = rows.warp_queries(work.first)
        self._common = []
        for axis in range(self.plan.rank):
            start, _ = work.bounds(axis, work.clamp(axis, last[axis]))
            _, end = work.bounds(axis, work.clamp(axis, first[axis]))
            self._common.append((let(start), let(end)))

    def whole(self, cursor: StreamCursor) -> Expr:
        """Return whether a tile lies in every window of the warp's queries."""
        found = None
        for axis, (start, end) in enumerate(self._common):
            found = both(found, cursor[axis] >= start, cursor[axis] + self.plan.stream_tile[axis] <= end)
        return found

    def apply(self, cursor: StreamCursor, tile: Expr, whole: Expr | None = None) -> None:
        """Mask the scores of a tile; ``whole`` is what `whole` returned of it, if it was asked before."""
        whole = self.whole(cursor) if whole is None else whole
        if self.additional is None:
            self._window(cursor, whole)
            return
        with I.If(tile < self.work.tiles):
            with I.Then():
                self._window(cursor, whole)
            with I.Else():
                self.tail((tile - self.work.tiles) * self.plan.streamed)

    def _window(self, cursor: StreamCursor, whole: Expr) -> None:
        if self.key_mask is None:
            with when(T.Not(whole)):
                self._hide(cursor)
            return
        with I.If(both(whole, self.key_mask.has_all)):
            with I.Then():
                self.key_mask.see_all()
            with I.Else():
                self._hide(cursor)

    def _hide(self, cursor: StreamCursor) -> None:
        keys = self.key_mask
        taking: list[Expr] = [] if keys is None else keys.pairs(self.pair)
        for row, windows in enumerate(self._windows):
            word = None
            for axis, (start, extent) in enumerate(windows):
                bits = self._bits(axis, start - cursor[axis], extent)
                word = bits if word is None else T.bitwise_and(word, bits)
            parts = self._words(word)
            if keys is not None:
                pairs = zip(parts, taking, strict=True)
                parts = [register(T.bitwise_and(part, bits), "uint32") for part, bits in pairs]
                keys.see(row, parts)
            for half, part in enumerate(parts):
                for bit in range(min(32, self.plan.streamed // 4 - 32 * half)):
                    group, e = divmod(32 * half + bit, 2)
                    keep = T.bitwise_and(part, T.uint32(1 << bit)) != T.uint32(0)
                    self._keep(4 * group + 2 * row + e, keep)

    def _bits(self, axis: int, start: Expr, extent: Expr) -> Expr:
        """Return which of a row's scores are in its window along one axis, a bit for each that the thread has.

        The window begins at ``start``, seen from the tile. A thread has two scores of every eight, so along the last
        axis as many lie before a place as twice the eights before it, and up to two. Along any axis those of a window
        are one stretch of bits, repeated for every step of the axes before it.
        """
        tile = self.plan.stream_tile
        after, period = math.prod(tile[axis + 1 :]) // 4, math.prod(tile[axis:]) // 4
        # A shift by 32 needs 64 bits.
        dtype = "uint64" if period >= 32 else "uint32"
        place = columns_before if axis == self.plan.rank - 1 else lambda key: key * after
        word = stretch(start, start + extent, tile[axis], dtype, place)
        word = T.Cast(self._dtype, word) if dtype != self._dtype else word
        copies = self.plan.streamed // 4 // period
        return word * tirx.IntImm(self._dtype, sum(1 << (period * copy) for copy in range(copies)))

    @property
    def _dtype(self) -> str:
        return "uint64" if self.plan.streamed // 4 > 32 else "uint32"

    def _words(self, word: Expr) -> list[Expr]:
        """Return a word of bits in registers of 32."""
        if self._dtype == "uint32":
            return [register(word, "uint32")]
        whole = register(word, "uint64")
        parts = (whole, T.shift_right(whole, tirx.IntImm("uint64", 32)))
        return [register(T.Cast("uint32", part), "uint32") for part in parts]

    def tail(self, first: Expr) -> None:
        """Mask what lies beyond the last additional key."""
        remaining = let(self.additional - first)
        with when(remaining < self.plan.streamed):
            for group in range(self.plan.streamed // 8):
                for e in (0, 1):
                    keep = self.pair + (8 * group + e) < remaining
                    for row in range(_ROWS):
                        self._keep(4 * group + 2 * row + e, keep)

    def _keep(self, element: int, condition: Expr) -> None:
        put(self.scores, element, T.Select(condition, self.scores[element], T.float32(float("-inf"))))
