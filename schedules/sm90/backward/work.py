"""Where a thread block of the backward is, and what streams by: the windows of queries, the queries that see keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.problem import Problem
from na_compiler.schedules.shared import keys
from na_compiler.schedules.shared.trace import T, both, index64, let, local, maximum, put, when
from na_compiler.schedules.shared.work import StreamCursor, Work
from na_compiler.schedules.sm90.backward.plan import ALIGNED, BackwardPlan, SweepPlan, statistics_shape

__all__ = [
    "KeyCursor",
    "KeyWork",
    "QueryCursor",
    "QueryRow",
    "QueryWork",
    "StripCursor",
    "StripWork",
    "statistics_address",
]

Expr = Any


class QueryWork(Work):
    """A tile of queries of one head, and the keys that its windows need."""

    def cursor(self) -> KeyCursor:
        """Return the first tile that streams by."""
        return KeyCursor(self)

    @property
    def total(self) -> Expr:
        """Tiles that stream by, additional keys' not counted."""
        return self.tiles

    def statistics(self, plane: int, positions: Sequence[Expr]) -> Expr:
        """Return where a query's statistics are."""
        problem = self.plan.problem
        group = _number(self.group, problem.dilation)
        return statistics_address(problem, self.batch, plane, self.head, group, positions)


class QueryRow:
    """A query of one head. Heads run fastest, then tokens of a dilation group, groups, the batch.

    Parameters
    ----------
    plan
        Of the backward.
    number
        Of the query, below `count` times the batch.
    """

    def __init__(self, plan: BackwardPlan | SweepPlan, number: Expr) -> None:
        self._problem = problem = plan.problem
        self.head, rest = let(number % problem.heads), number // problem.heads
        self._cell: list[Expr] = []
        for length in reversed(plan.lengths):
            self._cell.insert(0, let(rest % length))
            rest = rest // length
        residue: list[Expr] = []
        self._group, self.batch = let(rest % plan.groups), let(rest // plan.groups)
        rest = self._group
        for dilation in reversed(problem.dilation):
            residue.insert(0, rest % dilation)
            rest = rest // dilation
        token = [let(c * d + r) for c, d, r in zip(self._cell, problem.dilation, residue, strict=True)]
        # The shorter groups have no such token. Nobody asks for it, but boxes reach there.
        self.exists = both(*(t < x for t, x, d in zip(token, problem.layout, problem.dilation, strict=True) if x % d))
        token = [let(T.min(t, x - 1)) for t, x in zip(token, problem.layout, strict=True)]
        self.place = [self.batch, *token, self.head]

    @staticmethod
    def count(plan: BackwardPlan | SweepPlan) -> int:
        """Return how many there are in a batch entry, with those that the shorter groups lack."""
        rows: int = math.prod(plan.lengths) * plan.groups * plan.problem.heads
        return rows

    def statistics(self, plane: int) -> Expr:
        """Return where its statistics are."""
        return statistics_address(self._problem, self.batch, plane, self.head, self._group, self._cell)


class KeyWork(keys.KeyWork):
    """A tile of keys of one head, and the queries that see one of them, of all heads that share the keys."""

    plan: SweepPlan

    def cursor(self) -> QueryCursor:
        """Return the first tile that streams by."""
        return QueryCursor(self)

    @property
    def total(self) -> Expr:
        """Tiles that stream by."""
        # Never below 1, which the compiler does not see: around a loop that might never run it waits for each product.
        return let(maximum(self.tiles * self.plan.problem.group_size, 1))

    def turn(self, axis: int, number: Expr) -> Expr:
        """Return which tile along an axis is the ``number``'th: where blocks are few, those with most work come first.

        Keys a window from a border are seen by up to half more queries than those in the middle, where windows are
        shifted; those at the border itself by half as many.
        """
        tiles, tile = self.plan.tiles[axis], self.plan.own_tile[axis]
        # Tiles up to that of the key that most queries see; the first half of them have less than those in the middle.
        side = min((self.plan.problem.kernel_size[axis] - 1) // tile + 1, tiles // 2)
        if axis > 0 or not self.plan.few_blocks or self.plan.problem.is_causal[axis] or side < 2:
            return number
        number = let(number)
        light = side // 2
        heavy, middle = side - light, tiles - 2 * side

        def mirrored(rank: Expr, first: int) -> Expr:
            """Count down from ``first``, at one border and at the other in turn."""
            place = first - rank // 2
            return T.Select(rank % 2 == 0, place, tiles - 1 - place)

        rest = number - (2 * heavy + middle)
        later = T.Select(rest < 0, number - 2 * heavy + side, mirrored(rest, light - 1))
        return let(T.Select(number < 2 * heavy, mirrored(number, side - 1), later))

    def begin(self, axis: int, low: Expr) -> Expr:
        """Return where the first tile begins along an axis."""
        return low // ALIGNED * ALIGNED if axis == self.plan.rank - 1 else low


class KeyCursor(StreamCursor):
    """The first key of a tile of keys."""

    @property
    def head(self) -> Expr:
        """Whose keys they are."""
        return self.work.stream_head

    def tokens(self) -> list[Expr]:
        """Return where in the layout the tile begins."""
        return self.work.tokens(list(self))


class QueryCursor(StreamCursor):
    """The first query of a tile of queries, and its head, which changes last."""

    def __init__(self, work: KeyWork) -> None:
        super().__init__(work)
        self.has_heads = work.plan.problem.group_size > 1
        self._head: Any = local(1, "int32") if self.has_heads else None
        if self.has_heads:
            put(self._head, 0, work.stream_head)

    @property
    def head(self) -> Expr:
        """Whose queries they are."""
        return self._head[0] if self.has_heads else self.work.stream_head

    @property
    def group(self) -> Expr:
        """Number of the dilation group."""
        return _number(self.work.group, self.work.plan.problem.dilation)

    def tokens(self) -> list[Expr]:
        """Return where in the layout the tile begins."""
        return self.work.tokens(list(self))

    def _step(self, axis: int) -> None:
        super()._step(axis)
        if axis == 0 and self.has_heads:
            with when(self.at[0] >= self.work.high[0]):
                put(self.at, 0, self.work.low[0])
                put(self._head, 0, self._head[0] + 1)


class StripWork:
    """A tile of additional keys of one head, and a strip of all queries, whose part of their gradients is summed.

    Parameters
    ----------
    plan
        Of the kernel.
    item
        Number of the tile: tiles run fastest, then strips, heads, the batch.
    tiles
        Tiles of additional keys.
    count
        Additional keys.
    """

    def __init__(self, plan: SweepPlan, item: Expr, tiles: Expr, count: Expr) -> None:
        self.plan, self.count = plan, count
        self.first = [let(item % tiles * plan.own_tile[0])]
        rest = let(item // tiles)
        self.strip = let(rest % plan.strips)
        rest = rest // plan.strips
        self.head = let(rest % plan.heads)
        self.batch = let(rest // plan.heads)
        self.start = let(self.strip * plan.stream_items // plan.strips)
        self.end = let((self.strip + 1) * plan.stream_items // plan.strips)

    @property
    def exists(self) -> None:
        """Always."""
        return

    @property
    def total(self) -> Expr:
        """Tiles that stream by."""
        return let(maximum(self.end - self.start, 1))

    def cursor(self) -> StripCursor:
        """Return the first tile that streams by."""
        return StripCursor(self)

    def tokens(self, positions: Sequence[Expr]) -> list[Expr]:
        """Return additional keys as they are counted."""
        return list(positions)


class StripCursor:
    """A tile of queries of a strip: tiles of one dilation group run fastest, then groups, then heads."""

    def __init__(self, work: StripWork) -> None:
        self.work = work
        self._number = local(1, "int32")
        put(self._number, 0, work.start)

    def advance(self) -> None:
        """Step to the next tile."""
        put(self._number, 0, self._number[0] + 1)

    def _place(self) -> tuple[list[Expr], list[Expr], Expr]:
        plan = self.work.plan
        rest = self._number[0]
        tile: list[Expr] = []
        for extent, size in zip(reversed(plan.stream_tiles), reversed(plan.stream_tile), strict=True):
            tile.insert(0, let(rest % extent * size))
            rest = rest // extent
        group: list[Expr] = []
        for dilation in reversed(plan.problem.dilation):
            group.insert(0, let(rest % dilation))
            rest = rest // dilation
        return tile, group, let(rest)

    def __iter__(self) -> Any:
        return iter(self._place()[0])

    @property
    def head(self) -> Expr:
        """Whose queries they are."""
        return self.work.head * self.work.plan.problem.group_size + self._place()[2]

    @property
    def group(self) -> Expr:
        """Number of the dilation group."""
        return _number(self._place()[1], self.work.plan.problem.dilation)

    def tokens(self) -> list[Expr]:
        """Return where in the layout the tile begins."""
        tile, group, _ = self._place()
        return [x * d + g for x, d, g in zip(tile, self.work.plan.problem.dilation, group, strict=True)]


def statistics_address(
    problem: Problem, batch: Expr, plane: int, head: Expr, group: Expr, positions: Sequence[Expr]
) -> Expr:
    """Return where in their workspace one of a query's statistics is."""
    address = index64(batch)
    for place, extent in zip((plane, head, group, *positions), statistics_shape(problem), strict=True):
        address = address * extent + index64(place)
    return address


def _number(group: Sequence[Expr], dilation: Sequence[int]) -> Expr:
    number: Expr = 0
    for place, step in zip(group, dilation, strict=True):
        number = number * step + place
    return number
