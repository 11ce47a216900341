"""`build_library`: compiles the torch operators for programs without Python, with the system's C++ compiler."""

from __future__ import annotations

from pathlib import Path

from na_compiler import runtime
from na_compiler.runtime import native
from na_compiler.runtime.host import HostLibrary

__all__ = ["LIBRARY", "build_library", "header_folder", "operator_library"]

LIBRARY = "libna_compiler_torch.so"
# The stable ABI of torch 2.11: the library runs with every later version as well.
_TORCH = "0x020b000000000000"
_OPTIONS = ("-std=c++20", "-O2", "-s", f"-DTORCH_TARGET_VERSION={_TORCH}")


def header_folder() -> Path:
    """Return the folder of ``na_compiler.h``, which a program includes."""
    return Path(__file__).parent


def build_library(folder: str | Path | None = None) -> Path:
    """Build the library of torch operators, or find it built.

    Parameters
    ----------
    folder
        Where to put it. Default: the cache, where it is built once for each version of this package.

    Returns
    -------
    Path
        The library: load it with ``dlopen``, or link the program with it. It finds ``libtvm_ffi.so`` and
        ``libtvm_runtime.so`` in the folders of ``NA_COMPILER_TVM_LIB``, in the bundle, beside itself, or where they are
        on this machine.

    Raises
    ------
    RuntimeError
        If there is no C++ compiler, or it fails.
    FileNotFoundError
        If the headers of apache-tvm-ffi or torch are not installed.

    Notes
    -----
    A Python process does not need it. Where ``na_compiler`` has registered its operators, as it does when it is
    imported after torch, they stay the package's, and the library loads no bundles. Where the library has, the package
    refuses to be imported.
    """
    return operator_library().build(None if folder is None else Path(folder))


def operator_library() -> HostLibrary:
    """Return what the library is built from, and how.

    Raises
    ------
    FileNotFoundError
        If the headers of apache-tvm-ffi or torch are not installed.
    """
    torch = native.installed("torch")
    launcher = Path(runtime.__file__).with_name("launcher.c")
    return HostLibrary(
        LIBRARY,
        "the library of torch operators",
        (header_folder() / "torch_library.cc", launcher),
        (*_OPTIONS, f"-I{torch / 'include'}", *native.flags()),
        (f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"),
        (*native.sources(header_folder()), launcher),
    )
