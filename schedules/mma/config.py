"""The choices that the schedule for tensor cores of single warps leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.problem import Problem
from na_compiler.schedules.mma.plan import Plan
from na_compiler.schedules.shared.config import Config
from na_compiler.workspace import Workspace

__all__ = ["Mma"]


@dataclass(frozen=True)
class Mma(Config):
    """Config of `na_compiler.schedules.mma.kernel`.

    Parameters
    ----------
    warp_box
        Box of tokens whose queries one warp has: 16 or 32 rows in all, each token's once for each of ``heads``.
    warps
        Warps of a thread block along each axis, their boxes one beside the other: 1, 2, 4 or 8 in all.
    key_tile
        Box of keys that come into shared memory at once, its last extent a multiple of 8; ``None`` keeps all keys and
        values that the block's windows come to in shared memory, and each warp visits just the box of its own.
    stages
        Boxes of keys, and as many of values, that shared memory holds.
    chunk
        Where all keys are kept, groups of 16 of them whose scores are computed together.
    blocks
        Thread blocks of a multiprocessor that registers are limited for; 0 leaves it to the compiler, which may
        then spill some.
    heads
        Heads of queries that share keys, and lie in a warp's rows side by side; divides the heads that share them.
    """

    warp_box: tuple[int, ...]
    warps: tuple[int, ...]
    key_tile: tuple[int, ...] | None
    stages: int = 2
    chunk: int = 8
    blocks: int = 1
    heads: int = 1

    family = "mma"

    def plan(self, problem: Problem) -> Plan:
        """Return the extents and the layout of shared memory that follow."""
        return Plan(problem, self)

    def workspace(self, problem: Problem, direction: str) -> Workspace:  # noqa: ARG002
        """Return none: everything is in registers and shared memory."""
        return Workspace()

    def alignment(self, problem: Problem) -> int:  # noqa: ARG002
        """Return what one copy moves."""
        return 16
