"""`Rows`: the queries of a warpgroup's warps, and the two of them whose scores a thread has."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import T, let
from na_compiler.schedules.sm90.plan import Plan

__all__ = ["Rows"]

Expr = Any
_ROWS = 2


class Rows:
    """The two queries whose rows a thread has, and the box of queries that its warp has.

    Parameters
    ----------
    plan
        Of the kernel.
    warpgroup, warp, lane
        Which of the computing warpgroups, which warp in it, which lane.
    """

    def __init__(self, plan: Plan, warpgroup: Expr, warp: Expr, lane: Expr) -> None:
        self.plan, self.warpgroup, self.warp, self.lane = plan, warpgroup, warp, lane
        self.rows = [let(warp * 16 + T.shift_right(lane, 2) + 8 * row) for row in range(_ROWS)]

    def position(self, row: Expr, first: list[Expr]) -> list[Expr]:
        """Return the query of a row of the warpgroup, where the block's first one is at ``first``."""
        found: list[Expr] = []
        for extent in reversed(self.plan.own_box):
            found.insert(0, row % extent)
            row = row // extent
        found[0] = found[0] + self.warpgroup * self.plan.own_box[0]
        return [let(start + offset) for start, offset in zip(first, found, strict=True)]

    def warp_queries(self, first: list[Expr]) -> tuple[list[Expr], list[Expr]]:
        """Return the first and the last query of the warp's box; of the warpgroup's if its rows are no box."""
        box = self.plan.warp_box
        if box is None:
            start, box = self.position(0, first), self.plan.own_box
        else:
            start = self.position(self.warp * 16, first)
        return start, [low + extent - 1 for low, extent in zip(start, box, strict=True)]
