"""The choices that the backward for tensor cores of single warps leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.operands import RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.mma.backward.plan import BackwardPlan, statistics_shape
from na_compiler.schedules.mma.backward.sweep_config import Sweep
from na_compiler.schedules.shared.config import Config
from na_compiler.workspace import ADDITIONAL, Workspace

__all__ = ["MmaBackward"]


@dataclass(frozen=True)
class MmaBackward(Config):
    """Config of `na_compiler.schedules.mma.backward.kernel`.

    Parameters
    ----------
    queries
        For the gradient of queries: a block owns queries, and keys stream by.
    keys
        For the gradients of keys and values: a block owns keys, and the queries that see them stream by.
    split
        Whether these two gradients have a kernel each, because the registers do not suffice for both.
    """

    queries: Sweep
    keys: Sweep
    split: bool = False

    family = "mma"

    def plan(self, problem: Problem) -> BackwardPlan:
        """Return the extents and the layout of shared memory that follow."""
        return BackwardPlan(problem, self)

    def workspace(self, problem: Problem, direction: str) -> Workspace:  # noqa: ARG002
        """Return two numbers a query, and parts of the gradients of additional keys and values, and of biases."""
        buffers: list[tuple[int | str, ...]] = [statistics_shape(problem)]
        if problem.additional_kv:
            parts = (problem.heads_kv, self.plan(problem).strips, ADDITIONAL)
            buffers += [(*parts, problem.head_dim), (*parts, problem.head_dim_v)]
        if problem.has(RELATIVE_POSITION_BIAS):
            buffers.append(self.plan(problem).bias_space)
        return Workspace(tuple(buffers))

    def alignment(self, problem: Problem) -> int:  # noqa: ARG002
        """Return what one copy moves."""
        return 16
