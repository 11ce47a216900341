"""Where things are kept on this machine."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

__all__ = ["cache_folder", "loadable", "process_folder", "runtime_library", "use_runtime"]

_LOG = logging.getLogger("na_compiler")
_RUNTIME = "libtvm_runtime.so"
_given_runtime: list[Path] = []


def cache_folder() -> Path:
    """Return the folder of compiled kernels: ``NA_COMPILER_CACHE``, or one in the platform's cache folder."""
    named = os.environ.get("NA_COMPILER_CACHE")
    if named:
        try:
            return Path(named).expanduser().absolute()
        except RuntimeError as error:
            raise ValueError(f"NA_COMPILER_CACHE={named}: {error}; name a folder from the root on") from error
    # A user without a home, with no HOME and no entry in the system's list: an error, or, from an older
    # platformdirs, a relative path that begins with ~.
    with contextlib.suppress(RuntimeError):
        folder = Path(platformdirs.user_cache_dir("na_compiler", appauthor=False))
        if folder.is_absolute():
            return folder
    _say_homeless()
    return process_folder() / "cache"


@functools.cache
def _say_homeless() -> None:
    _LOG.warning("this user has no home folder: kernels are kept for this process only; set NA_COMPILER_CACHE")


def process_folder() -> Path:
    """Return a temporary folder of this process, which is deleted in the end: for what cannot be kept.

    Raises
    ------
    FileNotFoundError
        If there is no place for temporary files.
    """
    return _process_folder(os.getpid())


@functools.cache
def _process_folder(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="na_compiler-"))

    def delete() -> None:
        if os.getpid() == process:  # A forked child, which ends as well, has a folder of its own.
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return folder


def loadable(path: Path) -> Path:
    """Return a library where it can be loaded: itself, or a copy where its file system forbids to run what is on it.

    Raises
    ------
    OSError
        If that for temporary files forbids it as well.
    """
    if not _is_noexec(path):
        return path
    if _is_noexec(process_folder()):
        raise OSError(
            errno.EPERM,
            "libraries can be loaded neither from there nor from the folder for temporary files: both are mounted "
            "noexec; set NA_COMPILER_CACHE or TMPDIR to a folder that is not",
            str(path),
        )
    name = hashlib.sha256(f"{path.resolve()} {path.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    copy = process_folder() / "loaded" / name / path.name
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as temporary:
            shutil.copyfile(path, Path(temporary) / path.name).replace(copy)
    return copy


def _is_noexec(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except OSError:
        return False


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
