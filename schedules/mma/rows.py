"""`Rows`: the queries of a warp, and the two of them whose scores a thread has."""

from __future__ import annotations

from typing import Any, Protocol

from na_compiler.schedules.shared.trace import T, let

__all__ = ["Rows"]

Expr = Any
_ROWS = 2


class _Plan(Protocol):
    """What is asked of a plan: the box of tokens that a warp owns, and in its config the warps along each axis."""

    config: Any
    warp_box: tuple[int, ...]


class Rows:
    """The two queries whose rows a thread has, and the box of queries that its warp has.

    Parameters
    ----------
    plan
        Of the kernel.
    warp, lane
        Which warp of the block, which lane of it.
    first_row
        Of the 16 that one product has, among the warp's.
    packed
        Rows of a token, one after another: a head each.
    """

    def __init__(self, plan: _Plan, warp: Expr, lane: Expr, first_row: int = 0, packed: int = 1) -> None:
        self.plan, self.warp, self.lane, self.packed = plan, warp, lane, packed
        self.rows = [let(T.shift_right(lane, 2) + (first_row + 8 * row)) for row in range(_ROWS)]
        self._warp: list[Expr] = []
        for count in reversed(plan.config.warps):
            self._warp.insert(0, let(warp % count) if count > 1 else 0)
            warp = warp // count if count > 1 else warp

    def first(self, first: list[Expr]) -> list[Expr]:
        """Return the warp's first query, where the block's is at ``first``."""
        pairs = zip(first, self._warp, self.plan.warp_box, strict=True)
        return [let(start + place * extent) for start, place, extent in pairs]

    def position(self, row: Expr, first: list[Expr]) -> list[Expr]:
        """Return the query of a row of the warp, where the block's first one is at ``first``."""
        found: list[Expr] = []
        row = row // self.packed if self.packed > 1 else row
        for extent in reversed(self.plan.warp_box[1:]):
            found.insert(0, row % extent)
            row = row // extent
        return [let(start + offset) for start, offset in zip(self.first(first), [row, *found], strict=True)]

    def head(self, row: Expr) -> Expr:
        """Return which of the heads a row is of, that lie side by side."""
        return let(row % self.packed) if self.packed > 1 else 0

    def warp_queries(self, first: list[Expr]) -> tuple[list[Expr], list[Expr]]:
        """Return the first and the last query of the warp's box."""
        start = self.first(first)
        return start, [low + extent - 1 for low, extent in zip(start, self.plan.warp_box, strict=True)]
