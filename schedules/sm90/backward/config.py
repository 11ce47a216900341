"""The choices that the backward for Hopper leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.problem import Problem
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.sm90.backward.plan import BackwardPlan, statistics_shape
from na_compiler.schedules.sm90.plan import MAX_RANK_WITH_HEADS
from na_compiler.workspace import ADDITIONAL, Workspace

__all__ = ["Sm90Backward", "Sweep"]


@dataclass(frozen=True)
class Sweep:
    """The choices for one of the kernels: what a thread block owns, and what streams by.

    Parameters
    ----------
    own_tile
        Box of 64 tokens that one warpgroup has.
    stream_tile
        Box of tokens that come into shared memory at once.
    warpgroups
        Warpgroups of a thread block that compute: 1 or 2. Their boxes lie one after another along axis 0.
    stages
        Boxes that shared memory holds, of each of the two tensors that stream by.
    blocks
        Thread blocks of a multiprocessor, whose registers and shared memory they share; more than 1 only with one
        warpgroup.
    defer
        Whether a tile's sums are still under way while the scores of the next one begin. It takes more registers.
    """

    own_tile: tuple[int, ...]
    stream_tile: tuple[int, ...]
    warpgroups: int = 2
    stages: int = 2
    blocks: int = 1
    defer: bool = False


@dataclass(frozen=True)
class Sm90Backward(Config):
    """Config of `na_compiler.schedules.sm90.backward.kernel`.

    Parameters
    ----------
    queries
        For the gradient of queries: a block owns queries, and keys stream by.
    keys
        For the gradients of keys and values: a block owns keys, and queries stream by.
    split
        Whether these two gradients have a kernel each, because the registers do not suffice for both.
    """

    queries: Sweep
    keys: Sweep
    split: bool = False

    family = "sm90"

    def plan(self, problem: Problem) -> BackwardPlan:
        """Return the extents and the layout of shared memory that follow."""
        return BackwardPlan(problem, self)

    def workspace(self, problem: Problem, direction: str) -> Workspace:  # noqa: ARG002
        """Return two numbers a query, and the strips' parts of the gradients of additional keys and values."""
        plan = self.plan(problem)
        buffers: list[tuple[int | str, ...]] = [statistics_shape(problem)]
        if problem.additional_kv:
            parts = (problem.heads_kv, plan.strips, ADDITIONAL)
            buffers += [(*parts, problem.head_dim), (*parts, problem.head_dim_v)]
        return Workspace(tuple(buffers))

    def alignment(self, problem: Problem) -> int:  # noqa: ARG002
        """Return what TMA wants of addresses and strides."""
        return 16

    def has_adjacent_heads(self, problem: Problem) -> bool:
        """Return whether tensor maps have no axis for heads."""
        return problem.rank > MAX_RANK_WITH_HEADS
