"""Configs: the choices that a schedule leaves open, as plain data that keys and manifests can hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from na_compiler.problem import Problem
from na_compiler.tensorir.direct_plan import DirectPlan
from na_compiler.tensorir.tiling import Extents, Tiling, TilingPlan
from na_compiler.workspace import ADDITIONAL, Workspace

__all__ = ["Config", "QueriesInLanes", "Simt"]


class Config(ABC):
    """What every schedule's config has: frozen dataclasses, whose `repr` goes into the kernel's key.

    Attributes
    ----------
    module
        The schedule's module, with functions ``schedule_forward(plan, config)`` and ``schedule_backward(plan, config)``
        that return a TensorIR function; it alone may import TVM.
    pipeline
        TVM's lowering pipeline for what they return: ``"s_tir"`` for scheduled blocks, ``"tirx"``.
    passes
        Options of TVM's passes.
    options
        Further options of nvcc.
    """

    module: ClassVar[str]
    pipeline: ClassVar[str] = "s_tir"
    passes: ClassVar[Mapping[str, Any]] = {}
    options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def plan(self, problem: Problem) -> Any:
        """Return what follows from a problem and this config: what the schedule's functions take."""

    @abstractmethod
    def workspace(self, problem: Problem, direction: str) -> Workspace:
        """Return what kernels of this config need beside inputs and outputs."""

    def alignment(self, problem: Problem) -> int:
        """Return the bytes that addresses and strides of query, key, value and the like have to be multiples of."""
        return problem.element_bytes

    def has_adjacent_heads(self, problem: Problem) -> bool:  # noqa: ARG002
        """Return whether the heads of a token have to lie one after another in query, key, value and the like."""
        return False


@dataclass(frozen=True)
class QueriesInLanes(Config):
    """Config of `na_compiler.schedules.queries_in_lanes`.

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

    module = "na_compiler.schedules.queries_in_lanes"

    def plan(self, problem: Problem) -> TilingPlan:
        """Return the extents that the tiling leads to."""
        return TilingPlan.make(problem, self.tiling)

    def workspace(self, problem: Problem, direction: str) -> Workspace:
        """Return the parts of a backward that tasks leave for the gradients of keys and values."""
        if direction == "forward":
            return Workspace()
        plan = self.plan(problem)
        tasks = (problem.heads_kv, *(axis.strips * axis.dilation for axis in plan))
        box = tuple(axis.chunk * axis.chunks for axis in plan)
        widths = (plan.head_dim, plan.head_dim_v)
        buffers: list[tuple[int | str, ...]] = [(*tasks, *box, width) for width in widths]
        if problem.additional_kv:
            buffers += [(*tasks, ADDITIONAL, width) for width in widths]
        return Workspace(tuple(buffers), self.tiling.additional_block)


@dataclass(frozen=True)
class Simt(Config):
    """Config of `na_compiler.schedules.simt`, the schedule for CUDA cores.

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

    module = "na_compiler.schedules.simt"
    # nvcc unrolls, since TVM cannot unroll a sum over lanes; and it finds common subexpressions by itself.
    passes: ClassVar[Mapping[str, Any]] = {
        "tirx.UnrollLoop": {"explicit_unroll": False},
        "tirx.disable_cse_tir": True,
    }

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
        if direction == "forward":
            return Workspace()
        plan = self.plan(problem)
        buffers: list[tuple[int | str, ...]] = [(problem.heads, problem.tokens)]
        if problem.additional_kv:
            parts = (problem.heads_kv, plan.strips, ADDITIONAL)
            buffers += [(*parts, plan.head_dim), (*parts, plan.head_dim_v)]
        return Workspace(tuple(buffers))
