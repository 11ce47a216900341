"""Where a thread block of the backward of five products is, and whose turn it is at a tile of queries.

**The order.** Several tiles of keys add to the gradients of one query. So that the bits are the same in every run,
each tile of queries has a counter, and the tiles of keys that meet it add in the order of their numbers: the ``n``'th
when the counter says ``n``. Which ones meet it is one stretch of tiles along each axis, since windows begin and end in
order, so the number of those before is a product of extents, and nothing is looked up.

**Why it cannot deadlock.** Thread blocks take their tiles from a ticket counter, so tiles are taken in the order of
their numbers, whatever order the blocks start in. A block waits only for tiles with lower numbers of the same head:
those have been taken before, by blocks that run already and hold their registers and shared memory until they end. Of
all tiles that are not finished, the lowest waits for none. So there always is a block that goes on.

**Why it seldom waits.** A block goes through its queries from the last to the first. The next tile of keys is seen by
queries that end one tile later, so when both begin at once it comes to each tile of queries after the block before it,
not at the same time. (In ascending order a block would have to wait at its first tile until the one before came there,
and that for the one before: 8 times as long with 32768 tokens and a window of 2048.) Near borders several tiles of keys
end at the same query, and are seen by fewer or more queries than their neighbors, whose pace they take; so the heads,
which have nothing to do with each other, take turns, and few blocks of one head are under way at a time.
"""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import both, let, minimum, put, strided_offset, when
from na_compiler.schedules.shared.work import Work
from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan
from na_compiler.schedules.sm90.backward.work import KeyWork, QueryCursor

__all__ = ["FusedWork", "GridCursor", "QueryTile", "item_of_ticket"]

Expr = Any


def item_of_ticket(plan: FusedPlan, ticket: Expr, problems: Expr) -> Expr:
    """Return which tile a ticket is for: of some heads in turn, tile by tile; then of the next heads.

    Parameters
    ----------
    plan
        Of the kernel.
    ticket
        Its number.
    problems
        Heads, dilation groups and batch entries in all.
    """
    tiles = plan.items // plan.groups
    most = plan.fused.together
    chunk = let(ticket // (most * tiles))
    rest = let(ticket - chunk * (most * tiles))
    size = let(minimum(problems - chunk * most, most))
    return (chunk * most + rest % size) * tiles + _tile_of_number(plan, let(rest // size))


def _tile_of_number(plan: FusedPlan, number: Expr) -> Expr:
    """Return which tile is the ``number``'th of its head, counted by the axes as they are."""
    if plan.order == tuple(range(plan.rank)):
        return number
    tile: dict[int, Expr] = {}
    for axis in reversed(plan.order):
        tile[axis] = let(number % plan.tiles[axis])
        number = number // plan.tiles[axis]
    place: Expr = 0
    for axis, extent in enumerate(plan.tiles):
        place = place * extent + tile[axis]
    return place


class FusedWork(KeyWork):
    """A tile of keys of one head, and the tiles of queries of which some see one of them."""

    plan: FusedPlan

    def cursor(self) -> GridCursor:
        """Return the first tile that streams by."""
        return GridCursor(self)

    def turn(self, axis: int, number: Expr) -> Expr:  # noqa: ARG002
        """Return the number itself: it is what decides who adds first."""
        return number

    def begin(self, axis: int, low: Expr) -> Expr:
        """Return where the first tile begins along an axis: they are the same ones for all keys."""
        extent = self.plan.stream_tile[axis]
        return low // extent * extent

    def last(self, axis: int) -> Expr:
        """Return where the last tile begins along an axis."""
        return (self.high[axis] - 1) // self.plan.stream_tile[axis] * self.plan.stream_tile[axis]

    def place(self, cursor: GridCursor) -> Expr:
        """Return the number of a tile of queries among those of its head."""
        number: Expr = 0
        for extent, size, at in zip(self.plan.stream_tiles, self.plan.stream_tile, cursor, strict=True):
            number = number * extent + at // size
        return number

    def before(self, cursor: GridCursor) -> Expr:
        """Return how many tiles of keys add to a tile of queries before this one."""
        number: Expr = 0
        firsts = list(cursor)
        for axis in self.plan.order:
            first, size = firsts[axis], self.plan.own_tile[axis]
            last = minimum(first + self.plan.stream_tile[axis], self.lengths[axis]) - 1
            # Of queries' windows, which `bounds` is the inverse of here.
            low = let(Work.bounds(self, axis, first)[0] // size)
            high = let((Work.bounds(self, axis, last)[1] - 1) // size)
            number = number * (high - low + 1) + (self.first[axis] // size - low)
        return number


class GridCursor(QueryCursor):
    """The first query of a tile of queries: from the last to the first."""

    work: FusedWork

    def __init__(self, work: FusedWork) -> None:
        super().__init__(work)
        self._last = [let(work.last(axis)) for axis in range(work.plan.rank)]
        for axis, last in enumerate(self._last):
            put(self.at, axis, last)

    def advance(self) -> None:
        """Step to the next tile."""
        self._step(self.work.plan.rank - 1)

    def _step(self, place: int) -> None:
        """Step along an axis, the ``place``'th of those that the walk names."""
        axis = self.work.plan.walk[place]
        put(self.at, axis, self.at[axis] - self.work.plan.stream_tile[axis])
        if place > 0 or self.has_heads:
            with when(self.at[axis] < self.work.low[axis]):
                put(self.at, axis, self._last[axis])
                if place > 0:
                    self._step(place - 1)
                else:
                    put(self._head, 0, self._head[0] + 1)


class QueryTile:
    """Where a tile of queries is in the layout."""

    def __init__(self, plan: FusedPlan, number: Expr) -> None:
        self.plan = plan
        rest = number
        self.first: list[Expr] = []
        for extent, size in zip(reversed(plan.stream_tiles), reversed(plan.stream_tile), strict=True):
            self.first.insert(0, let(rest % extent * size))
            rest = rest // extent
        self.group: list[Expr] = []
        for dilation in reversed(plan.problem.dilation):
            self.group.insert(0, let(rest % dilation))
            rest = rest // dilation
        self.head, self.batch = let(rest % plan.problem.heads), let(rest // plan.problem.heads)

    def address(self, tensor: Any, row: Expr) -> tuple[Expr | None, Expr]:
        """Return whether a row is a query, and where its columns begin in a tensor with strides."""
        problem = self.plan.problem
        offsets: list[Expr] = []
        for extent in reversed(self.plan.stream_tile):
            offsets.insert(0, row % extent)
            row = row // extent
        exists, place = None, [self.batch]
        for axis, extent in enumerate(problem.layout):
            token = let((self.first[axis] + offsets[axis]) * problem.dilation[axis] + self.group[axis])
            if extent % (self.plan.stream_tile[axis] * problem.dilation[axis]):
                exists = both(exists, token < extent)
            place.append(token)
        return exists, strided_offset(tensor, [*place, self.head])
