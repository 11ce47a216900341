"""Config of the schedule for CPUs."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.operands import RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.cpu.plan import Tiling, TilingPlan
from na_compiler.schedules.shared.config import Config
from na_compiler.tensorir.axes import AXES
from na_compiler.workspace import ADDITIONAL, Workspace, parts_of

__all__ = ["QueriesInLanes"]


@dataclass(frozen=True)
class QueriesInLanes(Config):
    """Config of `na_compiler.schedules.cpu.schedule`.

    Parameters
    ----------
    tiling
        How the problem is cut; its ``vector`` is the vector width.
    accumulators
        Vectors accumulated at once in the weighted sums and in the gradients of keys and values.
    row_block
        Keys of the last axis that the weighted sums of all patches visit before the next ones, so that they stay in
        the innermost cache; ``None`` for all.
    """

    tiling: Tiling
    accumulators: int
    row_block: int | None = None

    family = "cpu"

    def plan(self, problem: Problem) -> TilingPlan:
        """Return the extents that the tiling leads to."""
        return TilingPlan.make(problem, self.tiling)

    def workspace(self, problem: Problem, direction: str) -> Workspace:
        """Return the parts of a backward that tasks leave for the gradients of keys and values, and of the bias."""
        if direction != "backward":
            return Workspace()
        plan = self.plan(problem)
        tasks = (problem.heads_kv, *(extent for i in range(AXES) for extent in _strips(plan, i)))
        box = tuple(axis.chunk * axis.chunks for axis in plan)
        widths = (plan.head_dim, plan.head_dim_v)
        buffers: list[tuple[int | str, ...]] = [(*tasks, *box, width) for width in widths]
        if problem.additional_kv:
            buffers += [(*tasks, ADDITIONAL, width) for width in widths]
        if problem.has(RELATIVE_POSITION_BIAS):
            buffers.append((*tasks, problem.group_size, *(2 * axis.kernel_size - 1 for axis in plan)))
        return Workspace(tuple(buffers), self.tiling.additional_block)

    def visited_pairs(self, problem: Problem) -> int:
        """Return how many pairs of query and key one head of one batch entry computes, at most."""
        return self.plan(problem).visited_pairs()


def _strips(plan: TilingPlan, number: int) -> tuple[int | str, ...]:
    """Return the iterations of the parallel loop along an axis; of an open one, dilation groups and strips of each."""
    axis = plan.axes[number]
    if not axis.is_open:
        return (axis.strips * axis.dilation,)
    strips = parts_of(f"queries{number - (AXES - plan.problem.rank)}", axis.dilation * axis.strip)
    return (strips,) if axis.dilation == 1 else (axis.dilation, strips)
