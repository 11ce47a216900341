"""`Target`: which machine a kernel is for, named by one string everywhere."""

from __future__ import annotations

import functools
import platform
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from na_compiler.runtime import devices

__all__ = ["CpuTarget", "CudaTarget", "Target"]

# What each level of the x86-64 psABI adds, as Linux names the features.
_X86_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("x86-64-v2", {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
)
# Instruction set: float32 lanes of a vector, vector registers.
_VECTORS = {"x86-64": (4, 16), "x86-64-v2": (4, 16), "x86-64-v3": (8, 16), "x86-64-v4": (16, 32), "aarch64": (4, 32)}
_MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}

# Compute capability: bytes of shared memory that one thread block may have (CUDA C++ Programming Guide, technical
# specifications per compute capability).
_SHARED_MEMORY = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    88: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    110: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}
_OLDEST = min(_SHARED_MEMORY)
_ARCHITECTURE = re.compile(r"sm_(\d+)([af]?)")


class Target(ABC):
    """A machine to compile for. Make one with `Target.parse`; targets are hashable, and equal by name."""

    @staticmethod
    def parse(name: str | Target) -> Target:
        """Make a target of its name.

        Parameters
        ----------
        name
            ``"llvm"`` is this machine's CPU, with the features that the operating system reports; ``"llvm:x86-64-v3"``
            and the like name an instruction set. ``"cuda"`` is the GPU present; ``"cuda:sm_90a"`` and the like name a
            GPU architecture, from ``sm_75`` on.

        Raises
        ------
        ValueError
            For another name, and for ``"cuda"`` where there is no GPU.

        Examples
        --------
        >>> Target.parse("llvm:x86-64-v3").vector
        8
        >>> Target.parse("cuda:sm_90a").capability
        (9, 0)
        """
        if isinstance(name, Target):
            return name
        kind, _, architecture = str(name).partition(":")
        if kind == "llvm":
            return CpuTarget.of(architecture)
        if kind == "cuda":
            return CudaTarget.of(architecture)
        raise ValueError(
            f"target must be llvm (this machine), llvm:INSTRUCTION_SET, cuda (the GPU present) or cuda:ARCHITECTURE, "
            f"e.g. llvm:x86-64-v3 or cuda:sm_90a; got {name!r}"
        )

    # "cpu" or "cuda": the type that torch gives to devices of this kind.
    device_type: str

    @property
    @abstractmethod
    def name(self) -> str:
        """The string that `parse` makes this target of."""

    @property
    @abstractmethod
    def order(self) -> tuple[int, ...]:
        """Of the targets whose kernels a machine runs, the one with the highest order is the best."""

    @property
    @abstractmethod
    def runs_here(self) -> bool:
        """Whether this machine can run kernels for the target."""

    @abstractmethod
    def runs_on(self, machine: Target) -> bool:
        """Return whether the machine that a target names can run kernels for this one."""

    @abstractmethod
    def to_tvm(self) -> dict[str, Any]:
        """Return TVM's description of the target."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CpuTarget(Target):
    """A CPU.

    How many cores it has is no part of it: work is cut by the problem alone, so that results do not depend on it.

    Parameters
    ----------
    instruction_set
        ``"x86-64"``, ``"x86-64-v2"``, ``"x86-64-v3"`` (AVX2), ``"x86-64-v4"`` (AVX-512) or ``"aarch64"``.
    """

    instruction_set: str
    device_type = "cpu"

    @classmethod
    def of(cls, instruction_set: str) -> CpuTarget:
        """Make the target of an instruction set; of this machine's, if it is empty."""
        if not instruction_set:
            return cls(_host_instruction_set())
        if instruction_set in _VECTORS:
            return cls(instruction_set)
        known = ", ".join(f"llvm:{known}" for known in _VECTORS)
        raise ValueError(f"target must be llvm (this machine) or one of {known}, got 'llvm:{instruction_set}'")

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
    def triple(self) -> str:
        """Name of the machine as compilers spell it."""
        return f"{'aarch64' if self.instruction_set == 'aarch64' else 'x86_64'}-linux-gnu"

    @property
    def order(self) -> tuple[int, ...]:
        """The widest vector is best, then the latest instruction set."""
        return self.vector, list(_VECTORS).index(self.instruction_set)

    @property
    def is_native(self) -> bool:
        """Whether this machine has the architecture, so that libraries for it can be linked here."""
        return _machine() == self.instruction_set.partition("-v")[0]

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run kernels for the target."""
        return _machine() in _VECTORS and self.runs_on(CpuTarget(_host_instruction_set()))

    def runs_on(self, machine: Target) -> bool:
        """Return whether the machine that a target names can run kernels for this one."""
        return isinstance(machine, CpuTarget) and self.instruction_set in _runnable(machine.instruction_set)

    def to_tvm(self) -> dict[str, Any]:
        """Return TVM's description of the target."""
        # The kernels are vectorised by the schedule. What LLVM's own pass finds besides are addresses, which then
        # have to be taken out of vectors again: 5% slower.
        options = ["-vectorize-slp:bool=false"]
        if self.instruction_set == "aarch64":
            return {"kind": "llvm", "mtriple": self.triple, "mattr": ["+neon"], "cl-opt": options}
        return {"kind": "llvm", "mtriple": self.triple, "mcpu": self.instruction_set, "cl-opt": options}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CudaTarget(Target):
    """A GPU of NVIDIA's.

    Parameters
    ----------
    architecture
        As nvcc names it: ``"sm_80"``, ``"sm_90a"``. The ``a`` stands for instructions that only this architecture has;
        code for it runs on no other.
    """

    architecture: str
    device_type = "cuda"

    @classmethod
    def of(cls, architecture: str) -> CudaTarget:
        """Make the target of an architecture; of the GPU present, if it is empty."""
        if not architecture:
            capability = devices.cuda_capability()
            if capability is None:
                raise ValueError("target cuda is the GPU present, and there is none; name one, e.g. cuda:sm_90a")
            return cls.of_capability(capability)
        match = _ARCHITECTURE.fullmatch(architecture)
        if match and int(match[1]) < _OLDEST:
            raise ValueError(
                f"target cuda:{architecture} is too old: CUDA 13 compiles for sm_{_OLDEST} and later, "
                f"e.g. cuda:sm_{_OLDEST}"
            )
        if not match or int(match[1]) not in _SHARED_MEMORY or (match[2] and int(match[1]) < 90):
            known = ", ".join(f"cuda:sm_{number}" for number in _SHARED_MEMORY)
            raise ValueError(
                f"target must be cuda (the GPU present), one of {known}, or, from sm_90 on, one of these with an a "
                f"for instructions of its own, e.g. cuda:sm_90a; got 'cuda:{architecture}'"
            )
        return cls(architecture)

    @classmethod
    def of_capability(cls, capability: tuple[int, int]) -> CudaTarget:
        """Make the target that makes most of a GPU of a compute capability.

        Raises
        ------
        ValueError
            For one that CUDA 13 does not compile for.
        """
        major, minor = capability
        return cls.of(f"sm_{major}{minor}" + ("a" if capability == (9, 0) else ""))

    @property
    def name(self) -> str:
        """The string that `parse` makes this target of."""
        return f"cuda:{self.architecture}"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, e.g. ``(9, 0)``."""
        number = int(_ARCHITECTURE.fullmatch(self.architecture)[1])  # type: ignore[index]
        return number // 10, number % 10

    @property
    def is_specific(self) -> bool:
        """Whether the code may have instructions of this architecture alone, and runs on no other."""
        return not self.architecture[-1].isdigit()

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a thread block may have."""
        major, minor = self.capability
        return _SHARED_MEMORY[10 * major + minor]

    @property
    def order(self) -> tuple[int, ...]:
        """The latest architecture is best, and with instructions of its own still better."""
        return *self.capability, int(self.is_specific)

    @property
    def runs_here(self) -> bool:
        """Whether a GPU of this machine can run kernels for the target."""
        return any(self._runs_on(capability) for capability in devices.cuda_capabilities())

    def runs_on(self, machine: Target) -> bool:
        """Return whether the machine that a target names can run kernels for this one."""
        return isinstance(machine, CudaTarget) and self._runs_on(machine.capability)

    def _runs_on(self, capability: tuple[int, int]) -> bool:
        """Machine code runs on its own generation, from its own capability on; specific code on its own alone."""
        major, minor = self.capability
        if self.is_specific:
            return capability == (major, minor)
        return capability[0] == major and capability[1] >= minor

    def to_tvm(self) -> dict[str, Any]:
        """Return TVM's description of the target; the host's part is for any machine of this architecture."""
        host = "aarch64" if _machine() == "aarch64" else "x86-64"
        return {
            "kind": "cuda",
            "arch": self.architecture,
            "max_shared_memory_per_block": self.shared_memory,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
            "host": CpuTarget(host).to_tvm(),
        }

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
