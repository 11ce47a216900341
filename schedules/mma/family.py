"""The family for the tensor cores of single warps."""

from __future__ import annotations

from collections.abc import Sequence

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.problem import Problem
from na_compiler.schedules.family import Family, Lowered
from na_compiler.schedules.mma import planner
from na_compiler.schedules.mma.backward import planner as backward_planner
from na_compiler.schedules.mma.backward.config import MmaBackward
from na_compiler.schedules.mma.backward.sweep_config import Sweep
from na_compiler.schedules.mma.config import Mma
from na_compiler.schedules.mma.visit import visit, visit_listed
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.shared.visit import Visit
from na_compiler.target import CudaTarget, Target
from na_compiler.window import BORDERS, SHIFT

__all__ = ["FAMILY"]

# The first with products of bfloat16, and with asynchronous copies.
_OLDEST = (8, 0)


class _Mma(Family):
    name = "mma"
    has_tensor_cores = True
    operands = frozenset({RELATIVE_POSITION_BIAS, KEY_MASK})
    borders = frozenset(BORDERS)
    configs = (Mma, MmaBackward, Sweep)

    def is_for(self, target: Target) -> bool:
        """GPUs from sm_80 on."""
        return isinstance(target, CudaTarget) and target.capability >= _OLDEST

    def refusal(self, problem: Problem, target: Target, direction: str) -> str | None:
        """Return in a sentence why the family does not take a problem; ``None`` if it does."""
        reason = "has no tangents" if direction == "tangent" else planner.unsuited(problem)
        if reason is None and direction == "backward":
            reason = backward_planner.unsuited(problem)
        if reason is None and not self.candidates(problem, target, direction, 1):
            reason = f"has no boxes for {problem}"
        return reason and f"The schedule for tensor cores of single warps {reason}."

    def choose(self, problem: Problem, target: Target, direction: str) -> Mma | MmaBackward:
        """Return the boxes that take least time."""
        config = self.candidates(problem, target, direction, 1)[0].config
        assert isinstance(config, Mma | MmaBackward)
        return config

    def rounded(self, problem: Problem, target: Target, direction: str) -> Mma | None:
        """Return the boxes that take least time with products that round float32 to TF32; ``None`` if it has none."""
        if problem.dtype != "float32" or direction != "forward" or planner.unsuited_rounded(problem):
            return None
        if any(border != SHIFT for border in problem.border):
            return None  # Such kernels were not tried with rounded products.
        assert isinstance(target, CudaTarget)
        found = planner.candidates(problem, target.shared_memory, 1)
        return found[0].config if found else None

    def candidates(
        self, problem: Problem, target: Target, direction: str, count: int
    ) -> tuple[planner.Candidate | backward_planner.Candidate, ...]:
        """Return the best boxes."""
        assert isinstance(target, CudaTarget)
        if direction == "backward":
            return backward_planner.candidates(problem, target.shared_memory, count)
        return planner.candidates(problem, target.shared_memory, count)

    def visit(self, problem: Problem, config: Config, token: Sequence[int]) -> Visit:
        """Return the query's warp, and the keys that it visits."""
        if isinstance(config, MmaBackward):
            return visit_listed(config.plan(problem).sweeps[0], token)
        assert isinstance(config, Mma)
        return visit(config.plan(problem), token)

    def estimate(self, problem: Problem, target: Target, direction: str) -> float | None:
        """Return the best candidate's time among many batch entries, in microseconds."""
        return self.candidates(problem, target, direction, 1)[0].microseconds

    def lower(self, problem: Problem, config: Config, direction: str) -> Lowered:
        """Return the kernel, for nvcc."""
        if direction == "backward":
            from na_compiler.schedules.mma.backward.kernel import schedule_backward  # noqa: PLC0415

            assert isinstance(config, MmaBackward)
            function = schedule_backward(config.plan(problem))
        else:
            from na_compiler.schedules.mma.kernel import schedule_forward  # noqa: PLC0415

            assert isinstance(config, Mma)
            function = schedule_forward(config.plan(problem))
        return Lowered(function, "tirx", nvcc=("--use_fast_math",))


FAMILY = _Mma()
