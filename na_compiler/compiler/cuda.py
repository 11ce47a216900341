"""Building libraries for CUDA, on any machine: no GPU and no driver are needed.

TVM compiles in a process of its own, because there a stand-in for the driver's library is loaded (see libcuda.c):
in the user's process a torch with CUDA would find it. nvcc makes machine code of what TVM generates; the library
holds that, never source text.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from na_compiler.runtime.host import HostLibrary, c_compiler

if TYPE_CHECKING:
    from na_compiler.compiler.spec import KernelSpec

__all__ = ["Build", "Toolkit", "build_library", "check_library", "find_toolkit", "generate", "receive", "send"]

_LOG = logging.getLogger("na_compiler")
_STUB = Path(__file__).with_name("libcuda.c")
_CUDART = "libcudart.so.13"


@dataclass(frozen=True)
class Toolkit:
    """NVIDIA's compiler, and where its runtime library is.

    Parameters
    ----------
    nvcc
        The compiler.
    libraries
        Folder of ``libcudart.so.13``; ``None`` where the system's loader finds it.
    """

    nvcc: Path
    libraries: Path | None


@dataclass(frozen=True)
class Build:
    """What came of a compilation.

    Parameters
    ----------
    source
        The CUDA C++ that TVM generated.
    log
        What nvcc said: registers, shared memory, spills.
    """

    source: str
    log: str


def find_toolkit() -> Toolkit:
    """Return NVIDIA's compiler: in ``CUDA_HOME``, on the path, or from PyPI's packages.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    for nvcc in _compilers():
        if nvcc.is_file():
            folders = [nvcc.parent.parent / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
            return Toolkit(nvcc, next((folder for folder in folders if (folder / _CUDART).exists()), None))
    raise RuntimeError(
        "compiling for CUDA needs nvcc, and it is not in CUDA_HOME, on the path or in a package; install NVIDIA's CUDA "
        "toolkit 13, or: pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
    )


def _compilers() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found:
        yield Path(found)
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        yield Path(folder) / "cu13" / "bin" / "nvcc"
        yield Path(folder) / "cuda_nvcc" / "bin" / "nvcc"


def build_library(spec: KernelSpec, path: Path) -> Build:
    """Compile a spec to a library with the GPU's machine code in it.

    Raises
    ------
    RuntimeError
        If there is no nvcc or C compiler, or one of them fails, or the library is not what it should be.
    """
    build = _ask(spec, path)
    check_library(path)
    _LOG.debug("nvcc: %s", build.log)
    return build


def generate(spec: KernelSpec) -> str:
    """Return the CUDA C++ that a spec comes to; needs no nvcc."""
    return _ask(spec, None).source


def check_library(path: Path) -> None:
    """Check that a library holds machine code of a GPU, and no source text.

    Raises
    ------
    RuntimeError
        If not: such a library would be compiled again where it is loaded, with what is there.
    """
    data = path.read_bytes()
    if b"__global__" in data:
        raise RuntimeError(f"{path} holds CUDA source text instead of machine code")
    if not _has_cubin(data):
        raise RuntimeError(f"{path} holds no machine code for a GPU")


def _has_cubin(data: bytes) -> bool:
    """Whether there is an ELF file for a GPU inside another one."""
    cuda_machine = 190  # EM_CUDA, in elf.h
    at = data.find(b"\x7fELF", 1)
    while at >= 0:
        if data[at + 18 : at + 20] == struct.pack("<H", cuda_machine):
            return True
        at = data.find(b"\x7fELF", at + 1)
    return False


# The process that compiles, in place of this one. It ends with this one, or when it has had nothing to do for a while.
_process: subprocess.Popen[bytes] | None = None
_owner: int | None = None
_lock = threading.Lock()


def _ask(spec: KernelSpec, path: Path | None) -> Build:
    """Have a spec compiled; without a path, only to CUDA C++."""
    toolkit = find_toolkit() if path is not None else None
    compiler = c_compiler()
    if compiler is None:
        raise RuntimeError(f"compiling {spec} needs a C compiler beside nvcc; install one, or set CC")
    request = {
        "spec": spec,
        "path": None if path is None else str(path.resolve()),
        "nvcc": None if toolkit is None else str(toolkit.nvcc),
        "cc": compiler,
    }
    with _lock:
        answer = _exchange(request, toolkit)
    if isinstance(answer, str):
        raise RuntimeError(f"compiling {spec} failed: {answer}")
    assert isinstance(answer, Build)
    return answer


def _exchange(request: Any, toolkit: Toolkit | None) -> Any:
    for attempt in range(2):
        process = _worker(toolkit)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError, EOFError):
            send(process.stdin, request)
            return receive(process.stdout)
        status = process.wait()
        # It may have ended because it had nothing to do, just as it was asked.
        if status != 0 or attempt:
            return f"the compiling process ended with status {status}"
    return None


def _worker(toolkit: Toolkit | None) -> subprocess.Popen[bytes]:
    global _process, _owner  # noqa: PLW0603
    if _process is None or _owner != os.getpid() or _process.poll() is not None:
        driver = HostLibrary("libcuda.so.1", "a stand-in for CUDA's driver", (_STUB,), ("-O2", "-std=c11")).build()
        folders = [driver.parent, toolkit.libraries if toolkit else None, os.environ.get("LD_LIBRARY_PATH")]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(str(folder) for folder in folders if folder),
            # Packages are found where this process finds them.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        _process = subprocess.Popen(
            [sys.executable, "-m", "na_compiler.compiler.cuda_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        _owner = os.getpid()
    return _process


@atexit.register
def _end() -> None:
    if _process is not None and _owner == os.getpid() and _process.stdin is not None:
        with contextlib.suppress(OSError):
            _process.stdin.close()
        _process.wait()


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message to a pipe."""
    data = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read a message from a pipe; from this package's own process only, since it is a pickle.

    Raises
    ------
    EOFError
        If there is none.
    """
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<Q", header)[0]))  # noqa: S301
