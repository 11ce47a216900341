"""`KernelSpec`: one kernel to be had, and the key that it is cached under. Pure Python: no TVM is loaded."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from na_compiler.problem import Problem
from na_compiler.runtime.kernel import DIRECTIONS, KernelInfo, Workspace
from na_compiler.schedules import planner
from na_compiler.target import Target
from na_compiler.tensorir.tiling import TilingPlan

__all__ = ["KernelSpec"]

# Changed whenever the compiled functions' arguments do.
_ABI = 1


@dataclass(frozen=True)
class KernelSpec:
    """A problem, a direction, a target and a config.

    Parameters
    ----------
    problem
        What to compute.
    direction
        ``"forward"`` or ``"backward"``.
    target
        What machine to compile for.
    config
        The schedule's choices; `make` asks the planner for them.
    """

    problem: Problem
    direction: str
    target: Target
    config: Any

    @classmethod
    def make(cls, problem: Problem, target: str | Target = "llvm", direction: str = "forward") -> KernelSpec:
        """Complete a spec with the planner's config.

        Raises
        ------
        ValueError
            For an unknown target or direction.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be 'forward' or 'backward', got {direction!r}")
        parsed = Target.parse(target)
        machine = planner.Machine(parsed.vector, parsed.registers)
        return cls(problem, direction, parsed, planner.choose(problem, machine, direction))

    @property
    def plan(self) -> TilingPlan:
        """The extents that the config leads to."""
        return TilingPlan.make(self.problem, self.config.tiling)

    @property
    def key(self) -> str:
        """A name for what the compiler makes of the spec: changes with everything that changes the machine code."""
        parts = {
            "abi": _ABI,
            "problem": self.problem.to_dict(),
            "direction": self.direction,
            "target": self.target.name,
            "config": repr(self.config),
            "sources": source_fingerprint(),
            "tvm": tvm_version(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def info(self) -> KernelInfo:
        """What goes into the manifest."""
        workspace = None
        if self.direction == "backward":
            plan = self.plan
            tasks = (self.problem.heads_kv, *(axis.strips * axis.dilation for axis in plan))
            box = tuple(axis.chunk * axis.chunks for axis in plan)
            workspace = Workspace(
                keys=(*tasks, *box, plan.head_dim),
                values=(*tasks, *box, plan.head_dim_v),
                tasks=tasks,
                additional_block=plan.tiling.additional_block,
                widths=(plan.head_dim, plan.head_dim_v),
            )
        return KernelInfo(self.problem, self.direction, self.target.name, workspace)

    def __str__(self) -> str:
        return f"{self.problem} {self.direction} for {self.target}"


@functools.cache
def source_fingerprint() -> str:
    """Return a hash of the sources that decide what code is generated."""
    package = Path(__file__).parent.parent
    folders = [package / "tensorir", Path(planner.__file__).parent]
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    files += [package / "window.py", package / "compiler" / "build.py", package / "target.py"]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def tvm_version() -> str:
    """Return the version of the installed compiler, without loading it; ``"none"`` where there is none."""
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return "none"
