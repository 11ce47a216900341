"""The choices that the schedule for Hopper leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.problem import Problem
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.sm90.plan import Plan
from na_compiler.workspace import Workspace

__all__ = ["Sm90"]


@dataclass(frozen=True)
class Sm90(Config):
    """Config of `na_compiler.schedules.sm90.kernel`.

    Parameters
    ----------
    query_tile
        Box of 64 queries that one warpgroup has.
    key_tile
        Box of keys that come into shared memory at once.
    warpgroups
        Warpgroups of a thread block that compute: 2 or 3. Their boxes of queries lie one after another along axis 0.
    stages
        Boxes of keys, and as many of values, that shared memory holds.
    pingpong
        Whether warpgroups take turns in issuing products, so that one's softmax runs beside the other's products.
    overlap
        Whether a warpgroup's own softmax is kept beside its own weighted sum of the tile before. Without, the compiler
        moves the wait for that sum up, and only the other warpgroup's products hide the softmax.
    persistent
        Whether a thread block goes on to another tile of queries, of which it loads the first keys early.
    threshold
        Powers of two by which the highest score of a row may rise before its sums are brought to it; 0: whenever it
        rises. See `na_compiler.schedules.sm90.softmax`.
    """

    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    warpgroups: int = 2
    stages: int = 2
    pingpong: bool = True
    overlap: bool = False
    persistent: bool = False
    threshold: int = 0

    family = "sm90"

    def plan(self, problem: Problem) -> Plan:
        """Return the extents and the layout of shared memory that follow."""
        return Plan(problem, self)

    def workspace(self, problem: Problem, direction: str) -> Workspace:  # noqa: ARG002
        """Return none: everything is in registers and shared memory."""
        return Workspace()

    def alignment(self, problem: Problem) -> int:  # noqa: ARG002
        """Return what TMA wants of addresses and strides."""
        return 16

    def has_adjacent_heads(self, problem: Problem) -> bool:
        """Return whether tensor maps have no axis for heads."""
        return not self.plan(problem).has_head_axis
