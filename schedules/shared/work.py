"""`Work`: one tile of queries of one head, and the keys that its windows need; and where all of them are.

Kernels on tensor cores ask it for all that depends on a layout's extents or on where windows are, in numbers of tokens:
how many tiles there are, which of them a block has, where its tokens lie, what they see, and where that is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.shared.tiles import TilePlan
from na_compiler.schedules.shared.trace import (
    T,
    both,
    index64,
    let,
    local,
    maximum,
    minimum,
    put,
    strided_offset,
    when,
)  # fmt: skip
from na_compiler.window import CUT, WRAP, border_kind, window_bounds

__all__ = ["StreamCursor", "Work"]

Expr = Any


class Work:
    """Where a tile of queries is, and which box of keys its windows come to. Everything is uniform in a warp.

    Positions are those inside a dilation group; `token` turns them into the layout's.

    Parameters
    ----------
    plan
        Of the kernel.
    item
        Number of the tile: tiles run fastest, then dilation groups, heads, the batch.
    """

    def __init__(self, plan: TilePlan, item: Expr) -> None:
        self.plan = plan
        problem = plan.problem
        tile: list[Expr] = []
        rest = item
        for axis in reversed(range(plan.rank)):
            tile.insert(0, self.turn(axis, rest % plan.tiles[axis]))
            rest = rest // plan.tiles[axis]
        group: list[Expr] = []
        for dilation in reversed(problem.dilation):
            group.insert(0, let(rest % dilation) if dilation > 1 else 0)
            rest = rest // dilation
        self.group = group
        self.head = let(rest % self.heads)
        self.batch = let(rest // self.heads)
        self.lengths = [self._length(axis) for axis in range(plan.rank)]
        self.first = [let(tile[axis] * plan.own_tile[axis]) for axis in range(plan.rank)]
        last = [minimum(self.first[a] + plan.own_tile[a], self.lengths[a]) - 1 for a in range(plan.rank)]
        self.low = [let(self.begin(axis, self.bounds(axis, self.first[axis])[0])) for axis in range(plan.rank)]
        self.high = [let(self.bounds(axis, last[axis])[1]) for axis in range(plan.rank)]
        total: Expr = 1
        for axis, extent in enumerate(plan.stream_tile):
            total = total * ((self.high[axis] - self.low[axis] + (extent - 1)) // extent)
        self.tiles = let(total)

    @staticmethod
    def count(plan: TilePlan, batch: Expr, heads: int) -> Expr:
        """Return how many tiles there are to own, of all heads and batch entries: a launch's blocks."""
        return T.Cast("int32", batch * (heads * plan.items))

    def turn(self, axis: int, number: Expr) -> Expr:  # noqa: ARG002
        """Return which tile along an axis is the ``number``'th."""
        return number

    @property
    def heads(self) -> int:
        """Heads of the tensor that the tile is of."""
        return self.plan.problem.heads

    @property
    def stream_head(self) -> Expr:
        """The head of the tokens that stream by."""
        size = self.plan.problem.group_size
        return let(self.head // size) if size > 1 else self.head

    def _length(self, axis: int) -> Expr:
        """Tokens of the dilation group; an int where all groups have as many."""
        layout, dilation = self.plan.problem.layout[axis], self.plan.problem.dilation[axis]
        if layout % dilation == 0:
            return layout // dilation
        return let((layout - self.group[axis] + (dilation - 1)) // dilation)

    @property
    def exists(self) -> Expr | None:
        """Whether the tile has queries: the shorter dilation groups may have fewer tiles. ``None`` if it always has."""
        ragged = [axis for axis, length in enumerate(self.lengths) if not isinstance(length, int)]
        return both(*(self.first[axis] < self.lengths[axis] for axis in ragged))

    def begin(self, axis: int, low: Expr) -> Expr:  # noqa: ARG002
        """Return where the first tile begins along an axis, if ``low`` is the first token that is needed."""
        return low

    def extent(self, axis: int) -> int | None:
        """Return how long all windows are along an axis; ``None`` if they differ."""
        problem = self.plan.problem
        differ = problem.is_causal[axis] or border_kind(problem.border[axis]) == CUT
        return None if differ else problem.kernel_size[axis]

    def bounds(self, axis: int, query: Expr) -> tuple[Expr, Expr]:
        """Return the window of a query, which must exist."""
        problem = self.plan.problem
        return window_bounds(
            query,
            self.lengths[axis],
            problem.kernel_size[axis],
            problem.stride[axis],
            problem.is_causal[axis],
            problem.border[axis],
            minimum=minimum,
            maximum=maximum,
        )

    def clamp(self, axis: int, query: Expr) -> Expr:
        """Return the last query in place of one beyond it."""
        return minimum(query, self.lengths[axis] - 1)

    @property
    def wraps(self) -> bool:
        """Whether windows wrap along an axis: positions of what streams by may lie beyond an end of it."""
        return WRAP in self.plan.problem.border

    def around(self, axis: int, position: Expr) -> Expr:
        """Return a position less than an axis beyond an end modulo the axis, where windows wrap."""
        length = self.lengths[axis]
        if self.plan.problem.border[axis] != WRAP:
            return position
        return T.Select(position < 0, position + length, T.Select(position < length, position, position - length))

    def within(self, queries: Sequence[Expr], tile: Sequence[int]) -> Expr | None:
        """Return whether queries exist; ``None`` if they always do, for tiles of the given extents."""
        found = None
        for axis, query in enumerate(queries):
            length = self.lengths[axis]
            if not (isinstance(length, int) and length % tile[axis] == 0):
                found = both(found, query < length)
        return found

    def part(self, warpgroup: Expr) -> tuple[Expr, Expr, Expr]:
        """Return what one warpgroup needs: its first token along axis 0, its first tile, and the end of its tiles.

        Warpgroups lie along axis 0, which tiles run along slowest: what one needs is one stretch of them. The end may
        lie beyond that of all tiles.
        """
        box, extent = self.plan.own_box[0], self.plan.stream_tile[0]
        first = self.clamp(0, let(self.first[0] + warpgroup * box))
        last = self.clamp(0, let(self.first[0] + warpgroup * box + (box - 1)))
        low, high = self.bounds(0, first)[0], self.bounds(0, last)[1]
        slabs = let((low - self.low[0]) // extent)
        inner: Expr = 1
        for axis in range(1, self.plan.rank):
            size = self.plan.stream_tile[axis]
            inner = inner * ((self.high[axis] - self.low[axis] + (size - 1)) // size)
        inner = let(inner)
        end = ((high - self.low[0] + (extent - 1)) // extent) * inner
        return self.low[0] + slabs * extent, slabs * inner, end

    def tokens(self, positions: Sequence[Expr]) -> list[Expr]:
        """Return where in the layout positions of the dilation group are."""
        problem = self.plan.problem
        return [
            position * dilation + group if dilation > 1 else position
            for position, dilation, group in zip(positions, problem.dilation, self.group, strict=True)
        ]

    def address(self, positions: Sequence[Expr], width: int) -> Expr:
        """Return the offset of a token's head in a contiguous tensor with ``width`` elements a head."""
        offset = index64(self.batch)
        for token, extent in zip(self.tokens(positions), self.plan.problem.layout, strict=True):
            offset = offset * extent + index64(token)
        return (offset * self.heads + index64(self.head)) * width

    def address_in(self, tensor: Any, positions: Sequence[Expr]) -> Expr:
        """Return the offset of a token's head in a tensor ``[batch, *layout, heads, width]``, strided or contiguous."""
        if not tensor.strides:
            return self.address(positions, int(tensor.shape[-1]))
        return strided_offset(tensor, [self.batch, *self.tokens(positions), self.head])


class StreamCursor:
    """The first token of a tile that streams by, stepping over the box that is needed; the last axis runs fastest."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.at = local(work.plan.rank, "int32")
        for axis, low in enumerate(work.low):
            put(self.at, axis, low)

    def __getitem__(self, axis: int) -> Expr:
        return self.at[axis]

    def __iter__(self) -> Any:
        return (self.at[axis] for axis in range(self.work.plan.rank))

    def advance(self) -> None:
        """Step to the next tile."""
        self._step(self.work.plan.rank - 1)

    def _step(self, axis: int) -> None:
        put(self.at, axis, self.at[axis] + self.work.plan.stream_tile[axis])
        if axis > 0:
            with when(self.at[axis] >= self.work.high[axis]):
                put(self.at, axis, self.work.low[axis])
                self._step(axis - 1)
