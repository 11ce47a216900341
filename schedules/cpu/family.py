"""The family for CPUs: one query in each vector lane."""

from __future__ import annotations

from collections.abc import Sequence

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.cpu import planner
from na_compiler.schedules.cpu.config import QueriesInLanes
from na_compiler.schedules.cpu.plan import Tiling
from na_compiler.schedules.cpu.visit import visit
from na_compiler.schedules.family import Family, Lowered, without_tangents
from na_compiler.schedules.shared.candidate import Candidate
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.shared.visit import Visit
from na_compiler.target import CpuTarget, Target
from na_compiler.window import BORDERS

__all__ = ["FAMILY"]

# Boxes have the extents they need from the start, and LLVM finds common subexpressions: half of the compile time.
_SKIPPED_PASSES = ("s_tir.CompactBufferAllocation", "tirx.CommonSubexprElim")


class _Cpu(Family):
    name = "cpu"
    operands = frozenset({RELATIVE_POSITION_BIAS, KEY_MASK})
    borders = frozenset(BORDERS)
    configs = (QueriesInLanes, Tiling)

    def is_for(self, target: Target) -> bool:
        """CPUs."""
        return isinstance(target, CpuTarget)

    def refusal(self, problem: Problem, target: Target, direction: str) -> str | None:  # noqa: ARG002
        """Say no but to tangents of further operands: it takes all problems, on every CPU."""
        return without_tangents(problem, direction)

    def refusal_of_open(self, problem: Problem, direction: str) -> str | None:  # noqa: ARG002
        """Say no to borders."""
        return "Open kernels for CPUs take border='shift' only." if problem.has_borders else None

    def choose(self, problem: Problem, target: Target, direction: str) -> QueriesInLanes:
        """Return the tiling that takes least cycles."""
        return planner.choose(problem, _machine(target), direction)

    def choose_steps(self, problem: Problem, target: Target, direction: str) -> QueriesInLanes:
        """Return the tiling of which one tile takes least cycles, with the keys that it needs."""
        return planner.choose_steps(problem, _machine(target), direction)

    def candidates(self, problem: Problem, target: Target, direction: str, count: int) -> tuple[Candidate, ...]:
        """Return the best tilings."""
        return planner.candidates(problem, _machine(target), direction, count)

    def visit(self, problem: Problem, config: Config, token: Sequence[int]) -> Visit:
        """Return the query's tile, and the keys that it visits."""
        assert isinstance(config, QueriesInLanes)
        return visit(config.plan(problem), token)

    def lower(self, problem: Problem, config: Config, direction: str) -> Lowered:
        """Return the scheduled description, for LLVM."""
        from na_compiler.schedules.cpu import pipeline, schedule  # noqa: PLC0415

        assert isinstance(config, QueriesInLanes)
        function = schedule.schedule(config.plan(problem), config, direction)
        return Lowered(function, pipeline.register(), skipped=_SKIPPED_PASSES)


def _machine(target: Target) -> planner.Machine:
    assert isinstance(target, CpuTarget)
    return planner.Machine(target.vector, target.registers)


FAMILY = _Cpu()
