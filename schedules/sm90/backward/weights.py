"""Weights and the gradients of scores, from scores, in registers.

``P = exp(scale S - lse)`` inside a row's window and 0 outside of it; ``dS = P (dP - delta)``, likewise. What is outside
is set to 0, whatever comes out there: weights and gradients of tokens that do not see each other may overflow.
"""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.bits import stretch
from na_compiler.schedules.shared.mask import Mask, columns_before
from na_compiler.schedules.shared.statistics import LOG2_E
from na_compiler.schedules.shared.trace import I, T, both, emit, flat, let, local, put, when
from na_compiler.schedules.shared.work import StreamCursor, Work
from na_compiler.schedules.sm90.backward.products import SweepProducts
from na_compiler.schedules.sm90.backward.work import QueryWork
from na_compiler.schedules.sm90.rows import Rows

__all__ = ["Weights", "Window"]

Expr = Any
_ROWS = 2


class Window(Mask):
    """Emits which elements of a tile count; `find` remembers it, `clear` sets the others to 0.

    Parameters are those of `na_compiler.schedules.sm90.mask.Mask`.
    """

    def __init__(self, products: SweepProducts, rows: Rows, work: Work, additional: Expr | None) -> None:
        super().__init__(products, rows, work, additional)
        words = -(-self.plan.streamed // 4 // 32)
        # A bit for each of the thread's elements, row by row.
        self._found = [local(words, "uint32") for _ in range(_ROWS)]
        self._partial: Expr = None

    def find(self, cursor: StreamCursor, tile: Expr) -> None:
        """Find out what counts of a tile, and whether all of it does."""
        whole = None
        for axis, (start, end) in enumerate(self._common):
            whole = both(whole, cursor[axis] >= start, cursor[axis] + self.plan.stream_tile[axis] <= end)
        if self.additional is not None:
            first = (tile - self.work.tiles) * self.plan.streamed
            is_tail = tile >= self.work.tiles
            whole = T.Or(T.And(is_tail, first + self.plan.streamed <= self.additional), T.And(T.Not(is_tail), whole))
        self._partial = T.Not(whole)
        with when(self._partial):
            if self.additional is None:
                self._find_window(cursor)
                return
            with I.If(tile < self.work.tiles):
                with I.Then():
                    self._find_window(cursor)
                with I.Else():
                    self._find_tail(let(self.additional - (tile - self.work.tiles) * self.plan.streamed))

    def _find_window(self, cursor: StreamCursor) -> None:
        for row, windows in enumerate(self._windows):
            word = None
            for axis, (start, extent) in enumerate(windows):
                bits = self._bits(axis, start - cursor[axis], extent)
                word = bits if word is None else T.bitwise_and(word, bits)
            self._remember(row, word)

    def _find_tail(self, remaining: Expr) -> None:
        """Of additional keys, all count that there are."""
        # As if the tile had one axis.
        word = stretch(0, remaining - self.pair, self.plan.streamed, "uint64", columns_before)
        word = T.Cast(self._dtype, word) if self._dtype != "uint64" else word
        for row in range(_ROWS):
            self._remember(row, word)

    def _remember(self, row: int, word: Expr) -> None:
        for half, part in enumerate(self._words(word)):
            put(self._found[row], half, part)

    def clear(self, elements: Any) -> None:
        """Set to 0 what does not count, of the tile that was looked at last."""
        with when(self._partial):
            for row in range(_ROWS):
                for place in range(self.plan.streamed // 4):
                    group, e = divmod(place, 2)
                    index = 4 * group + 2 * row + e
                    bit = T.bitwise_and(self._found[row][place // 32], T.uint32(1 << place % 32))
                    put(elements, index, T.Select(bit != T.uint32(0), elements[index], T.float32(0)))


class Weights:
    """Emits weights and gradients of scores.

    A query's statistics belong to the rows where the block owns queries; each thread has its two rows' in registers.
    Elsewhere they belong to the columns, and come with each tile.
    """

    def __init__(self, products: SweepProducts, rows: Rows) -> None:
        self.products, self.plan, self.block, self.rows = products, products.plan, products.block, rows
        self._unit = local(1)
        put(self._unit, 0, self.block.arguments.scale * T.float32(LOG2_E))
        self._pair = let(T.bitwise_and(rows.lane, 3) * 2)
        self._of_rows: list[list[Expr]] = []

    def load(self, work: Any, window: Window | None) -> None:
        """Load the statistics of the thread's rows, if they are queries."""
        if not self.plan.of_queries:
            return
        assert isinstance(work, QueryWork)
        assert window is not None
        statistics = flat(self.block.arguments["statistics"])
        self._of_rows = []
        for queries in window.queries:
            found = local(2)
            for plane in range(2):
                address = work.statistics(plane, [work.clamp(axis, query) for axis, query in enumerate(queries)])
                put(found, plane, statistics[address])
            self._of_rows.append([found[0], found[1]])

    def _statistics(self, plane: int, stage: Expr, group: int) -> list[list[Expr]]:
        """Return what belongs to a thread's elements of eight columns: by row, then by column."""
        if self.plan.of_queries:
            return [[row[plane]] * 2 for row in self._of_rows]
        found = local(2)
        place = self.block.plane(stage, plane) + self._pair + 8 * group
        emit(T.ptx["ld.shared.v2.f32"](found[0], found[1], self.block.statistics.ptr_to([place])))
        return [[found[0], found[1]]] * _ROWS

    def exponentiate(self, stage: Expr) -> None:
        """Turn a tile's scores into weights."""
        scores = self.products.scores
        for group in range(self.plan.streamed // 8):
            statistics = self._statistics(0, stage, group)
            for row in range(_ROWS):
                for e in range(2):
                    index = 4 * group + 2 * row + e
                    put(scores, index, scores[index] * self._unit[0] - statistics[row][e])
                    # No weight is above 1, however coarse lse is; this minimum keeps NaN.
                    emit(T.ptx["min.NaN.f32"](scores[index], scores[index], T.float32(0)))
                    emit(T.ptx.ex2.approx.ftz.f32(scores[index], scores[index]))

    def differentiate(self, stage: Expr) -> None:
        """Turn the gradients of a tile's weights into those of its scores."""
        scores, slopes = self.products.scores, self.products.slopes
        for group in range(self.plan.streamed // 8):
            statistics = self._statistics(1, stage, group)
            for row in range(_ROWS):
                for e in range(2):
                    index = 4 * group + 2 * row + e
                    put(slopes, index, scores[index] * (slopes[index] - statistics[row][e]))
