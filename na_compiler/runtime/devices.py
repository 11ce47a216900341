"""Which GPUs this machine has: asked through torch where it is loaded, else through the driver; TVM is not needed."""

from __future__ import annotations

import ctypes
import functools
import sys

__all__ = ["cuda_capabilities", "cuda_capability"]

# CUdevice_attribute, in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


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
    """Return the compute capability of each GPU of this machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        return _capabilities_by_torch()
    return _capabilities_by_driver()


def _current() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.current_device())


@functools.cache
def _capabilities_by_torch() -> tuple[tuple[int, int], ...]:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


@functools.cache
def _capabilities_by_driver() -> tuple[tuple[int, int], ...]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_capability(driver, index) for index in range(count.value))


def _capability(driver: ctypes.CDLL, index: int) -> tuple[int, int]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return major.value, minor.value
