"""`RowStore`: a warpgroup's 64 rows on their way from accumulators to global memory, through shared memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.shared.trace import I, T, both, emit, flat, index64, let, local, when
from na_compiler.schedules.shared.work import Work
from na_compiler.schedules.sm90.plan import ROWS, Columns
from na_compiler.schedules.sm90.products import conversion
from na_compiler.schedules.sm90.rows import Rows

__all__ = ["RowStore", "sync_warpgroup"]

Expr = Any
_CHUNK = 8  # Elements of 16 bytes.
# Named barriers: from here on, one a warpgroup.
_WARPGROUP = 1


def sync_warpgroup(warpgroup: Expr) -> None:
    """Wait for the other warps of the warpgroup."""
    emit(T.ptx.bar.sync(T.Cast("uint32", warpgroup + _WARPGROUP), T.uint32(128)))


class RowStore:
    """Emits the way of a tile's results; their rows lie where a tile of inputs was that is not needed any more.

    Parameters
    ----------
    buffer
        Shared memory, as elements of 16 bits.
    first
        Where in it the warpgroup's rows are.
    columns
        How their columns lie: in boxes, swizzled as TMA has it.
    rows
        Which rows the thread has.
    """

    def __init__(self, buffer: Any, first: Expr, columns: Columns, rows: Rows) -> None:
        self.buffer, self.first, self.columns, self.rows = buffer, first, columns, rows
        self.dtype = str(buffer.dtype)

    def place(self, row: Expr, box: Expr, chunk: Expr) -> Expr:
        """Return where in shared memory a chunk of a row is."""
        width = self.columns.width
        chunks = width // _CHUNK
        # The swizzle exchanges 16-byte chunks by the number of the 128-byte line that they are in.
        line = T.bitwise_and(T.shift_right(row, int(math.log2(64 // width))), chunks - 1)
        first = self.first + box * (self.columns.box_bytes(ROWS) // 2)
        return first + row * width + T.bitwise_xor(chunk, line) * _CHUNK

    def gather(self, sums: Any, factors: Sequence[Expr]) -> None:
        """Scale the accumulators by a factor for each of the thread's two rows, round, and put them in their place.

        All warps must be done with what was there before.
        """
        rows, convert = self.rows, conversion(self.dtype)
        extent = self.columns.extent
        pairs = local(extent // 4, "uint32")
        for i in range(extent // 4):
            row = i % 2
            emit(convert(pairs[i], sums[2 * i + 1] * factors[row], sums[2 * i] * factors[row]))
        sync_warpgroup(rows.warpgroup)
        self.put(pairs)

    def put(self, pairs: Any) -> None:
        """Put packed accumulators in their place."""
        rows, extent = self.rows, self.columns.extent
        # A lane gives the address of one row of one of the four 8x8 matrices: rows 0-7 and 8-15, of two column groups.
        row = let(rows.warp * 16 + T.bitwise_and(rows.lane, 15))
        half = let(T.shift_right(rows.lane, 4))
        chunks = self.columns.width // _CHUNK
        groups = extent // _CHUNK
        for group in range(0, groups - 1, 2):
            place = self.place(row, group // chunks, group % chunks + half)
            emit(
                T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                    self.buffer.ptr_to([place]), *(pairs[2 * group + i] for i in range(4))
                )
            )
        if groups % 2:
            place = self.place(row, (groups - 1) // chunks, (groups - 1) % chunks)
            emit(
                T.ptx["stmatrix.sync.aligned.m8n8.x2.shared.b16"](
                    self.buffer.ptr_to([place]), *(pairs[2 * (groups - 1) + i] for i in range(2))
                )
            )

    def store(self, target: Any, work: Work) -> None:
        """Store the gathered rows of a warp, 16 bytes a lane, in a tensor of rows that lie at multiples of 16 bytes."""
        rows = self.rows
        emit(T.cuda.warp_sync())
        elements = flat(target)
        chunks = self.columns.extent // _CHUNK
        in_box = self.columns.width // _CHUNK
        count = 16 * chunks
        for first in range(0, count, 32):
            number = let(first + rows.lane)
            row, chunk = let(rows.warp * 16 + number // chunks), let(number % chunks)
            source = self.place(row, chunk // in_box, chunk % in_box)
            positions = rows.position(row, work.first)
            inside = number < count if first + 32 > count else None
            with when(both(inside, work.within(positions, rows.plan.own_tile))):
                value = self.buffer.vload([source], dtype=f"{self.dtype}x{_CHUNK}")
                address = work.address_in(target, positions) + index64(chunk * _CHUNK)
                # vstore only returns a statement; a traced body must add it.
                I.add_to_parent(elements.vstore([address], value))
