"""Loading a compiled library."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

from na_compiler.runtime import threads
from na_compiler.runtime.folders import runtime_library

__all__ = ["load_function", "load_runtime"]


def load_function(path: Path, device_type: str = "cpu") -> Any:
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

    load_runtime()
    if device_type == "cuda":
        _load_cuda_runtime()
    function = tvm_ffi.load_module(str(path))["main"]
    threads.attach(path)
    return function


@functools.cache
def load_runtime() -> ctypes.CDLL:
    """Load TVM's runtime, whose functions kernels find in the process."""
    import tvm_ffi  # noqa: F401, PLC0415 - the runtime needs its library in the process

    threads.prepare()
    return ctypes.CDLL(str(runtime_library()), ctypes.RTLD_GLOBAL)


@functools.cache
def _load_cuda_runtime() -> ctypes.CDLL:
    """Load the part of TVM's runtime that launches kernels; it needs CUDA's own, which a torch for CUDA has loaded."""
    if "torch" not in sys.modules:
        _load_cudart()
    library = runtime_library().with_name("libtvm_runtime_cuda.so")
    try:
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeError(
            f"kernels for CUDA need {library.name} beside libtvm_runtime.so, NVIDIA's driver and libcudart.so.13 (a "
            f"torch for CUDA 13, or nvidia-cuda-runtime): {error}"
        ) from error


def _load_cudart() -> None:
    """Load CUDA's runtime from PyPI's package, where the system's loader would not find it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "cu13" / "lib" / "libcudart.so.13"
        if path.is_file():
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            return
