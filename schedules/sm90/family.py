"""The family for Hopper's tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

from na_compiler.problem import Problem
from na_compiler.schedules.family import Family, Lowered
from na_compiler.schedules.shared.candidate import Candidate
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.shared.visit import Visit
from na_compiler.schedules.sm90 import planner
from na_compiler.schedules.sm90.backward import planner as backward_planner
from na_compiler.schedules.sm90.backward.config import Sm90Backward, Sweep
from na_compiler.schedules.sm90.backward.fused import planner as fused_planner
from na_compiler.schedules.sm90.backward.fused.config import Sm90Fused
from na_compiler.schedules.sm90.config import Sm90
from na_compiler.schedules.sm90.visit import visit
from na_compiler.target import CudaTarget, Target

__all__ = ["FAMILY"]

# The instructions are those of this architecture alone.
_ARCHITECTURE = "sm_90a"


class _Sm90(Family):
    name = "sm90"
    has_tensor_cores = True
    configs = (Sm90, Sm90Backward, Sm90Fused, Sweep)

    def is_for(self, target: Target) -> bool:
        """Hopper."""
        return isinstance(target, CudaTarget) and target.architecture == _ARCHITECTURE

    def refusal(self, problem: Problem, target: Target, direction: str) -> str | None:  # noqa: ARG002
        """Return in a sentence why the family does not take a problem; ``None`` if it does."""
        return planner.refusal(problem, direction)

    def choose(self, problem: Problem, target: Target, direction: str) -> Sm90 | Sm90Backward | Sm90Fused:
        """Return the tiles that take least cycles."""
        config = self.candidates(problem, target, direction, 1)[0].config
        assert isinstance(config, Sm90 | Sm90Backward | Sm90Fused)
        return config

    def candidates(
        self,
        problem: Problem,
        target: Target,  # noqa: ARG002
        direction: str,
        count: int,
    ) -> tuple[Candidate, ...]:
        """Return the best tiles, of the backward in both of its forms."""
        if direction == "backward":
            found = (*fused_planner.candidates(problem), *backward_planner.candidates(problem, count))
            return tuple(sorted(found, key=lambda candidate: candidate.cycles)[:count])
        return planner.candidates(problem, count)

    def visit(self, problem: Problem, config: Config, token: Sequence[int]) -> Visit | None:
        """Return the query's warpgroup, and the keys that it visits; in one sweep over keys no query has any."""
        if isinstance(config, Sm90Fused):
            return None
        if isinstance(config, Sm90Backward):
            return visit(config.plan(problem).sweeps[0], token)
        assert isinstance(config, Sm90)
        return visit(config.plan(problem), token)

    def estimate(self, problem: Problem, target: Target, direction: str) -> float | None:
        """Return the chosen candidate's time among many batch entries, in microseconds."""
        best = self.candidates(problem, target, direction, 1)[0]
        assert isinstance(best, planner.Candidate | backward_planner.BackwardCandidate | fused_planner.FusedCandidate)
        return best.microseconds

    def lower(self, problem: Problem, config: Config, direction: str) -> Lowered:
        """Return the kernel, for nvcc."""
        if direction == "backward":
            from na_compiler.schedules.sm90.backward.fused.kernel import schedule_fused  # noqa: PLC0415
            from na_compiler.schedules.sm90.backward.kernel import schedule_backward  # noqa: PLC0415

            assert isinstance(config, Sm90Backward | Sm90Fused)
            if isinstance(config, Sm90Fused):
                function = schedule_fused(config.plan(problem))
            else:
                function = schedule_backward(config.plan(problem))
        else:
            from na_compiler.schedules.sm90.kernel import schedule_forward  # noqa: PLC0415

            assert isinstance(config, Sm90)
            function = schedule_forward(config.plan(problem), config)
        return Lowered(function, "tirx", nvcc=("--use_fast_math",))


FAMILY = _Sm90()
