"""NVIDIA's GPUs: architectures, what they take, and which of them this machine has.

Which GPUs there are is asked through torch where it is loaded, else through the driver; TVM is not needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_compiler.devices.cpu import CPU, machine
from na_compiler.devices.device import DEVICES, Device, Target

if TYPE_CHECKING:
    import torch

__all__ = ["CUDA", "CUDART", "Cuda", "CudaTarget", "cuda_capabilities", "cuda_capability", "cuda_names", "packaged"]

_LOG = logging.getLogger("na_compiler")

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
# Of Tegra, such as Jetson's Orin and Thor: machine code for a desktop's GPU does not run on these, nor the other way,
# nor that of one on another (CUDA C++ Programming Guide, binary compatibility).
_TEGRA = {87, 88, 110}
# What ``cuda:all`` names: for each GPU that is known, Tegra's left out, the best that runs on it. Of capability 10.3
# and 12.1 that is code for 10.0 and 12.0: kernels have no instructions that only these have.
_ALL = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
_OLDEST, _LATEST = min(_SHARED_MEMORY), max(_SHARED_MEMORY)
_ARCHITECTURE = re.compile(r"sm_(\d+)([af]?)")
# CUDA's runtime library that TVM's was linked with.
CUDART = "libcudart.so.13"
# CUdevice_attribute, in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
# Bytes that a GPU's name has at most.
_NAME_BYTES = 256
# What a GPU calls itself, and its compute capability.
_Gpu = tuple[str, tuple[int, int]]


class Cuda(Device):
    """GPUs of NVIDIA's."""

    kind = "cuda"
    type = "cuda"
    libraries = ("libtvm_runtime_cuda.so",)

    def target(self, architecture: str) -> CudaTarget:
        """Make the target of an architecture; of the GPU present, if it is empty."""
        if not architecture:
            capability = cuda_capability()
            if capability is None:
                raise ValueError(
                    f"target cuda is the GPU present, and there is none{_amd_aside()}; name one, e.g. cuda:sm_90a"
                )
            return CudaTarget.of_capability(capability)
        match = _ARCHITECTURE.fullmatch(architecture)
        if match and int(match[1]) < _OLDEST:
            raise ValueError(
                f"target cuda:{architecture} is too old: CUDA 13 compiles for sm_{_OLDEST} and later, "
                f"e.g. cuda:sm_{_OLDEST}"
            )
        if not match or int(match[1]) not in _SHARED_MEMORY or (match[2] and int(match[1]) < 90):
            known = ", ".join(f"cuda:sm_{number}" for number in _SHARED_MEMORY)
            if architecture == "all":
                raise ValueError(
                    f"target cuda:all is several, and one is wanted here: one of {', '.join(f'cuda:{n}' for n in _ALL)}"
                )
            raise ValueError(
                f"target must be cuda (the GPU present), one of {known}, or, from sm_90 on, one of these with an a "
                f"for instructions of its own, e.g. cuda:sm_90a; got 'cuda:{architecture}'"
            )
        return CudaTarget(architecture)

    def targets(self, architecture: str) -> tuple[Target, ...]:
        """Make the target of an architecture; of one for each GPU there is, if it is ``all``."""
        return tuple(map(self.target, _ALL)) if architecture == "all" else super().targets(architecture)

    def target_of(self, device: torch.device) -> CudaTarget:
        """Return the target that makes most of one of torch's GPUs.

        Raises
        ------
        NotImplementedError
            If it is not NVIDIA's: torch calls AMD's GPUs cuda as well.
        ValueError
            If it is too old.
        """
        import torch  # noqa: PLC0415

        if torch.version.hip is not None:
            name = torch.cuda.get_device_name(device)
            raise NotImplementedError(
                f"{device} is an AMD GPU ({name}): na_compiler has kernels for the CPU and for NVIDIA's GPUs; move "
                f"tensors to the CPU with .cpu()"
            )
        return CudaTarget.of_capability(torch.cuda.get_device_capability(device))

    def load(self, folder: Path) -> None:
        """Load the part of TVM's runtime that launches kernels, and CUDA's own runtime, which it needs."""
        _load_cudart()
        library = folder / self.libraries[0]
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise RuntimeError(f"kernels for CUDA cannot be loaded: {error}; {_what_is_missing(str(error))}") from error

    def guard(self, index: int) -> AbstractContextManager[Any]:
        """Make a GPU the current one."""
        import torch  # noqa: PLC0415

        return torch.cuda.device(index)


CUDA = Cuda()
DEVICES.append(CUDA)


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

    @classmethod
    def of_capability(cls, capability: tuple[int, int]) -> CudaTarget:
        """Make the target that makes most of a GPU of a compute capability.

        One that is newer than this package gets what runs on it: machine code of the last architecture that is known of
        its generation. That is said once.

        Raises
        ------
        ValueError
            For one that CUDA 13 does not compile for, and for one of a generation that is not known: machine code of
            one generation runs on no other.
        """
        major, minor = capability
        number = 10 * major + minor
        if number in _SHARED_MEMORY or number < _OLDEST:
            return CUDA.target(f"sm_{number}" + ("a" if capability == (9, 0) else ""))
        same = [known for known in _SHARED_MEMORY if known // 10 == major and known < number and known not in _TEGRA]
        if not same:
            raise ValueError(
                f"a GPU of compute capability {major}.{minor} is not known to this version of na_compiler, which knows "
                f"{_OLDEST / 10} to {_LATEST / 10}, and no machine code of another generation runs on it; move tensors "
                f"to the CPU with .cpu(), or look for a newer na_compiler"
            )
        _say_unknown(capability, same[-1])
        return cls(f"sm_{same[-1]}")

    @property
    def device(self) -> Cuda:
        """GPUs of NVIDIA's."""
        return CUDA

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
        return any(self._runs_on(capability) for capability in cuda_capabilities())

    @property
    def devices_here(self) -> tuple[str, ...]:
        """The names of this machine's GPUs that can run kernels for the target."""
        capabilities = cuda_capabilities()
        if not any(map(self._runs_on, capabilities)):
            return ()
        found = zip(cuda_names(), capabilities, strict=True)
        return tuple(name for name, capability in found if self._runs_on(capability))

    def runs_on(self, machine: Target) -> bool:
        """Return whether the machine that a target names can run kernels for this one."""
        return isinstance(machine, CudaTarget) and self._runs_on(machine.capability)

    def _runs_on(self, capability: tuple[int, int]) -> bool:
        """Machine code runs on its generation, from its own capability on; specific and Tegra's on its own alone.

        And where blocks have as much shared memory: those for 8.0 may take more than 8.6 and 8.9 have.
        """
        major, minor = self.capability
        number = 10 * capability[0] + capability[1]
        if self.is_specific or not _TEGRA.isdisjoint({10 * major + minor, number}):
            return capability == (major, minor)
        has_room = _SHARED_MEMORY.get(number, self.shared_memory) >= self.shared_memory
        return capability[0] == major and capability[1] >= minor and has_room

    def to_tvm(self) -> dict[str, Any]:
        """Return TVM's description of the target; the host's part is for any machine of this architecture."""
        host = "aarch64" if machine() == "aarch64" else "x86-64"
        return {
            "kind": "cuda",
            "arch": self.architecture,
            "max_shared_memory_per_block": self.shared_memory,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
            "host": CPU.target(host).to_tvm(),
        }

    def __str__(self) -> str:
        return self.name


@functools.cache
def _say_unknown(capability: tuple[int, int], number: int) -> None:
    major, minor = capability
    _LOG.warning(
        "a GPU of compute capability %d.%d is not known to this version of na_compiler: it gets kernels for sm_%d, "
        "which run on it and use nothing that is new in it",
        major, minor, number,
    )  # fmt: skip


def cuda_capability(index: int | None = None) -> tuple[int, int] | None:
    """Return the compute capability of a GPU; ``None`` where there is none.

    Parameters
    ----------
    index
        Of the device; default torch's current one, or the first.
    """
    capabilities = cuda_capabilities()
    if index is None:
        index = _current()
    return capabilities[index] if index < len(capabilities) else None


def cuda_capabilities() -> tuple[tuple[int, int], ...]:
    """Return the compute capability of each GPU of NVIDIA's of this machine."""
    return tuple(capability for _, capability in _gpus())


def cuda_names() -> tuple[str, ...]:
    """Return what each GPU of NVIDIA's of this machine calls itself."""
    return tuple(name for name, _ in _gpus())


def _gpus() -> tuple[_Gpu, ...]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        return _gpus_by_torch()
    return _gpus_by_driver()


def _current() -> int:
    torch = sys.modules.get("torch")
    if torch is None or torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.current_device())


def _amd_aside() -> str:
    torch = sys.modules.get("torch")
    is_amd = torch is not None and torch.version.hip is not None and torch.cuda.is_available()
    return " of NVIDIA's (torch has one of AMD's)" if is_amd else ""


@functools.cache
def _gpus_by_torch() -> tuple[_Gpu, ...]:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return ()
    of = torch.cuda.get_device_name, torch.cuda.get_device_capability
    return tuple((of[0](index), of[1](index)) for index in range(torch.cuda.device_count()))


@functools.cache
def _gpus_by_driver() -> tuple[_Gpu, ...]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def _gpu(driver: ctypes.CDLL, index: int) -> _Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return name.value.decode(errors="replace"), (major.value, minor.value)


def packaged(path: str) -> Iterator[Path]:
    """Yield where a file of NVIDIA's packages on PyPI is."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / path).is_file():
            yield Path(folder) / path


def _load_cudart() -> None:
    """Load CUDA's runtime: the one that is loaded already or that the system's loader finds, else PyPI's package's.

    A torch for CUDA 13 has loaded it. One for CUDA 12 has loaded another, whose symbols have other versions; the two
    share the driver's contexts and streams.
    """
    for place in (CUDART, *map(str, packaged(f"cu13/lib/{CUDART}"))):
        with contextlib.suppress(OSError):
            ctypes.CDLL(place)
            return


def _what_is_missing(error: str) -> str:
    """Return what to do about a library that could not be loaded."""
    if CUDART in error:
        return f"install CUDA's runtime, which has {CUDART}: pip install 'nvidia-cuda-runtime==13.*'"
    if "libcuda.so.1" in error:
        return "libcuda.so.1 is NVIDIA's driver: install that, or run where it is"
    return "it is a part of apache-tvm that has to lie beside libtvm_runtime.so"
