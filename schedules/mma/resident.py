"""The forward with all keys of a block in shared memory: each warp visits just the box of keys of its own windows.

The box is taken as one list of keys and cut into groups of 16, whatever its extents: for a window of 7x7 and 4x4
queries that is 100 keys in 7 groups. All loops are unrolled, so that which keys a group has is known but for where
the warp's box begins.
"""

from __future__ import annotations

import math
from typing import Any

from na_compiler.schedules.mma.block import Block
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.plan import CHUNK_BYTES, GROUP
from na_compiler.schedules.mma.products import Products, RowTile
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.mma.tf32 import RoundedProducts
from na_compiler.schedules.shared.bits import stretch
from na_compiler.schedules.shared.key_mask import KeyMask
from na_compiler.schedules.shared.trace import T, let, put, register
from na_compiler.schedules.shared.work import Work

__all__ = ["Resident", "WarpMask"]

Expr = Any
_ROWS = 2
_WORD = 32


class Resident:
    """Emits where the keys of a warp's box are in shared memory.

    Chunks are swizzled by a key's number in the *warp's* box: eight keys that follow each other there lie in different
    banks, although rows of the block's box are longer.
    """

    def __init__(self, block: Block, products: Products, rows: Rows, work: Work) -> None:
        self.block, self.plan, self.products = block, block.plan, products
        plan = self.plan
        first, last = rows.warp_queries(work.first)
        self.low, self.high = [], []
        for axis in range(plan.rank):
            self.low.append(register(work.bounds(axis, work.clamp(axis, first[axis]))[0]))
            self.high.append(register(work.bounds(axis, work.clamp(axis, last[axis]))[1]))
        offsets = [low - start for low, start in zip(self.low, work.low, strict=True)]
        self._first = register(sum((offset * pitch for offset, pitch in zip(offsets, self._pitches, strict=True)), 0))
        number = sum((offset * step for offset, step in zip(offsets, self.order, strict=True)), 0)
        # Groups are 16 keys apart, and the swizzle repeats after eight: it is the same for every group.
        self._number = number
        place = let(products.value_row + number)
        self._key_column = let(T.bitwise_xor(products.late_column, swizzled(place, plan.key)))
        self._value_column = let(T.bitwise_xor(products.late_column, swizzled(place, plan.value)))
        self._keys, self._values = products.shared_address(block.keys), products.shared_address(block.values)

    @property
    def order(self) -> list[int]:
        """By how much a step along each axis changes a key's number in the warp's box."""
        return _pitches(self.plan.warp_union)

    @property
    def _pitches(self) -> list[int]:
        return _pitches(self.plan.union)

    def rows_of(self, groups: range) -> list[Expr]:
        """Return for each group the row of shared memory of this lane's key."""
        return [self._row(group) for group in groups]

    def _row(self, group: int) -> Expr:
        return self._row_of(self.products.value_row + GROUP * group)

    def _row_of(self, number: Expr) -> Expr:
        """Return the row of shared memory of a key of the warp's box, by its number there."""
        row: Expr = self._first
        for axis in reversed(range(self.plan.rank)):
            extent = self.plan.warp_union[axis]
            place, number = (number, 0) if axis == 0 else (number % extent, number // extent)
            row = row + place * self._pitches[axis]
        # Keys beyond the box are masked. They only have to be some that were loaded.
        return register(T.min(row, math.prod(self.plan.union) - 1))

    def keys_at(self, rows: list[Expr]) -> list[Expr]:
        """Return the addresses of the first chunks of keys."""
        return [self._address(self._keys, row, self.plan.key.row_bytes, self._key_column) for row in rows]

    def values_at(self, rows: list[Expr]) -> list[Expr]:
        """Return the addresses of the first chunks of values."""
        return [self._address(self._values, row, self.plan.value.row_bytes, self._value_column) for row in rows]

    def pair_at(self, products: RoundedProducts, first: int) -> list[Expr]:
        """Return the addresses of values of float32: of a lane's two keys of eight, from one on, its first columns."""
        found = []
        for e in range(2):
            number = products.pair + e
            column = T.bitwise_xor(products.column, swizzled(number + self._number, self.plan.value))
            row = self._row_of(number + first)
            found.append(self._address(self._values, row, self.plan.value.row_bytes, column))
        return found

    @staticmethod
    def _address(start: Expr, row: Expr, row_bytes: int, column: Expr) -> Expr:
        return register(start + T.Cast("uint32", row * row_bytes + column * CHUNK_BYTES), "uint32")


class WarpMask:
    """Emits the mask of a warp's own box of keys: which scores of a group are those of a window.

    A word has a bit for each of 32 keys of the box. A row of the box is one stretch of bits, or nothing where the
    window does not reach along the other axes.
    """

    def __init__(
        self, tile: RowTile, rows: Rows, work: Work, resident: Resident, key_mask: KeyMask | None = None
    ) -> None:
        self.key_mask = key_mask
        self.plan, self.scores = tile.plan, tile.scores
        self._pair = let(T.bitwise_and(rows.lane, 3) * 2)
        self._windows: list[list[tuple[Expr, Expr]]] = []
        for row in rows.rows:
            query = rows.position(row, work.first)
            windows = []
            for axis in range(self.plan.rank):
                start, end = work.bounds(axis, work.clamp(axis, query[axis]))
                extent = register(end - start) if work.extent(axis) is None else work.extent(axis)
                windows.append((register(start - resident.low[axis]), extent))
            self._windows.append(windows)
        self._stretches = [self._stretch(*windows[-1]) for windows in self._windows]

    @property
    def is_line(self) -> bool:
        """Whether rows of the box are too long for a word: keys are compared one by one then, along one axis."""
        return self.plan.rank == 1

    def _stretch(self, start: Expr, extent: Expr) -> Expr:
        """Return the bits of a row of the box that lie in the window along the last axis."""
        if self.is_line:
            return None
        if isinstance(extent, int):
            ones = T.uint32((1 << extent) - 1)
        else:
            ones = T.shift_right(T.uint32(0xFFFFFFFF), T.Cast("uint32", _WORD - extent))
        return register(T.shift_left(ones, T.Cast("uint32", start)), "uint32")

    def apply(self, groups: range) -> None:
        """Mask the scores of some groups of 16 keys."""
        for row in range(_ROWS):
            if self.plan.is_dense and self.key_mask is None:
                self._cut(row, groups)
            elif self.is_line and self.key_mask is None:
                self._compare(row, groups)
            else:
                self._mask(row, groups)

    def _cut(self, row: int, groups: range) -> None:
        """Mask what the last group has beyond the keys."""
        count = math.prod(self.plan.warp_union)
        for number in range(GROUP * groups.start, GROUP * groups.stop, 8):
            if number + 8 > count:
                for e in (0, 1):
                    self._keep(number - GROUP * groups.start, row, e, self._pair + (number + e) < count)

    def _compare(self, row: int, groups: range) -> None:
        start, extent = self._windows[row][0]
        place = register(self._pair - start)
        for number in range(0, GROUP * len(groups), 8):
            for e in (0, 1):
                at = T.Cast("uint32", place + (GROUP * groups.start + number + e))
                self._keep(number, row, e, at < T.Cast("uint32", extent))

    def _mask(self, row: int, groups: range) -> None:
        first, end = GROUP * groups.start, GROUP * groups.stop
        rows: dict[int, Expr] = {}
        for start in range(first, end, _WORD):
            word = self._word(row, start, end, rows)
            if self.key_mask is not None:
                word = register(T.bitwise_and(word, self.key_mask.words[(start - first) // _WORD]), "uint32")
                self.key_mask.see(row, [word])
            word = register(T.shift_right(word, T.Cast("uint32", self._pair)), "uint32")
            for number in range(start, min(start + _WORD, end), 8):
                for e in (0, 1):
                    bit = T.uint32(1 << (number - start + e))
                    self._keep(number - first, row, e, T.bitwise_and(word, bit) != T.uint32(0))

    def _word(self, row: int, start: int, end: int, rows: dict[int, Expr]) -> Expr:
        """Return a bit for each of 32 keys of the box from ``start`` on."""
        if self.is_line:
            return self._line_from(row, start)
        width, count = self.plan.warp_union[-1], math.prod(self.plan.warp_union)
        word: Expr = T.uint32(0)
        for line in range(start // width, -(-min(start + _WORD, end, count) // width)):
            if line not in rows:
                rows[line] = self._line(row, line)
            bits, shift = rows[line], line * width - start
            if shift > 0:
                bits = T.shift_left(bits, T.uint32(shift))
            elif shift < 0:
                bits = T.shift_right(bits, T.uint32(-shift))
            word = T.bitwise_or(word, bits)
        return word

    def _line_from(self, row: int, start: int) -> Expr:
        """Return the part of the one row of the box from ``start`` on."""
        low, extent = self._windows[row][0]
        # A shift by 32 needs 64 bits.
        return T.Cast("uint32", stretch(low - start, low + extent - start, _WORD, "uint64"))

    def _line(self, row: int, line: int) -> Expr:
        """Return the stretch of one row of the box, or no bits where the window does not reach."""
        bits = self._stretches[row]
        for axis in reversed(range(self.plan.rank - 1)):
            extent = self.plan.warp_union[axis]
            place, line = (line, 0) if axis == 0 else (line % extent, line // extent)
            start, size = self._windows[row][axis]
            if isinstance(start, int) and isinstance(size, int):
                bits = bits if start <= place < start + size else T.uint32(0)
            else:
                inside = T.Cast("uint32", place - start) < T.Cast("uint32", size)
                bits = T.Select(inside, bits, T.uint32(0))
        return register(bits, "uint32")

    def _keep(self, number: int, row: int, e: int, condition: Expr) -> None:
        element = number // 2 + 2 * row + e
        put(self.scores, element, T.Select(condition, self.scores[element], T.float32(float("-inf"))))


def _pitches(box: tuple[int, ...]) -> list[int]:
    return [math.prod(box[axis + 1 :]) for axis in range(len(box))]
