"""The choices that the backward of five products leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.problem import Problem
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan
from na_compiler.schedules.sm90.backward.plan import statistics_shape
from na_compiler.schedules.sm90.plan import MAX_RANK_WITH_HEADS
from na_compiler.workspace import Workspace

__all__ = ["Sm90Fused"]


@dataclass(frozen=True)
class Sm90Fused(Config):
    """Config of `na_compiler.schedules.sm90.backward.fused.kernel`.

    Parameters
    ----------
    key_tile
        Box of 64 keys that one warpgroup has. The boxes of a thread block's two lie one after another along axis 0.
    query_tile
        Box of 64 queries that come into shared memory at once. The layout is cut into these from its first query on.
    stages
        Boxes that shared memory holds, of queries and of gradients of the output.
    slopes
        Tiles of gradients of scores that shared memory holds.
    parts
        Parts of gradients of queries that shared memory holds on their way to be added up.
    together
        Heads, dilation groups and batch entries whose tiles are taken in turn: none has to wait for another.
    order
        Axes by which tiles of keys are numbered, the one that runs fastest last. Empty: as they are.
    walk
        Axes by which a thread block goes through tiles of queries, the one that runs fastest last. Empty: as they are.
    """

    key_tile: tuple[int, ...]
    query_tile: tuple[int, ...]
    stages: int = 2
    slopes: int = 2
    parts: int = 2
    together: int = 32
    order: tuple[int, ...] = ()
    walk: tuple[int, ...] = ()

    family = "sm90"

    def plan(self, problem: Problem) -> FusedPlan:
        """Return the extents and the layout of shared memory that follow."""
        return FusedPlan(problem, self)

    def workspace(self, problem: Problem, direction: str) -> Workspace:  # noqa: ARG002
        """Return two numbers a query, gradients of queries in float32, whose turn it is at each tile, a ticket."""
        plan = self.plan(problem)
        return Workspace((statistics_shape(problem), plan.parts_shape, plan.turns_shape, (1,)))

    def alignment(self, problem: Problem) -> int:  # noqa: ARG002
        """Return what TMA wants of addresses and strides."""
        return 16

    def has_adjacent_heads(self, problem: Problem) -> bool:
        """Return whether tensor maps have no axis for heads."""
        return problem.rank > MAX_RANK_WITH_HEADS
