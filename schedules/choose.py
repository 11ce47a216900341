"""Chooses a schedule and its config for a problem on a target. Pure Python: no TVM is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from na_compiler.problem import Problem
from na_compiler.schedules.cpu import planner
from na_compiler.schedules.shared.candidate import Candidate
from na_compiler.schedules.shared.config import Config
from na_compiler.schedules.simt import planner as simt_planner
from na_compiler.schedules.sm90 import planner as sm90_planner
from na_compiler.target import CpuTarget, CudaTarget, Target

__all__ = ["Choice", "candidates", "choose"]

# The families of schedules for CUDA, the fastest first. Each has ``choose(problem, target, direction)``, which returns
# a config, or in a sentence why it does not take the problem, and ``candidates(problem, count)``. The last one takes
# everything.
_CUDA = (sm90_planner, simt_planner)


@dataclass(frozen=True)
class Choice:
    """A config, and why it is not one of a faster schedule.

    Parameters
    ----------
    config
        Of the schedule that was chosen.
    reason
        Why no faster one was, in a sentence; ``None`` where this is the fastest.
    """

    config: Config
    reason: str | None = None


def choose(problem: Problem, target: Target, direction: str) -> Choice:
    """Return the config to compile a problem with.

    Parameters
    ----------
    problem
        What to compute.
    target
        What to compile for.
    direction
        ``"forward"`` or ``"backward"``.
    """
    if isinstance(target, CpuTarget):
        return Choice(planner.choose(problem, _machine(target), direction))
    assert isinstance(target, CudaTarget)
    reasons: list[str] = []
    for family in _CUDA:
        found = family.choose(problem, target, direction)
        if isinstance(found, Config):
            return Choice(found, " ".join(reasons) or None)
        reasons.append(found)
    raise NotImplementedError(f"no schedule takes {problem} {direction} on {target}: {' '.join(reasons)}")


def candidates(problem: Problem, target: Target, direction: str, count: int = 8) -> tuple[Candidate, ...]:
    """Return what `choose` chose from, the best first; nothing where a schedule has no choices to rank.

    Parameters
    ----------
    problem
        What to compute.
    target
        What to compile for.
    direction
        ``"forward"`` or ``"backward"``.
    count
        How many at most.
    """
    if isinstance(target, CpuTarget):
        return planner.candidates(problem, _machine(target), direction, count)
    assert isinstance(target, CudaTarget)
    family = next(family for family in _CUDA if isinstance(family.choose(problem, target, direction), Config))
    return tuple(family.candidates(problem, count))


def _machine(target: CpuTarget) -> planner.Machine:
    return planner.Machine(target.vector, target.registers)
