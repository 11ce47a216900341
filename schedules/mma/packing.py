"""`HeadsWork`: a tile of queries of some heads that share keys, whose rows lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.mma.block import Source
from na_compiler.schedules.mma.plan import Plan
from na_compiler.schedules.shared.trace import index64, let
from na_compiler.schedules.shared.work import Work

__all__ = ["HeadsWork"]

Expr = Any


class HeadsWork(Work):
    """A tile of queries; with grouped-query attention, of as many heads as the plan packs.

    A box of 2x2 tokens whose queries fill 16 rows with four heads sees 8x8 keys where windows are of 7x7, one of 4x4
    tokens 10x10: fewer scores that are masked, and keys are read for all four heads at once.
    """

    plan: Plan

    @property
    def heads(self) -> int:
        """Such sets of heads."""
        return self.plan.problem.heads // self.plan.packed

    @property
    def first_head(self) -> Expr:
        """The first of the heads."""
        return let(self.head * self.plan.packed) if self.plan.packed > 1 else self.head

    @property
    def stream_head(self) -> Expr:
        """The head of the keys."""
        sets = self.plan.problem.group_size // self.plan.packed
        return let(self.head // sets) if sets > 1 else self.head

    def bounds(self, axis: int, query: Expr) -> tuple[Expr, Expr]:
        """Return the window of a query: numbers where it is all of the axis' dilation group."""
        return (0, self.lengths[axis]) if self.plan.is_whole(axis) else super().bounds(axis, query)

    def source(self, buffer: Any) -> Source:
        """Return the heads' queries or outputs: rows at positions along the layout's axes, and a head."""
        return Source(self, buffer, self.first_head, self.plan.problem.dilation, self.group, steps_heads=True)

    def place(self, positions: Sequence[Expr], head: Expr) -> Expr:
        """Return the number of a token's head in a contiguous tensor, ``head`` counted from the first."""
        token = self.address(positions, 1)
        return token if self.plan.packed == 1 else token * self.plan.packed + index64(head)
