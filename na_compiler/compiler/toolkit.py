"""`Toolkit`: NVIDIA's compiler, and what TVM wants to find in the process that compiles for CUDA."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from na_compiler.devices.cuda import packaged
from na_compiler.runtime import manifest
from na_compiler.runtime.folders import cache_folder
from na_compiler.runtime.host import HostLibrary
from na_compiler.runtime.temporary import temporary_folder

__all__ = ["OLDEST", "Toolkit", "find_toolkit", "nvcc_version", "remember_version", "stand_ins"]

_LOG = logging.getLogger("na_compiler")
# The first version of nvcc that knows the architectures of `na_compiler.devices.cuda`.
OLDEST = 13
_HERE = Path(__file__).parent
_VERSION = re.compile(r"\d+(\.\d+){0,5}")
_RELEASE = re.compile(r"release (\d+)\.(\d+), V([\d.]+)")


@dataclass(frozen=True)
class Toolkit:
    """NVIDIA's compiler.

    Parameters
    ----------
    nvcc
        The compiler.
    version
        ``"13.0.88"``.
    """

    nvcc: Path
    version: str


def find_toolkit() -> Toolkit:
    """Return NVIDIA's compiler: in ``CUDA_HOME``, on the path, or from PyPI's packages; the first that is new enough.

    Raises
    ------
    RuntimeError
        If there is none; says which were found.
    """
    refused = []
    for nvcc in _compilers():
        if nvcc.is_file():
            version = _version_of(nvcc, nvcc.stat().st_mtime)
            if version is not None and int(version.partition(".")[0]) >= OLDEST:
                _say_later(nvcc, version)
                return Toolkit(nvcc, version)
            refused.append(f"{nvcc} is {f'version {version}' if version else 'of no version that it tells'}")
    found = f"{', and '.join(refused)}" if refused else "it is not in CUDA_HOME, CUDA_PATH, on the path or in a package"
    raise RuntimeError(
        f"compiling for CUDA needs nvcc {OLDEST} or later, and {found}; install NVIDIA's CUDA toolkit {OLDEST} and set "
        f"CUDA_HOME to it, or: pip install 'nvidia-cuda-nvcc=={OLDEST}.*' 'nvidia-cuda-runtime=={OLDEST}.*' "
        f"'nvidia-cuda-cccl=={OLDEST}.*'"
    )


def _compilers() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found:
        yield Path(found)
    for path in ("cu13/bin/nvcc", "cuda_nvcc/bin/nvcc"):
        yield from packaged(path)


@functools.cache
def _say_later(nvcc: Path, version: str) -> None:
    if int(version.partition(".")[0]) > OLDEST:
        _LOG.warning(
            "%s is version %s, which is later than this version of na_compiler knows: should a GPU's driver refuse its "
            "kernels, set CUDA_HOME to NVIDIA's toolkit %d",
            nvcc, version, OLDEST,
        )  # fmt: skip


@functools.cache
def _version_of(nvcc: Path, changed: float) -> str | None:  # noqa: ARG001 - a file that changed is asked again
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _RELEASE.search(done.stdout)
    return found[3] if found else None


def nvcc_version() -> str:
    """Return the version of nvcc, for keys: what it makes of a kernel changes with it.

    Where there is none: of the one that compiled for the cache last, so that a machine finds what another put in.
    """
    try:
        return find_toolkit().version
    except RuntimeError:
        return _read_version() or "none"


def remember_version() -> None:
    """Write down the version of nvcc beside the cached kernels, where they can be written; see `nvcc_version`."""
    version, path = nvcc_version(), _remembered()
    with contextlib.suppress(OSError):
        if _read_version() != version:
            # In one step: others may be reading it, and anything may be in its place.
            with temporary_folder(path.parent, ".nvcc-version-") as folder:
                made = folder / path.name
                made.write_text(version, encoding="ascii")
                made.replace(path)


def _read_version() -> str | None:
    try:
        text = manifest.contents(_remembered()).decode("ascii")
    except ValueError:
        return None
    return text if _VERSION.fullmatch(text) else None


def _remembered() -> Path:
    return cache_folder() / "nvcc-version"


def stand_ins() -> list[Path]:
    """Return folders of stand-ins for CUDA's driver and runtime, for the process that compiles: see the files in C."""
    driver = HostLibrary("libcuda.so.1", "a stand-in for CUDA's driver", (_HERE / "libcuda.c",), ("-O2", "-std=c11"))
    runtime = HostLibrary(
        "libcudart.so.13",
        "a stand-in for CUDA's runtime",
        (_HERE / "libcudart.c",),
        ("-O2", "-std=c11", f"-Wl,--version-script={_HERE / 'libcudart.map'}"),
    )
    return [library.build().parent for library in (driver, runtime)]
