"""Which threads run the parallel loops of kernels: the host's choice, made here and nowhere else.

A process with torch runs them on torch's own pool, so that two pools do not fight for the cores, and
``torch.set_num_threads`` counts. A process without it runs them on TVM's, with as many threads as it may use cores.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from na_compiler.runtime.host import HostCompileError, HostLibrary, NoCompilerError, digest

__all__ = ["attach", "cores", "launcher_library", "prepare", "use_launcher", "warm"]

_LOG = logging.getLogger("na_compiler")
_SOURCE = Path(__file__).with_name("launcher.c")
_SLOT = "__TVMBackendParallelLaunch"

# Slots of the libraries that run on TVM's own pool: what a forked child has to change.
_slots: list[ctypes.c_void_p] = []
_given_launcher: list[Path] = []


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare() -> None:
    """Set the size of TVM's own pool, before its first use; without this TVM takes half of the cores."""
    os.environ.setdefault("TVM_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(cores())))
    # Threads bound to cores wait for one that another program uses, while others are free.
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def use_launcher(path: Path) -> None:
    """Use a launcher that was compiled before, such as a bundle's, where none can be compiled here."""
    if path not in _given_launcher:
        _given_launcher.append(path)


def warm() -> None:
    """Load what the first kernel would load: the launcher for torch's threads, in a process that has torch."""
    if sys.modules.get("torch") is not None:
        _torch_launch()


def attach(path: Path) -> None:
    """Point the parallel loops of a loaded library at the host's pool."""
    slot = _slot(path)
    if slot is None:
        return
    launch = _torch_launch() if sys.modules.get("torch") is not None else None
    if launch is not None:
        slot.value = launch  # It knows of forks itself.
        return
    if not _slots and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
    _slots.append(slot)


class _Environment(ctypes.Structure):
    """TVM's TVMParallelGroupEnv (tvm/runtime/c_backend_api.h)."""

    _fields_: ClassVar = [("sync_handle", ctypes.c_void_p), ("num_task", ctypes.c_int32)]


_Loop = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Environment), ctypes.c_void_p)


def _launch_serially(loop: Callable[[int, _Environment, int], int], data: int, tasks: int) -> int:  # noqa: ARG001
    return int(loop(0, _Environment(None, 1), data))


# Kept for as long as the process: libraries have its address.
_SERIAL_LAUNCHER = ctypes.CFUNCTYPE(ctypes.c_int, _Loop, ctypes.c_void_p, ctypes.c_int)(_launch_serially)


def _after_fork() -> None:
    """Run loops in the one thread that a forked child has: TVM would wait for the others for ever."""
    address = ctypes.cast(_SERIAL_LAUNCHER, ctypes.c_void_p).value
    for slot in _slots:
        slot.value = address


def _slot(path: Path) -> ctypes.c_void_p | None:
    library = ctypes.CDLL(str(path))
    try:
        return ctypes.c_void_p.in_dll(library, _SLOT)
    except ValueError:
        return None  # A kernel without parallel loops.


@functools.cache
def _torch_launch() -> int | None:
    """Return the address of a launcher that runs loops on torch's pool; ``None`` where there is none to be had."""
    launcher = _launcher()
    if launcher is None:
        _LOG.warning(
            "no C compiler was found: kernels run on TVM's threads beside torch's, which costs time; "
            "install one, or set CC"
        )
        return None
    import torch  # noqa: PLC0415

    host = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    launcher.na_compiler_use_pool(
        ctypes.cast(host.torch_parallel_for, ctypes.c_void_p), ctypes.cast(host.torch_get_num_threads, ctypes.c_void_p)
    )
    return ctypes.cast(launcher.na_compiler_launch, ctypes.c_void_p).value


@functools.cache
def _launcher() -> ctypes.CDLL | None:
    for path in _given_launcher:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # Made on a system whose C library is newer.
            _LOG.warning("the launcher in %s cannot be loaded here: %s", path, error)
    compiled = launcher_library()
    return None if compiled is None else ctypes.CDLL(str(compiled))


def launcher_library(compiler: tuple[str, ...] | None = None) -> Path | None:
    """Return the compiled launcher, from the cache or compiled now; ``None`` without a C compiler.

    Parameters
    ----------
    compiler
        For another architecture: the C compiler for it.
    """
    # The name is its own in each version: a process that has a library of a name is not given another one.
    name, options = f"launcher-{digest(_SOURCE)}.so", ("-O2", "-std=c11", "-pthread")
    library = HostLibrary(name, "the launcher", (_SOURCE,), options, compiler=compiler)
    try:
        return library.build()
    except NoCompilerError:
        return None
    except (OSError, HostCompileError) as error:
        _LOG.warning("%s", error)
        return None
