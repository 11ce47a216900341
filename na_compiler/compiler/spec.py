"""`KernelSpec`: one kernel to be had, and the key that it is cached under. Pure Python: no TVM is loaded."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from na_compiler import schedules
from na_compiler.problem import Problem
from na_compiler.runtime.kernel import ABI, DIRECTIONS, KernelInfo
from na_compiler.schedules.choose import choose
from na_compiler.schedules.shared.config import Config
from na_compiler.target import Target

__all__ = ["KernelSpec"]


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
    reason
        Why no faster schedule was chosen, in a sentence; ``None`` where this is the fastest.
    """

    problem: Problem
    direction: str
    target: Target
    config: Config
    reason: str | None = field(default=None, compare=False)

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
        choice = choose(problem, parsed, direction)
        return cls(problem, direction, parsed, choice.config, choice.reason)

    @property
    def plan(self) -> Any:
        """What follows from the problem and the config: what the schedule is made of."""
        return self.config.plan(self.problem)

    @property
    def key(self) -> str:
        """A name for what the compiler makes of the spec: changes with everything that changes the machine code."""
        parts = {
            "abi": ABI,
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
        workspace = self.config.workspace(self.problem, self.direction)
        info = KernelInfo(self.problem, self.direction, self.target.name, workspace)
        if self.target.device_type == "cpu":
            return info
        return replace(
            info,
            alignment=self.config.alignment(self.problem),
            adjacent_heads=self.config.has_adjacent_heads(self.problem),
        )

    def __str__(self) -> str:
        return f"{self.problem} {self.direction} for {self.target}"


@functools.cache
def source_fingerprint() -> str:
    """Return a hash of the sources that decide what code is generated."""
    package = Path(__file__).parent.parent
    families = Path(schedules.__file__).parent
    named = ("window.py", "compiler/build.py", "compiler/cuda_worker.py")
    files = [(path.relative_to(families), path) for path in sorted(families.rglob("*.py"))]
    files += [(path.relative_to(package), path) for path in sorted((package / "tensorir").glob("*.py"))]
    files += [(path.relative_to(package), path) for path in sorted((package / "devices").glob("*.py"))]
    files += [(Path(name), package / name) for name in named]
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def tvm_version() -> str:
    """Return the version of the installed compiler, without loading it; ``"none"`` where there is none."""
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return "none"
