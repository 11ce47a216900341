"""Copies of boxes of tokens from global into shared memory, asynchronous (cp.async), 16 bytes each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.mma.block import Source
from na_compiler.schedules.mma.plan import CHUNK_BYTES, Tile
from na_compiler.schedules.shared.trace import T, both, emit, let, register, when

__all__ = ["Copy", "coordinates", "swizzled"]

Expr = Any
_INSTRUCTION = "cp.async.cg.shared.global"


def swizzled(row: Expr, tile: Tile) -> Expr:
    """Return what the number of a chunk of a row is exchanged by."""
    if isinstance(row, int):
        return row >> tile.shift & tile.mask
    shifted = T.shift_right(row, tile.shift) if tile.shift else row
    return T.bitwise_and(shifted, tile.mask)


def coordinates(row: Expr, rows: int, first: int, box: Sequence[int]) -> list[tuple[Expr, int]] | None:
    """Return the place in a box of row ``first + row``, ``row < rows``, as what depends on ``row`` and a constant.

    ``None`` where they cannot be told apart: ``rows`` divides ``first``, and each extent of the box must divide what is
    left of it, or be a multiple.
    """
    found: list[tuple[Expr, int]] = []
    for axis in reversed(range(len(box))):
        extent = box[axis]
        if axis == 0:
            found.insert(0, (row, first))
        elif extent % rows == 0:
            found.insert(0, (row, first % extent))
            row, rows, first = 0, 1, first // extent
        elif rows % extent == 0:
            found.insert(0, (0 if extent == 1 else row % extent, 0))
            row, rows, first = row // extent, rows // extent, first // extent
        else:
            return None
    return found


def _rows_at_once(most: int, box: Sequence[int]) -> int:
    """Return how many rows to copy at once: as many as tell coordinates apart, if that is at least half of the most.

    Coordinates that do not nest are divisions for each copy, which cost more than some threads that wait.
    """
    nested = [rows for rows in range(most, most // 2, -1) if coordinates(0, rows, 0, box) is not None]
    return nested[0] if nested else most


class Copy:
    """Emits the copy of a box of tokens into rows of shared memory, which some threads share.

    Rows beyond a limit, and columns beyond head_dim, become zeros: what a weight of 0 multiplies has to be finite.

    Parameters
    ----------
    tile
        Where they go.
    box
        Tokens along each axis.
    threads, thread
        How many threads, and which one this is.
    """

    def __init__(self, tile: Tile, box: Sequence[int], threads: int, thread: Expr) -> None:
        self.tile, self.box = tile, box
        # Threads that share a row, each with its chunk; a power of two.
        self._across = min(tile.chunks & -tile.chunks, threads)
        self._rows = _rows_at_once(threads // self._across, box)
        # A number where all threads share a row, so that its swizzle is one.
        self._row = 0 if threads == self._across else let(thread // self._across) if self._across > 1 else thread
        self._column: Expr = let(thread % self._across) if self._across > 1 else 0
        self._is_idle = self._rows * self._across < threads

    def emit(
        self,
        source: Source,
        buffer: Any,
        place: Expr,
        origin: Sequence[Expr],
        limits: Sequence[Expr],
        order: Sequence[int] | None = None,
    ) -> None:
        """Copy the box whose first token is at ``origin``.

        Parameters
        ----------
        source
            Where tokens come from.
        buffer, place
            Shared memory, and the element where the first row goes.
        limits
            Per axis, the first position that is not copied.
        order
            Per axis, by how much a step changes the number of a row that swizzles it; default its number in the box.
        """
        with when(self._row < self._rows if self._is_idle else None):
            self._emit(source, buffer, place, origin, limits, order)

    def _emit(
        self,
        source: Source,
        buffer: Any,
        place: Expr,
        origin: Sequence[Expr],
        limits: Sequence[Expr],
        order: Sequence[int] | None,
    ) -> None:
        total = math.prod(self.box)
        nested = coordinates(self._row, self._rows, 0, self.box)
        # Where windows wrap the place of each row is found by itself.
        is_plain = nested is not None and source.around is None
        moving = register(self._sum(source, origin, [row for row, _ in nested or []])) if is_plain else None
        for first in range(0, total, self._rows):
            with when(self._row < total - first if first + self._rows > total else None):
                if moving is None:
                    where = coordinates(self._row, self._rows, first, self.box)
                    where = where or [(at, 0) for at in self._general(self._row + first)]
                    offset = self._sum(source, origin, [at + constant for at, constant in where])
                else:
                    where = coordinates(self._row, self._rows, first, self.box) or []
                    offset = moving
                    for (_, constant), step in zip(where, source.steps, strict=True):
                        offset = offset + constant * step
                inside = both(*(o + at < limit - c for o, (at, c), limit in zip(origin, where, limits, strict=True)))
                self._row_chunks(source, buffer, place, first, offset, inside, self._swizzle(first, where, order))

    @staticmethod
    def _sum(source: Source, origin: Sequence[Expr], at: Sequence[Expr]) -> Expr:
        offset: Expr = 0
        for axis, (start, place, step) in enumerate(zip(origin, at, source.steps, strict=True)):
            position = start + place
            offset = offset + (position if source.around is None else source.around(axis, position)) * step
        return offset

    def _general(self, number: Expr) -> list[Expr]:
        found: list[Expr] = []
        for extent in reversed(self.box[1:]):
            found.insert(0, number % extent)
            number = number // extent
        return [number, *found]

    def _swizzle(self, first: int, where: Sequence[tuple[Expr, int]], order: Sequence[int] | None) -> Expr:
        if order is not None:
            number: Expr = 0
            for (moving, constant), step in zip(where, order, strict=True):
                number = number + (moving + constant) * step
            return swizzled(number, self.tile)
        # It repeats after eight rows.
        return swizzled(self._row if self._rows % 8 == 0 else self._row + first, self.tile)

    def _row_chunks(
        self, source: Source, buffer: Any, place: Expr, first: int, offset: Expr, inside: Expr | None, swizzle: Expr
    ) -> None:
        tile = self.tile
        start = source.at(offset + self._column)
        column = T.bitwise_xor(self._column, swizzle) if tile.mask else self._column
        target = place + (self._row + first) * tile.width
        chunks = tile.extent // tile.per_chunk
        for chunk in range(0, tile.chunks, self._across):
            there = inside
            if chunk + self._across > chunks:
                there = both(inside, self._column < chunks - chunk)
            size = T.uint32(16) if there is None else T.Select(there, T.uint32(16), T.uint32(0))
            emit(
                T.ptx[_INSTRUCTION](
                    buffer.ptr_to([target + (column + chunk) * tile.per_chunk]),
                    T.ptx.addr(source.buffer.ptr_to([start]), CHUNK_BYTES * chunk),
                    16,
                    size,
                )
            )
