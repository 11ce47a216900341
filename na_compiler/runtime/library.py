"""Loading a compiled library."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from na_compiler.devices import DEVICES
from na_compiler.runtime import threads
from na_compiler.runtime.folders import loadable, runtime_library

__all__ = ["load_function", "load_runtime"]


def load_function(path: Path, device_type: str = "cpu") -> Callable[..., None]:
    """Load a library and return its function ``main``.

    Parameters
    ----------
    path
        The library.
    device_type
        ``"cpu"`` or ``"cuda"``: what it runs on.

    Raises
    ------
    RuntimeError
        If it cannot be loaded.
    """
    import tvm_ffi  # noqa: PLC0415

    path = loadable(path)
    load_runtime()
    _load_for(device_type)
    function: Callable[..., None] = tvm_ffi.load_module(str(path))["main"]
    if any(device.has_host_loops for device in DEVICES if device.type == device_type):
        threads.attach(path)
    return function


@functools.cache
def load_runtime() -> ctypes.CDLL:
    """Load TVM's runtime, whose functions kernels find in the process."""
    import tvm_ffi  # noqa: F401, PLC0415 - the runtime needs its library in the process

    threads.prepare()
    return ctypes.CDLL(str(runtime_library()), ctypes.RTLD_GLOBAL)


@functools.cache
def _load_for(device_type: str) -> None:
    """Load what kernels for a device need beside that."""
    for device in DEVICES:
        if device.type == device_type:
            device.load(runtime_library().parent)
