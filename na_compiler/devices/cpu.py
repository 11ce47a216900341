"""CPUs: instruction sets, what they take, and which of them this machine has."""

from __future__ import annotations

import functools
import platform
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_compiler.devices.device import DEVICES, Device, Target

if TYPE_CHECKING:
    import torch

__all__ = ["CPU", "Cpu", "CpuTarget", "InstructionSet", "feature_table", "machine", "processor"]


@dataclass(frozen=True)
class InstructionSet:
    """What compilers call a level of an architecture.

    Parameters
    ----------
    name
        ``"x86-64-v3"``.
    machine
        The architecture: ``"x86-64"``, ``"aarch64"``.
    lanes
        float32 lanes of a vector.
    registers
        Vector registers.
    adds
        Features that it has and the one before it of the same architecture has not, as Linux names them in
        ``/proc/cpuinfo``.
    """

    name: str
    machine: str
    lanes: int
    registers: int
    adds: tuple[str, ...] = ()


# The levels of the x86-64 psABI (System V ABI, AMD64 supplement, 3.1.1), each after the one that it extends. Linux says
# pni for SSE3, cx16 for CMPXCHG16B and abm for LZCNT, and xsave only where it has switched that on, which is OSXSAVE.
# C++ reads this table as well: see `feature_table`.
_SETS = (
    InstructionSet("x86-64", "x86-64", 4, 16),
    InstructionSet("x86-64-v2", "x86-64", 4, 16, ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3")),
    InstructionSet(
        "x86-64-v3", "x86-64", 8, 16, ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")
    ),
    InstructionSet("x86-64-v4", "x86-64", 16, 32, ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    InstructionSet("aarch64", "aarch64", 4, 32),
)
_BY_NAME = {one.name: one for one in _SETS}
# How operating systems spell architectures.
_MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


class Cpu(Device):
    """The CPU."""

    kind = "llvm"
    type = "cpu"
    has_host_loops = True

    def target(self, architecture: str) -> CpuTarget:
        """Make the target of an instruction set; of this machine's, if it is empty."""
        if not architecture:
            return CpuTarget(_host_instruction_set())
        if architecture in _BY_NAME:
            return CpuTarget(architecture)
        known = ", ".join(f"llvm:{name}" for name in _BY_NAME)
        raise ValueError(f"target must be llvm (this machine) or one of {known}, got 'llvm:{architecture}'")

    def target_of(self, device: torch.device) -> CpuTarget:  # noqa: ARG002
        """Return this machine's CPU."""
        return self.target("")


CPU = Cpu()
DEVICES.append(CPU)


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

    @property
    def device(self) -> Cpu:
        """The CPU."""
        return CPU

    @property
    def name(self) -> str:
        """The string that `parse` makes this target of."""
        return f"llvm:{self.instruction_set}"

    @property
    def vector(self) -> int:
        """float32 lanes of a vector."""
        return _BY_NAME[self.instruction_set].lanes

    @property
    def registers(self) -> int:
        """Vector registers."""
        return _BY_NAME[self.instruction_set].registers

    @property
    def triple(self) -> str:
        """Name of the machine as compilers spell it."""
        return f"{'aarch64' if self.instruction_set == 'aarch64' else 'x86_64'}-linux-gnu"

    @property
    def order(self) -> tuple[int, ...]:
        """The widest vector is best, then the latest instruction set."""
        return self.vector, list(_BY_NAME).index(self.instruction_set)

    @property
    def is_native(self) -> bool:
        """Whether this machine has the architecture, so that libraries for it can be linked here."""
        return machine() == _BY_NAME[self.instruction_set].machine

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run kernels for the target."""
        return self.is_native and self.runs_on(CpuTarget(_host_instruction_set()))

    @property
    def devices_here(self) -> tuple[str, ...]:
        """The processor's name, if it can run kernels for the target."""
        return (processor(),) if self.runs_here else ()

    def runs_on(self, machine: Target) -> bool:
        """Return whether the machine that a target names can run kernels for this one."""
        if not isinstance(machine, CpuTarget):
            return False
        ours, theirs = _BY_NAME[self.instruction_set], _BY_NAME[machine.instruction_set]
        return ours.machine == theirs.machine and _SETS.index(ours) <= _SETS.index(theirs)

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


def feature_table() -> str:
    """Return the instruction sets as text, for C++: ``architecture:name:feature,feature;...``, each after its base."""
    return ";".join(f"{one.machine}:{one.name}:{','.join(one.adds)}" for one in _SETS)


def machine() -> str:
    """Return this machine's architecture, as instruction sets name it where there are any for it."""
    return _MACHINES.get(platform.machine().lower(), platform.machine())


def processor() -> str:
    """Return the processor's name; the architecture's where the system says none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def best_instruction_set(machine: str, features: AbstractSet[str]) -> str | None:
    """Return the last instruction set of an architecture whose features are all there; ``None`` if there is none."""
    best = None
    for one in _SETS:
        if one.machine == machine:
            if not features >= set(one.adds):
                break
            best = one.name
    return best


@functools.cache
def _host_instruction_set() -> str:
    best = best_instruction_set(machine(), _features())
    if best is None:
        raise ValueError(f"no target for this machine's architecture, {machine()}; known are {', '.join(_BY_NAME)}")
    return best


def _features() -> set[str]:
    """Return the features that the operating system lets programs use: of a CPU's own list it may have hidden some."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
