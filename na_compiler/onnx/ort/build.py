"""`build_library`: compiles the operator library for ONNX Runtime with the system's C++ compiler."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from na_compiler.runtime.bundle import FORMAT
from na_compiler.runtime.folders import cache_folder, runtime_library
from na_compiler.runtime.kernel import ABI

__all__ = ["LIBRARY", "build_library", "cxx_compiler", "source_folder"]

_LOG = logging.getLogger("na_compiler")
LIBRARY = "libna_compiler_ort.so"
# Small rather than fast: the time is in the kernels.
_FLAGS = (
    "-std=c++17",
    "-Os",
    "-s",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffunction-sections",
    "-fdata-sections",
    "-Wl,--gc-sections",
)


def source_folder() -> Path:
    """Return the folder of the library's sources; a program may include ``ort_api.h`` of it."""
    return Path(__file__).parent


def cxx_compiler() -> str | None:
    """Return the system's C++ compiler: ``CXX``, or the first of the usual names on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


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

    Examples
    --------
    >>> build_library("deployment")  # doctest: +SKIP
    PosixPath('deployment/libna_compiler_ort.so')
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return _compile(Path(folder) / LIBRARY)
    path = cache_folder() / "host" / f"ort-{_fingerprint()}" / LIBRARY
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    return _compile(path)


def _compile(path: Path) -> Path:
    compiler = cxx_compiler()
    if compiler is None:
        raise RuntimeError(
            "the operator library for ONNX Runtime needs a C++ compiler, and none was found; install one, set CXX, or "
            f"bring {LIBRARY} from a machine that has one (na-compile ort-library)"
        )
    started = time.perf_counter()
    # Built beside its place and renamed into it, so that it is whole or not there.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        command = [compiler, *_FLAGS, *_definitions(), "-o", str(made), str(source_folder() / "library.cc"), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", None) or str(error)).strip()
            raise RuntimeError(f"{compiler} could not build the operator library: {detail}") from error
        made.replace(path)
    _LOG.info("built %s in %.1f s", path, time.perf_counter() - started)
    return path


def _definitions() -> list[str]:
    folders = [str(folder) for folder in _tvm_folders()]
    if any('"' in folder or ":" in folder for folder in folders):
        folders = []  # Found by the variable then.
    return [
        f"-I{_tvm_ffi_folder() / 'include'}",
        f"-DNA_BUNDLE_FORMAT={FORMAT}",
        f"-DNA_KERNEL_ABI={ABI}",
        f'-DNA_TVM_FOLDERS="{":".join(folders)}"',
        "-pthread",
    ]


@functools.cache
def _tvm_ffi_folder() -> Path:
    spec = importlib.util.find_spec("tvm_ffi")
    if spec is None or spec.origin is None:
        raise RuntimeError("building the operator library needs the headers of apache-tvm-ffi; install it")
    return Path(spec.origin).parent


def _tvm_folders() -> list[Path]:
    """Return where TVM's libraries are on this machine."""
    folders = [_tvm_ffi_folder() / "lib"]
    try:
        folders.append(runtime_library().parent)
    except FileNotFoundError:
        _LOG.info("no libtvm_runtime.so is installed here: the operator library has to find one where it runs")
    return folders


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in sorted((*source_folder().glob("*.cc"), *source_folder().glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((cxx_compiler() or "", *_FLAGS, *_definitions())).encode())
    return digest.hexdigest()[:16]
