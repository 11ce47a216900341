"""`Target`: which machine a kernel is for, named by one string everywhere."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Target"]

# What each level of the x86-64 psABI adds, as Linux names the features.
_X86_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("x86-64-v2", {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
)
# Instruction set: float32 lanes of a vector, vector registers.
_VECTORS = {"x86-64": (4, 16), "x86-64-v2": (4, 16), "x86-64-v3": (8, 16), "x86-64-v4": (16, 32), "aarch64": (4, 32)}
_MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Target:
    """A machine to compile for. Use `Target.parse`.

    How many cores it has is no part of it: work is cut by the problem alone, so that results do not depend on it.

    Parameters
    ----------
    instruction_set
        ``"x86-64"``, ``"x86-64-v2"``, ``"x86-64-v3"`` (AVX2), ``"x86-64-v4"`` (AVX-512) or ``"aarch64"``.
    """

    instruction_set: str

    @classmethod
    def parse(cls, name: str | Target) -> Target:
        """Make a target of its name.

        Parameters
        ----------
        name
            ``"llvm"`` is this machine, with the features that the operating system reports; ``"llvm:x86-64-v3"`` and
            the like name an instruction set.

        Raises
        ------
        ValueError
            For another name.

        Examples
        --------
        >>> Target.parse("llvm:x86-64-v3").vector
        8
        """
        if isinstance(name, Target):
            return name
        kind, _, instruction_set = str(name).partition(":")
        if kind == "llvm" and not instruction_set:
            return cls(_host_instruction_set())
        if kind == "llvm" and instruction_set in _VECTORS:
            return cls(instruction_set)
        known = ", ".join(f"llvm:{instruction_set}" for instruction_set in _VECTORS)
        raise ValueError(f"target must be llvm (this machine) or one of {known}, got {name!r}")

    @property
    def name(self) -> str:
        """The string that `parse` makes this target of."""
        return f"llvm:{self.instruction_set}"

    @property
    def vector(self) -> int:
        """float32 lanes of a vector."""
        return _VECTORS[self.instruction_set][0]

    @property
    def registers(self) -> int:
        """Vector registers."""
        return _VECTORS[self.instruction_set][1]

    @property
    def is_native(self) -> bool:
        """Whether this machine has the architecture, so that libraries for it can be linked here."""
        return _machine() == self.instruction_set.partition("-v")[0]

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run kernels for the target."""
        return self.is_native and self in map(Target, _runnable(_host_instruction_set()))

    def to_tvm(self) -> dict[str, Any]:
        """Return TVM's description of the target."""
        # The kernels are vectorised by the schedule. What LLVM's own pass finds besides are addresses, which then
        # have to be taken out of vectors again: 5% slower.
        options = ["-vectorize-slp:bool=false"]
        if self.instruction_set == "aarch64":
            return {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"], "cl-opt": options}
        return {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.instruction_set, "cl-opt": options}

    def __str__(self) -> str:
        return self.name


def _machine() -> str:
    return _MACHINES.get(platform.machine().lower(), platform.machine())


@functools.cache
def _host_instruction_set() -> str:
    machine = _machine()
    if machine not in _VECTORS:
        raise ValueError(f"no target for this machine's architecture, {machine}; known are {', '.join(_VECTORS)}")
    if machine != "x86-64":
        return machine
    features = _cpu_features()
    missing: set[str] = set()
    best = machine
    for level, adds in reversed(_X86_LEVELS):
        missing |= adds - features
        if not missing:
            best = level
    return best


def _cpu_features() -> set[str]:
    """Return the features that the operating system lets programs use: of a CPU's own list it may have hidden some."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _runnable(instruction_set: str) -> list[str]:
    names = ["x86-64", *(level for level, _ in reversed(_X86_LEVELS))]
    return names[: names.index(instruction_set) + 1] if instruction_set in names else [instruction_set]
