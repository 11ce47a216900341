"""Where things are kept on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import platformdirs

__all__ = ["cache_folder", "runtime_library"]


def cache_folder() -> Path:
    """Return the folder of compiled kernels: ``NA_COMPILER_CACHE``, or one in the platform's cache folder."""
    named = os.environ.get("NA_COMPILER_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("na_compiler", appauthor=False))


def runtime_library() -> Path:
    """Return TVM's runtime library: in ``NA_COMPILER_TVM_LIB``, or in the installed apache-tvm.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    named = os.environ.get("NA_COMPILER_TVM_LIB")
    if named:
        folder = Path(named)
    else:
        # Found, not imported: importing tvm loads the compiler, which takes seconds.
        spec = importlib.util.find_spec("tvm")
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                "kernels need TVM's runtime library: install apache-tvm, or set NA_COMPILER_TVM_LIB to the folder "
                "that holds libtvm_runtime.so"
            )
        folder = Path(spec.origin).parent / "lib"
    path = folder / "libtvm_runtime.so"
    if not path.is_file():
        raise FileNotFoundError(f"no libtvm_runtime.so in {folder}; set NA_COMPILER_TVM_LIB to the folder that has it")
    return path
