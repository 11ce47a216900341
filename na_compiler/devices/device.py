"""`Device` and `Target`: a kind of machine that kernels run on, and one machine of it. A device's file has both."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "Device", "Target"]


class Device(ABC):
    """A kind of machine that kernels run on.

    Attributes
    ----------
    kind
        What the names of its targets begin with: ``"llvm"``, ``"cuda"``.
    type
        What torch calls it: ``"cpu"``, ``"cuda"``.
    libraries
        What its kernels need of TVM's runtime in the process beside ``libtvm_runtime.so``, in the same folder: a bundle
        that brings the runtime brings these as well.
    has_host_loops
        Whether its kernels have parallel loops on the host's threads: then they are given the launcher of
        `na_compiler.runtime.threads`.

    Notes
    -----
    Streams are no part of this: a kernel runs on the stream that is TVM's current one for the device, and tvm_ffi makes
    that torch's when it is handed a tensor of torch's.
    """

    kind: ClassVar[str]
    type: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()
    has_host_loops: ClassVar[bool] = False

    @abstractmethod
    def target(self, architecture: str) -> Target:
        """Return the target of an architecture, or, if it is empty, of what this machine has.

        Raises
        ------
        ValueError
            If there is none, or this machine has none.
        """

    def targets(self, architecture: str) -> tuple[Target, ...]:
        """Return the targets that a name stands for: one, unless a device has names for several."""
        return (self.target(architecture),)

    @abstractmethod
    def target_of(self, device: torch.device) -> Target:
        """Return what to compile for, for tensors on one of torch's devices of this type.

        Raises
        ------
        NotImplementedError, ValueError
            If it is one that has no kernels.
        """

    def load(self, folder: Path) -> None:  # noqa: B027 - most need nothing
        """Load what kernels need in the process beside TVM's runtime, which is in a folder and has been loaded.

        Raises
        ------
        RuntimeError
            If it cannot be loaded.
        """

    def guard(self, index: int) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Make one of torch's devices the current one within a block, as launching a kernel on it wants."""
        return contextlib.nullcontext()


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
        device, architecture = _named(name)
        return device.target(architecture)

    @staticmethod
    def several(name: str | Target) -> tuple[Target, ...]:
        """Make the targets that a name stands for, for what holds kernels for several.

        Parameters
        ----------
        name
            As of `parse`, or ``"cuda:all"``: for every GPU that is known but Tegra's, the best that runs on it.

        Raises
        ------
        ValueError
            As `parse`.

        Examples
        --------
        >>> [target.name for target in Target.several("cuda:all")][:3]
        ['cuda:sm_75', 'cuda:sm_80', 'cuda:sm_86']
        """
        if isinstance(name, Target):
            return (name,)
        device, architecture = _named(name)
        return device.targets(architecture)

    @property
    @abstractmethod
    def device(self) -> Device:
        """The kind of machine."""

    @property
    def device_type(self) -> str:
        """The type that torch gives to devices of this kind: ``"cpu"`` or ``"cuda"``."""
        return self.device.type

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

    @property
    @abstractmethod
    def devices_here(self) -> tuple[str, ...]:
        """What those of this machine's devices call themselves that can run kernels for the target."""

    @abstractmethod
    def runs_on(self, machine: Target) -> bool:
        """Return whether the machine that a target names can run kernels for this one."""

    @abstractmethod
    def to_tvm(self) -> dict[str, Any]:
        """Return TVM's description of the target."""

    def __str__(self) -> str:
        return self.name


# Each device's file adds its own when it is imported, which `na_compiler.devices` does.
DEVICES: list[Device] = []


def _named(name: str) -> tuple[Device, str]:
    """Return the device that a target's name begins with, and the rest of it."""
    kind, _, architecture = str(name).partition(":")
    for device in DEVICES:
        if device.kind == kind:
            return device, architecture
    raise ValueError(
        f"target must be llvm (this machine), llvm:INSTRUCTION_SET, cuda (the GPU present) or cuda:ARCHITECTURE, "
        f"e.g. llvm:x86-64-v3 or cuda:sm_90a; got {name!r}"
    )
