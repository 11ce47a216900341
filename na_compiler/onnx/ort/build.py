"""`build_library`: compiles the operator library for ONNX Runtime with the system's C++ compiler."""

from __future__ import annotations

from pathlib import Path

from na_compiler.runtime import native
from na_compiler.runtime.host import HostLibrary

__all__ = ["LIBRARY", "build_library", "source_folder"]

LIBRARY = "libna_compiler_ort.so"
# Small rather than fast: the time is in the kernels. Constants share pages with code, which is two pages less.
_OPTIONS = (
    *("-std=c++17", "-Os", "-s", "-ffunction-sections", "-fdata-sections"),
    *("-Wl,--gc-sections", "-Wl,-z,noseparate-code"),
)


def source_folder() -> Path:
    """Return the folder of the library's sources; a program may include ``ort_api.h`` of it."""
    return Path(__file__).parent


def build_library(folder: str | Path | None = None) -> Path:
    """Build the operator library, or find it built.

    Parameters
    ----------
    folder
        Where to put it. Default: the cache, where it is built once for each version of this package.

    Returns
    -------
    Path
        The library. It needs ONNX Runtime 1.21 or later, and finds ``libtvm_ffi.so`` and ``libtvm_runtime.so`` in the
        folders of ``NA_COMPILER_TVM_LIB``, in the bundle, beside itself, or where they are on this machine.

    Raises
    ------
    RuntimeError
        If there is no C++ compiler, or it fails.
    FileNotFoundError
        If the headers of apache-tvm-ffi are not installed.

    Examples
    --------
    >>> build_library("deployment")  # doctest: +SKIP
    PosixPath('deployment/libna_compiler_ort.so')
    """
    library = HostLibrary(
        LIBRARY,
        "the operator library for ONNX Runtime",
        (source_folder() / "library.cc",),
        (*_OPTIONS, *native.flags()),
        ("-ldl",),
        native.sources(source_folder()),
    )
    return library.build(None if folder is None else Path(folder))
