"""Chooses a config of the schedule for CUDA cores. Pure Python: no TVM is loaded."""

from __future__ import annotations

from na_compiler.problem import Problem
from na_compiler.schedules.config import Config
from na_compiler.target import CudaTarget

__all__ = ["choose"]


def choose(problem: Problem, target: CudaTarget, direction: str) -> Config | str:
    """Return the config to compile a problem with."""
    return f"The schedule for CUDA cores is not there yet ({problem} {direction} {target})."
