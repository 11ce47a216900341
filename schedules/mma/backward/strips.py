"""Where a thread block is that owns additional keys: queries, which all see those, are cut into strips, one a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.mma.backward.plan import AdditionalPlan
from na_compiler.schedules.shared.trace import let, register
from na_compiler.window import group_length

__all__ = ["StripTile", "StripWork"]

Expr = Any


class StripWork:
    """A tile of additional keys of one head, and a strip of all queries, whose part of their gradients is summed.

    Parameters
    ----------
    plan
        Of the kernel.
    item
        Number of the tile: tiles run fastest, then strips, heads, the batch.
    count
        Additional keys.
    """

    def __init__(self, plan: AdditionalPlan, item: Expr, count: Expr) -> None:
        self.plan, self.count = plan, count
        extent = plan.own_tile[0]
        tiles = register((count + (extent - 1)) // extent)
        self.first = [register(item % tiles * extent)]
        rest = let(item // tiles)
        self.strip = register(rest % plan.strips)
        rest = rest // plan.strips
        self.head = register(rest % plan.heads)
        self.batch = register(rest // plan.heads)
        # Of the tiles of queries of all heads that share the keys.
        self.start = register(self.strip * plan.stream_items // plan.strips)
        self.end = register((self.strip + 1) * plan.stream_items // plan.strips)
        # They lie along one axis, and have no dilation.
        self.group, self.dilation, self.lengths = [0], (1,), [count]

    def within(self, positions: Sequence[Expr], tile: Sequence[int]) -> Expr:  # noqa: ARG002
        """Return whether an additional key exists."""
        return positions[0] < self.count


class StripTile:
    """A tile of queries of a strip: tiles of one dilation group run fastest, then groups, then heads.

    Attributes
    ----------
    origin
        Its first position.
    lengths
        Of the dilation group.
    group
        Which one, along each axis.
    head
        Whose queries they are.
    """

    def __init__(self, work: StripWork, number: Expr) -> None:
        plan = work.plan
        self.origin: list[Expr] = []
        for tiles, extent in zip(reversed(plan.stream_tiles), reversed(plan.stream_tile), strict=True):
            self.origin.insert(0, register(number % tiles * extent))
            number = number // tiles
        self.group: list[Expr] = []
        for dilation in reversed(plan.problem.dilation):
            self.group.insert(0, register(number % dilation) if dilation > 1 else 0)
            number = number // dilation
        self.head = register(work.head * plan.problem.group_size + number)
        axes = zip(plan.problem.layout, plan.problem.dilation, self.group, strict=True)
        self.lengths = [
            layout // dilation if layout % dilation == 0 else register(group_length(layout, dilation, group))
            for layout, dilation, group in axes
        ]
