"""Config of the schedule for CUDA cores."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.operands import RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.simt.plan import DirectPlan
from na_compiler.tensorir.axes import Extents
from na_compiler.workspace import ADDITIONAL, Workspace

__all__ = ["Simt"]


@dataclass(frozen=True)
class Simt(Config):
    """Config of `na_compiler.schedules.simt.schedule`, the schedule for CUDA cores.

    Parameters
    ----------
    lanes
        Threads that share a query or a key; a power of two, at most 32.
    rows
        Queries, or keys, of a thread block.
    keys, queries
        Keys of a window, and queries that see a key, whose scores are computed together, per axis.
    vector
        Elements of a row that are read together; divides head_dim and head_dim_v.
    strip
        Tokens whose part of the gradients of additional keys is summed by one group of threads.
    """

    lanes: int
    rows: int
    keys: Extents
    queries: Extents
    vector: int
    strip: int

    family = "simt"

    def plan(self, problem: Problem) -> DirectPlan:
        """Return how the direct description is cut."""
        return DirectPlan(
            problem, self.lanes, self.rows, self.keys, self.queries, self.vector, self.strip, "threadIdx.x"
        )

    def alignment(self, problem: Problem) -> int:
        """Return the size of a vector."""
        return self.vector * problem.element_bytes

    def workspace(self, problem: Problem, direction: str) -> Workspace:
        """Return, for a backward, a number for each query, and the strips' parts of the additional keys' gradients."""
        if direction != "backward":
            return Workspace()
        plan = self.plan(problem)
        buffers: list[tuple[int | str, ...]] = [(problem.heads, problem.tokens)]
        if problem.additional_kv:
            parts = (problem.heads_kv, plan.strips, ADDITIONAL)
            buffers += [(*parts, plan.head_dim), (*parts, plan.head_dim_v)]
        if problem.has(RELATIVE_POSITION_BIAS):
            buffers.append((problem.heads, plan.bias_strips, plan.offsets))
        return Workspace(tuple(buffers))
