"""`KernelSpec`: one kernel to be had, and the key that it is cached under. Pure Python: no TVM is loaded."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from na_compiler import schedules
from na_compiler.compiler import tuned
from na_compiler.compiler.toolkit import nvcc_version
from na_compiler.operands import check_direction
from na_compiler.problem import Problem
from na_compiler.runtime.kernel import ABI, KernelInfo
from na_compiler.schedules.choose import Choice, choose, choose_rounded, choose_steps, recorded
from na_compiler.schedules.shared.config import Config
from na_compiler.target import Target

__all__ = ["KernelSpec"]

_LOG = logging.getLogger("na_compiler")


@dataclass(frozen=True)
class KernelSpec:
    """A problem, a direction and a target; equal ones are equal, and have one key.

    To name a kernel, and to find it compiled, takes no plan: which family and which config it gets follows from the
    three, and is found out when something asks for it.

    Parameters
    ----------
    problem
        What to compute.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    target
        What machine to compile for.
    forced
        A config to use in place of the planner's; default: the planner's.
    tuned
        What was recorded as fastest, a family's name and the text of its config: see `na_compiler.tune`. `make` looks
        it up. It takes the planner's place as long as this version would time it.

    Examples
    --------
    >>> spec = KernelSpec.make(Problem((56, 56), heads=4, head_dim=32, kernel_size=7), "llvm:x86-64-v3")
    >>> spec.config.family, len(spec.key)
    ('cpu', 32)
    """

    problem: Problem
    direction: str
    target: Target
    forced: Config | None = None
    tuned: tuple[str, str] | None = None

    @classmethod
    def make(
        cls, problem: Problem, target: str | Target = "llvm", direction: str = "forward", *, rounds: bool = False
    ) -> KernelSpec:
        """Make a spec of a target's name, with what was recorded for it on this machine's device, if anything was.

        Parameters
        ----------
        problem, target, direction
            Which kernel.
        rounds
            Whether products of float32 may round to TF32, where there is a kernel that does; see `rounded`.

        Raises
        ------
        ValueError
            For an unknown target or direction.
        """
        check_direction(direction)
        parsed = Target.parse(target)
        found = cls.rounded(problem, parsed, direction) if rounds else None
        if found is not None:
            return found
        record = tuned.find(problem, parsed, direction)
        return cls(problem, direction, parsed, tuned=None if record is None else record.choice)

    @classmethod
    def rounded(cls, problem: Problem, target: Target, direction: str) -> KernelSpec | None:
        """Return the spec of a kernel whose products round float32 to TF32; ``None`` if there is no such kernel.

        That it rounds follows from its config, which is part of its key.
        """
        config = choose_rounded(problem, target, direction)
        return None if config is None else cls(problem, direction, target, config)

    @classmethod
    def of_steps(cls, problem: Problem, target: Target, direction: str) -> KernelSpec:
        """Return the spec of the kernel for calls of a few queries, with an open layout.

        Raises
        ------
        NotImplementedError
            If no family takes the problem; says why.
        """
        config = choose_steps(problem, target, direction)
        return cls.make(problem, target, direction) if config is None else cls(problem, direction, target, config)

    @functools.cached_property
    def _choice(self) -> Choice:
        if self.forced:
            return Choice(self.forced)
        found = self._found_by_tuning
        return choose(self.problem, self.target, self.direction) if found is None else Choice(found)

    @functools.cached_property
    def _found_by_tuning(self) -> Config | None:
        if self.tuned is None or self.forced:
            return None
        try:
            return recorded(self.problem, self.target, self.direction, *self.tuned)
        except ValueError as error:
            _LOG.warning("what was tuned for %s is passed over: %s; na-compile tune makes it anew", self, error)
            return None

    @property
    def is_tuned(self) -> bool:
        """Whether the config was found by tuning."""
        return self._found_by_tuning is not None

    @functools.cached_property
    def rounds(self) -> bool:
        """Whether products of float32 round to TF32."""
        found = self.forced and choose_rounded(self.problem, self.target, self.direction)
        return found is not None and found == self.forced

    @property
    def config(self) -> Config:
        """What the family leaves open: the planner's choices, unless others are forced, or were found by tuning.

        Raises
        ------
        NotImplementedError
            If no family takes the problem; says why.
        """
        return self._choice.config

    @property
    def reason(self) -> str | None:
        """Why no faster family was chosen, in a sentence; ``None`` where this is the fastest."""
        return self._choice.reason

    @property
    def plan(self) -> object:
        """What follows from the problem and the config: what the schedule is made of."""
        return self.config.plan(self.problem)

    @functools.cached_property
    def key(self) -> str:
        """A name for what the compiler makes of the spec: changes with everything that changes the machine code.

        A config that the planner chooses is no part of it: that follows from the rest, the planner's sources included.
        One that was found by tuning is, as it was written, without a look at whether it is used: that follows as well.
        """
        parts = {
            "abi": ABI,
            "problem": self.problem.to_dict(),
            "direction": self.direction,
            "target": self.target.name,
            "config": self.forced and repr(self.forced),
            "sources": source_fingerprint(),
            "tvm": tvm_version(),
            **({"tuned": self.tuned} if self.tuned else {}),
            **({"nvcc": nvcc_version()} if self.target.device_type == "cuda" else {}),
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

    def describe(self) -> dict[str, Any]:
        """Return what the cache's manifest says of the kernel, as plain data, fit for JSON."""
        chosen = {"family": self.config.family, "config": repr(self.config), "reason": self.reason}
        return {**self.info.to_dict(), **chosen}

    def __str__(self) -> str:
        return f"{self.problem} {self.direction} for {self.target}"


@functools.cache
def source_fingerprint() -> str:
    """Return a hash of the sources that decide what code is generated: families, all they import, what compiles."""
    package = Path(__file__).parent.parent
    families = Path(schedules.__file__).parent
    modules = ("borders", "checks", "counting", "operands", "parameters", "problem", "target", "window", "workspace")
    named = (*(f"{name}.py" for name in modules), "compiler/build.py", "compiler/nvcc.py")
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
