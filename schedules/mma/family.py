"""The family for the tensor cores of single warps."""

from __future__ import annotations

from collections.abc import Sequence

from na_compiler.operands import RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.family import Family, Lowered
from na_compiler.schedules.mma import planner
from na_compiler.schedules.mma.config import Mma
from na_compiler.schedules.mma.visit import visit
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.shared.visit import Visit
from na_compiler.target import CudaTarget, Target

__all__ = ["FAMILY"]

# The first with products of bfloat16, and with asynchronous copies.
_OLDEST = (8, 0)


class _Mma(Family):
    name = "mma"
    operands = frozenset({RELATIVE_POSITION_BIAS})

    def is_for(self, target: Target) -> bool:
        """GPUs from sm_80 on."""
        return isinstance(target, CudaTarget) and target.capability >= _OLDEST

    def refusal(self, problem: Problem, target: Target, direction: str) -> str | None:
        """Return in a sentence why the family does not take a problem; ``None`` if it does."""
        assert isinstance(target, CudaTarget)
        if direction == "backward" and problem.has(RELATIVE_POSITION_BIAS):
            return "The schedule for tensor cores of single warps takes relative_position_bias in the forward only."
        return planner.refusal(problem, target, direction)

    def choose(self, problem: Problem, target: Target, direction: str) -> Mma:  # noqa: ARG002
        """Return the boxes that take least time."""
        assert isinstance(target, CudaTarget)
        return planner.candidates(problem, target.shared_memory)[0].config

    def candidates(
        self,
        problem: Problem,
        target: Target,
        direction: str,  # noqa: ARG002
        count: int,
    ) -> tuple[planner.Candidate, ...]:
        """Return the best boxes."""
        assert isinstance(target, CudaTarget)
        return planner.candidates(problem, target.shared_memory, count)

    def visit(self, problem: Problem, config: Config, token: Sequence[int]) -> Visit:
        """Return the query's warp, and the keys that it visits."""
        assert isinstance(config, Mma)
        return visit(config.plan(problem), token)

    def estimate(self, problem: Problem, target: Target, direction: str) -> float | None:  # noqa: ARG002
        """Return the best candidate's time among many batch entries, in microseconds."""
        assert isinstance(target, CudaTarget)
        return planner.candidates(problem, target.shared_memory, 1)[0].microseconds

    def lower(self, problem: Problem, config: Config, direction: str) -> Lowered:
        """Return the kernel, for nvcc."""
        from na_compiler.schedules.mma import kernel  # noqa: PLC0415

        assert isinstance(config, Mma)
        assert direction == "forward"
        return Lowered(kernel.schedule_forward(config.plan(problem)), "tirx", nvcc=("--use_fast_math",))


FAMILY = _Mma()
