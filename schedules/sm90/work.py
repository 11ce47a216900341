"""`Work`: one tile of queries of one head, and the keys that its windows need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.sm90.plan import Plan
from na_compiler.schedules.sm90.trace import both, let, local, maximum, minimum, put, when
from na_compiler.window import window_bounds

__all__ = ["KeyCursor", "Work"]

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

    def __init__(self, plan: Plan, item: Expr) -> None:
        self.plan = plan
        problem = plan.problem
        tile: list[Expr] = []
        rest = item
        for extent in reversed(plan.tiles):
            tile.insert(0, rest % extent)
            rest = rest // extent
        group: list[Expr] = []
        for dilation in reversed(problem.dilation):
            group.insert(0, let(rest % dilation) if dilation > 1 else 0)
            rest = rest // dilation
        self.group = group
        self.head = let(rest % problem.heads)
        self.head_kv = let(self.head // problem.group_size) if problem.group_size > 1 else self.head
        self.batch = let(rest // problem.heads)
        self.lengths = [self._length(axis) for axis in range(plan.rank)]
        self.first = [let(tile[axis] * plan.query_tile[axis]) for axis in range(plan.rank)]
        last = [minimum(self.first[a] + plan.query_tile[a], self.lengths[a]) - 1 for a in range(plan.rank)]
        self.low = [let(self.bounds(axis, self.first[axis])[0]) for axis in range(plan.rank)]
        self.high = [let(self.bounds(axis, last[axis])[1]) for axis in range(plan.rank)]
        total: Expr = 1
        for axis, extent in enumerate(plan.key_tile):
            total = total * ((self.high[axis] - self.low[axis] + (extent - 1)) // extent)
        self.tiles = let(total)

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

    def bounds(self, axis: int, query: Expr) -> tuple[Expr, Expr]:
        """Return the window of a query, which must exist."""
        problem = self.plan.problem
        return window_bounds(
            query,
            self.lengths[axis],
            problem.kernel_size[axis],
            problem.stride[axis],
            problem.is_causal[axis],
            minimum=minimum,
            maximum=maximum,
        )

    def clamp(self, axis: int, query: Expr) -> Expr:
        """Return the last query in place of one beyond it."""
        return minimum(query, self.lengths[axis] - 1)

    def within(self, queries: Sequence[Expr], tile: Sequence[int]) -> Expr | None:
        """Return whether queries exist; ``None`` if they always do, for tiles of the given extents."""
        found = None
        for axis, query in enumerate(queries):
            length = self.lengths[axis]
            if not (isinstance(length, int) and length % tile[axis] == 0):
                found = both(found, query < length)
        return found

    def tokens(self, positions: Sequence[Expr]) -> list[Expr]:
        """Return where in the layout positions of the dilation group are."""
        problem = self.plan.problem
        return [
            position * dilation + group if dilation > 1 else position
            for position, dilation, group in zip(positions, problem.dilation, self.group, strict=True)
        ]


class KeyCursor:
    """The first key of a tile of keys, stepping over the box that the windows need; the last axis runs fastest."""

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
        put(self.at, axis, self.at[axis] + self.work.plan.key_tile[axis])
        if axis > 0:
            with when(self.at[axis] >= self.work.high[axis]):
                put(self.at, axis, self.work.low[axis])
                self._step(axis - 1)
