"""The family for CUDA cores, of every GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.family import Family, Lowered, without_tangents
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.shared.visit import Visit
from na_compiler.schedules.simt import planner
from na_compiler.schedules.simt.config import Simt
from na_compiler.schedules.simt.visit import visit
from na_compiler.target import CudaTarget, Target
from na_compiler.window import BORDERS

__all__ = ["FAMILY"]

# nvcc unrolls, since TVM cannot unroll a sum over lanes; and it finds common subexpressions by itself.
_OPTIONS: Mapping[str, Any] = {"tirx.UnrollLoop": {"explicit_unroll": False}, "tirx.disable_cse_tir": True}


class _Simt(Family):
    name = "simt"
    operands = frozenset({RELATIVE_POSITION_BIAS, KEY_MASK})
    borders = frozenset(BORDERS)
    configs = (Simt,)

    def is_for(self, target: Target) -> bool:
        """GPUs."""
        return isinstance(target, CudaTarget)

    def refusal(self, problem: Problem, target: Target, direction: str) -> str | None:  # noqa: ARG002
        """Say no but to tangents of further operands: it takes all problems, on every GPU."""
        return without_tangents(problem, direction)

    def choose(self, problem: Problem, target: Target, direction: str) -> Simt:
        """Return what follows from the problem: each choice has a rule of its own, and none is ranked."""
        assert isinstance(target, CudaTarget)
        return planner.choose(problem, target, direction)

    def contenders(self, problem: Problem, target: Target, direction: str, count: int) -> tuple[Simt, ...]:
        """Return the config of `choose`, and others near it."""
        assert isinstance(target, CudaTarget)
        return planner.contenders(problem, target, direction)[:count]

    def visit(self, problem: Problem, config: Config, token: Sequence[int]) -> Visit:
        """Return the query, alone, and the keys that it visits."""
        assert isinstance(config, Simt)
        return visit(config.plan(problem), token)

    def lower(self, problem: Problem, config: Config, direction: str) -> Lowered:
        """Return the scheduled description, for nvcc."""
        from na_compiler.schedules.simt import schedule  # noqa: PLC0415

        assert isinstance(config, Simt)
        return Lowered(schedule.schedule(config.plan(problem), config, direction), options=_OPTIONS)


FAMILY = _Simt()
