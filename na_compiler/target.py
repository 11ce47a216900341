"""`Target`: which machine a kernel is for, named by one string everywhere, and found by where tensors are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from na_compiler.devices import DEVICES
from na_compiler.devices.cpu import CpuTarget
from na_compiler.devices.cuda import CudaTarget
from na_compiler.devices.device import Target

if TYPE_CHECKING:
    import torch

__all__ = ["CpuTarget", "CudaTarget", "Target", "target_of"]


def target_of(device: torch.device) -> Target:
    """Return what to compile for, for tensors on one of torch's devices.

    Parameters
    ----------
    device
        One with an index, where there are several.

    Raises
    ------
    NotImplementedError
        If there are no kernels for it.
    ValueError
        If it is too old, or too new.

    Examples
    --------
    >>> import torch
    >>> target_of(torch.device("cpu")) == Target.parse("llvm")
    True
    """
    for known in DEVICES:
        if known.type == device.type:
            return known.target_of(device)
    raise NotImplementedError(
        f"na_compiler has kernels for the CPU and for NVIDIA's GPUs (cuda), got tensors on {device}; move them, e.g. "
        f"with .cpu()"
    )
