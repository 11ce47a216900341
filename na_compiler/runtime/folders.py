"""Where things are kept on this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import platformdirs

__all__ = ["cache_folder", "runtime_library", "use_runtime"]

_RUNTIME = "libtvm_runtime.so"
_given_runtime: list[Path] = []


def cache_folder() -> Path:
    """Return the folder of compiled kernels: ``NA_COMPILER_CACHE``, or one in the platform's cache folder."""
    named = os.environ.get("NA_COMPILER_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("na_compiler", appauthor=False))


def runtime_library() -> Path:
    """Return TVM's runtime library: in ``NA_COMPILER_TVM_LIB``, the installed apache-tvm, or a loaded bundle.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    folders = _runtime_folders()
    found = next((folder / _RUNTIME for folder in folders if (folder / _RUNTIME).is_file()), None)
    if found is None:
        looked = " or ".join(map(str, folders))
        raise FileNotFoundError(f"no {_RUNTIME} in {looked}; set NA_COMPILER_TVM_LIB to the folder that has it")
    return found


def _runtime_folders() -> list[Path]:
    named = [folder for folder in os.environ.get("NA_COMPILER_TVM_LIB", "").split(os.pathsep) if folder]
    if named:
        return list(map(Path, named))
    # Found, not imported: importing tvm loads the compiler, which takes seconds.
    spec = importlib.util.find_spec("tvm")
    if spec is not None and spec.origin is not None:
        return [Path(spec.origin).parent / "lib"]
    if _given_runtime:
        return _given_runtime
    raise FileNotFoundError(
        "kernels need TVM's runtime library: install apache-tvm, load a bundle made with --with-runtime, or "
        f"set NA_COMPILER_TVM_LIB to the folder that holds {_RUNTIME}"
    )


def use_runtime(folder: Path) -> None:
    """Use TVM's runtime in a folder, such as a bundle's, where apache-tvm is not installed."""
    _given_runtime[:] = [folder]
