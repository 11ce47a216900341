"""Loading a compiled library."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from na_compiler.runtime import threads
from na_compiler.runtime.folders import runtime_library

__all__ = ["load_function"]


def load_function(path: Path) -> Any:
    """Load a library and return its function ``main``.

    Raises
    ------
    RuntimeError
        If it cannot be loaded.
    """
    import tvm_ffi  # noqa: PLC0415

    _load_runtime()
    function = tvm_ffi.load_module(str(path))["main"]
    threads.attach(path)
    return function


@functools.cache
def _load_runtime() -> ctypes.CDLL:
    """Load TVM's runtime, whose functions kernels find in the process."""
    threads.prepare()
    return ctypes.CDLL(str(runtime_library()), ctypes.RTLD_GLOBAL)
