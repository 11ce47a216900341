"""`Lists`: a warp's tables of a tile that streams by: which rows its tokens see together, and what of them each sees.

Of the tile a warp visits just the box that its 16 tokens come to, as one list cut into groups of 16, however long its
lines are. Extents of the box differ from warp to warp: keys near a border are seen by up to half more queries than
others. So nothing about them is known when code is generated. It is all put into tables once for each tile, in shared
memory of the warp's own, and the loop over the list is the same for every box.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from na_compiler.schedules.mma.backward.block import SweepBlock
from na_compiler.schedules.mma.bias import steps_of
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.plan import CHUNK, ROWS
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.bits import stretch
from na_compiler.schedules.shared.key_mask import MaskBytes
from na_compiler.schedules.shared.trace import I, T, both, let, local, put, register, when
from na_compiler.schedules.shared.work import Work

__all__ = ["Lists", "WindowLists", "counting"]

Expr = Any
# Of the inverses of extents. With it quotients are exact up to `MOST_LISTED` and `MOST_INNER` of the plan.
_SHIFT = 20
# Lanes of a warp, all of which vote.
_VOTES, _ALL = 32, 0xFFFFFFFF


@contextlib.contextmanager
def counting(first: Expr, end: Expr, step: int) -> Iterator[Expr]:
    """Trace a loop that counts from ``first`` while it is below ``end``."""
    number = local(1, "int32")
    put(number, 0, first)
    with I.While(number[0] < end):
        yield number[0]
        put(number, 0, number[0] + step)


class _Divisor:
    """Divides small numbers by one that is not known before."""

    def __init__(self, divisor: Expr) -> None:
        self._divisor = divisor
        whole = T.uint32(1 << _SHIFT) // T.Cast("uint32", T.max(divisor, 1)) + T.uint32(1)
        self._inverse = register(whole, "uint32")

    def divide(self, number: Expr) -> tuple[Expr, Expr]:
        """Return quotient and remainder."""
        product = T.shift_right(T.Cast("uint32", number) * self._inverse, T.uint32(_SHIFT))
        quotient = register(T.Cast("int32", product))
        return quotient, number - quotient * self._divisor


class Lists:
    """Emits the tables of tiles whose tokens are all seen by all rows.

    Attributes
    ----------
    count
        Tokens of the list; 0 where the warp has nothing to do with the tile.
    """

    def __init__(self, block: SweepBlock) -> None:
        self.block, self.plan = block, block.plan
        # Two lanes make the mask of each row.
        self._row = register(T.bitwise_and(block.lane, ROWS - 1))
        self._part = register(T.shift_right(block.lane, 4))
        self.count: Expr = None

    def build_box(self, origin: Sequence[Expr], end: Sequence[Expr], stage: Expr) -> None:
        """Emit the tables of a tile of the plan's, of what of it lies before the ends."""
        tile = self.plan.stream_tile
        ends = [T.min(at + extent, last) for at, extent, last in zip(origin, tile, end, strict=True)]
        self._find_box(origin, ends)
        self._fill_addresses([0] * self.plan.rank, stage)
        self._fill_mask_of_all()

    def build_line(self, count: Expr, stage: Expr) -> None:
        """Emit the tables of so many rows that follow each other."""
        self.count, self._divisors = register(count), list[_Divisor]()
        self._write_addresses(stage, lambda number: (number, number))
        self._fill_mask_of_all()

    def _find_box(self, low: Sequence[Expr], high: Sequence[Expr], exists: Expr | None = None) -> list[Expr]:
        """Count the tokens of a box, and return its extents."""
        extents = [register(T.max(end - start, 0)) for start, end in zip(low, high, strict=True)]
        count = math.prod(extents[1:], start=extents[0])
        self.count = register(count if exists is None else T.Select(exists, count, 0))
        self._divisors = [_Divisor(extent) for extent in extents[1:]]
        return extents

    def _coordinates(self, number: Expr, divisors: Sequence[_Divisor]) -> list[Expr]:
        found: list[Expr] = []
        for divisor in reversed(divisors):
            number, rest = divisor.divide(number)
            found.insert(0, rest)
        return [number, *found]

    def _fill_addresses(
        self, offsets: Sequence[Expr], stage: Expr, low: Sequence[Expr] = (), bias: Sequence[int] | None = None
    ) -> None:
        """Write where the rows of the box are that begins at an offset from the tile's first token.

        And, where it is known by how much a step along each axis changes the place of a bias, where these are, for the
        box that begins at ``low``.
        """
        plan = self.plan
        pitches = [math.prod(plan.stream_tile[axis + 1 :]) for axis in range(plan.rank)]
        first_row, first_order = register(_dot(offsets, pitches)), register(_dot(offsets, plan.order))
        first_bias = None if bias is None else register(_dot(low, bias))

        def place(number: Expr) -> tuple[Expr, ...]:
            at = self._coordinates(number, self._divisors)
            row = first_row + _dot(at, pitches)
            order = first_order + _dot(at, plan.order)
            return (row, order) if bias is None else (row, order, first_bias + _dot(at, bias))

        self._write_addresses(stage, place)

    def _write_addresses(self, stage: Expr, place: Callable[[Expr], tuple[Expr, ...]]) -> None:
        """Write where the rows of the list are, for their statistics, which they are, and the places of their biases.

        ``place`` tells of a number of the list which row of the tile it is, by which number that is swizzled, and what
        it adds to the place of a bias, if scores have any.
        """
        plan, block = self.plan, self.block
        starts = [register(block.base + T.Cast("uint32", block.stream(i, stage)), "uint32") for i in range(plan.lists)]
        with counting(block.lane, self.padded, 32) as number:
            # Beyond the end, where the mask has nothing, again the last one: a row that was loaded.
            row, order, *bias = (register(at) for at in place(register(T.min(number, self.count - 1))))
            for which, start in enumerate(starts):
                tile = plan.stream(which)
                address = row * (2 * tile.width) + swizzled(order, tile) * (2 * CHUNK)
                at = block.table // 4 + which * (plan.addresses_bytes // 4) + number
                put(block.words, at, start + T.Cast("uint32", address))
            if not plan.of_queries:
                put(block.floats, block.list_statistics // 4 + 2 * number, T.reinterpret("float32", row))
            for along in bias:
                put(block.words, block.places // 4 + number, T.Cast("uint32", along))

    @property
    def padded(self) -> Expr:
        """Tokens of the list in whole steps."""
        step = self.plan.streamed
        return (self.count + (step - 1)) // step * step

    @contextlib.contextmanager
    def _words(self) -> Iterator[tuple[Expr, Any]]:
        """Trace a loop over the words of the mask that this lane makes: the word's first token, and its bits."""
        block, word = self.block, self.plan.word
        with counting(self._part * word, self.padded, 2 * word) as first:
            bits = local(1, "uint32")
            put(bits, 0, T.uint32(0))
            yield first, bits
            put(block.words, block.mask // 4 + first * ROWS // word + self._row, bits[0])

    def _fill_mask_of_all(self) -> None:
        """Write that each row sees all tokens of the list."""
        with self._words() as (first, bits):
            # The last step may have words beyond the list.
            put(bits, 0, self._bits(0, self.count - first))

    def _bits(self, first: Expr, end: Expr) -> Expr:
        """Return the bits of a word from one place to before another."""
        # Signed: what is the same in all threads TVM computes on the host, and kernels take no uint64 from there.
        return T.Cast("uint32", stretch(first, end, self.plan.word, "int64", keeps=False))

    def gather_statistics(self, stage: Expr) -> None:
        """Emit the copy of the statistics of the list's queries, from those of the tile, in the list's order."""
        block = self.block
        source = register(block.statistics(stage) // 4)
        with counting(block.lane, self.padded, 32) as number:
            place = let(block.list_statistics // 4 + 2 * number)
            row = register(T.reinterpret("int32", block.floats[place]))
            pair = [register(block.floats[source + 2 * row + i], "float32") for i in range(2)]
            for i in range(2):
                put(block.floats, place + i, pair[i])

    def skip(self) -> Any:
        """Trace what follows only if there is something to do."""
        return when(self.count > 0)

    def takes_part(self, number: Expr) -> Expr | None:  # noqa: ARG002
        """Return whether a key of the step from a number on does; ``None``: one always does."""
        return None


class WindowLists(Lists):
    """Emits the tables of tiles of which each row sees a window."""

    def __init__(self, block: SweepBlock, rows: Rows, work: Work) -> None:
        super().__init__(block)
        first, last = rows.warp_queries(work.first)
        rank = self.plan.rank
        self._low = [register(work.bounds(axis, work.clamp(axis, first[axis]))[0]) for axis in range(rank)]
        self._high = [register(work.bounds(axis, work.clamp(axis, last[axis]))[1]) for axis in range(rank)]
        # Warps beyond the last token have nothing to do.
        self._exists = work.within(first, self.plan.own_tile)
        mine = rows.position(self._row, work.first)
        clamped = [work.clamp(axis, mine[axis]) for axis in range(rank)]
        bounds = [work.bounds(axis, token) for axis, token in enumerate(clamped)]
        self._window = [(register(start), register(end)) for start, end in bounds]
        self._keys: MaskBytes | None = None
        # Rows that see nothing. Those beyond the last token have sums of their own, but share those of biases.
        sees = work.within(mine, self.plan.own_tile) if self.plan.sums_bias else None
        if self.plan.has_key_mask:
            self._keys = MaskBytes(work, block.arguments["key_mask"])
            if not self.plan.of_queries:
                own = register(self._keys.at(clamped))
                sees = own != 0
                self._exists = both(self._exists, T.cuda.ballot_sync(T.uint32(_ALL), own) != T.uint32(0))
        if sees is not None:
            start, end = self._window[-1]
            self._window[-1] = start, register(T.Select(sees, end, start))
        self._bias: list[int] | None = None
        if self.plan.has_bias:
            sign = 1 if self.plan.of_queries else -1
            self._bias = [sign * step for step in steps_of(self.plan.problem)]

    def build(self, origin: Sequence[Expr], stage: Expr) -> None:
        """Emit the tables of a tile that begins at ``origin``: of the box of it that the warp's rows come to."""
        tile = self.plan.stream_tile
        low = [register(T.max(at, start)) for at, start in zip(self._low, origin, strict=True)]
        high = [T.min(at, start + extent) for at, start, extent in zip(self._high, origin, tile, strict=True)]
        extents = self._find_box(low, high, self._exists)
        offsets = [register(start - at) for start, at in zip(low, origin, strict=True)]
        self._fill_addresses(offsets, stage, low, self._bias)
        if self.plan.hidden_bytes:
            self._fill_hidden(low)
        self._fill_mask(low, extents)

    def _fill_hidden(self, low: list[Expr]) -> None:
        """Write for each word of the list which of its keys take part: each lane reads one, and all vote."""
        assert self._keys is not None
        block, word = self.block, self.plan.word
        with counting(0, self.padded, _VOTES) as first:
            number = register(T.min(first + block.lane, self.count - 1))
            at = [start + place for start, place in zip(low, self._coordinates(number, self._divisors), strict=True)]
            votes = T.cuda.ballot_sync(T.uint32(_ALL), register(self._keys.at(at)))
            bits = register(votes, "uint32")
            with when(block.lane < _VOTES // word):
                # One word, or two halves of it.
                own = bits if word == _VOTES else T.shift_right(bits, T.Cast("uint32", block.lane * word))
                put(block.words, block.hidden // 4 + first // word + block.lane, own)
        block.sync_warp()

    def takes_part(self, number: Expr) -> Expr | None:
        """Return whether a key of the step from a number on does; ``None``: one always does."""
        if not self.plan.hidden_bytes:
            return None
        words, word = self.plan.streamed // self.plan.word, self.plan.word
        first = let(self.block.hidden // 4 + number // word)
        found = self.block.words[first]
        for place in range(1, words):
            found = T.bitwise_or(found, self.block.words[first + place])
        return T.bitwise_and(found, T.uint32(_ALL >> (_VOTES - word))) != T.uint32(0)

    def _fill_mask(self, low: list[Expr], extents: list[Expr]) -> None:
        """Write for each row and each word of the list which tokens of it the row sees.

        Lines of the box are stretches of the list. Those of a word are looked at one after another.
        """
        word = self.plan.word
        *outer, last = [
            (register(start - at), register(end - at)) for (start, end), at in zip(self._window, low, strict=True)
        ]
        extent = extents[-1]
        with self._words() as (first, bits):
            line, place = local(1, "int32"), local(1, "int32")
            # Where the line begins, seen from the word.
            put(line, 0, 0)
            put(place, 0, 0 - first)
            if outer:
                quotient, rest = self._divisors[-1].divide(first)
                put(line, 0, quotient)
                put(place, 0, 0 - rest)
            with I.While(T.bitwise_and(place[0] < word, first + place[0] < self.count)):
                at = self._coordinates(line[0], self._divisors[:-1]) if outer else []
                line_bits = self._line(place[0], last, extent)
                for (start, end), where in zip(outer, at, strict=True):
                    inside = T.Cast("uint32", where - start) < T.Cast("uint32", end - start)
                    line_bits = T.Select(inside, line_bits, T.uint32(0))
                put(bits, 0, T.bitwise_or(bits[0], line_bits))
                put(line, 0, line[0] + 1)
                put(place, 0, place[0] + extent)
            if self.plan.hidden_bytes:
                keys = self.block.words[self.block.hidden // 4 + first // word]
                put(bits, 0, T.bitwise_and(bits[0], keys))

    def _line(self, place: Expr, window: Sequence[Expr], extent: Expr) -> Expr:
        """Return the bits of a word that a line has in the window along the last axis."""
        ends = [T.max(T.min(at, extent), 0) + place for at in window]
        return self._bits(*ends)


def _dot(places: Sequence[Expr], steps: Sequence[int]) -> Expr:
    """Return what places along axes come to, with so much for a step along each."""
    return sum(place * step for place, step in zip(places, steps, strict=True))
