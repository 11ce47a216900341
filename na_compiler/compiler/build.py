"""Building a library: description, schedule, machine code. The only module that loads TVM's compiler."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_compiler.compiler.messages import Build
from na_compiler.compiler.nvcc import Nvcc, check_library
from na_compiler.compiler.spec import KernelSpec
from na_compiler.compiler.workers import POOL, Pool
from na_compiler.runtime import threads
from na_compiler.runtime.folders import process_folder
from na_compiler.runtime.host import c_compiler
from na_compiler.schedules.choose import family_of
from na_compiler.schedules.family import Lowered
from na_compiler.target import CpuTarget, CudaTarget

if TYPE_CHECKING:
    import tvm
    from tvm.runtime import Executable

__all__ = ["build_in_memory", "build_library", "can_link", "compile_here", "compile_lowered", "lowered"]

_LOG = logging.getLogger("na_compiler")
# TVM's builder keeps the function it is at in a global.
_LOCK = threading.Lock()
# A forked child compiles in a process of its own: its parent may have been compiling, and have held locks of TVM's.
_PROCESS = os.getpid()


def can_link() -> bool:
    """Return whether there is a C compiler, with which TVM makes shared libraries."""
    return c_compiler() is not None


def build_library(spec: KernelSpec, path: Path, pool: Pool | None = None) -> Build:
    """Compile a spec to a shared library, or to an object file where this machine cannot link for the target.

    Parameters
    ----------
    spec
        What to compile.
    path
        Where to write the library.
    pool
        Whose processes compile. Default: this process does, for a CPU, and one of the common pool for a GPU.

    Raises
    ------
    RuntimeError
        If a compiler or the linker fails, or is not there.
    OSError
        If the library cannot be written.
    """
    _LOG.info("compiling %s", spec)
    started = time.perf_counter()
    if pool is None and spec.target.device_type == "cpu" and os.getpid() == _PROCESS:
        built = compile_here(spec, str(path), None, c_compiler())
    else:
        built = (pool or POOL).build(spec, path)
    if spec.target.device_type == "cuda":
        check_library(path)
    _LOG.info("compiled %s in %.2f s", spec, time.perf_counter() - started)
    return built


def compile_here(spec: KernelSpec, path: str | None, nvcc: str | None, linker: tuple[str, ...] | None) -> Build:
    """Compile a spec in this process.

    For CUDA that has to be one of `na_compiler.compiler.workers`. The parameters are those of a `Request`.
    """
    _load_tvm()
    if isinstance(spec.target, CudaTarget):
        return _compile_for_cuda(spec, path, nvcc, linker)
    assert isinstance(spec.target, CpuTarget)
    assert path is not None
    module = _compile(spec)
    other = shutil.which(f"{spec.target.triple}-gcc")
    compiler = linker if spec.target.is_native else (other,) if other else None
    if compiler or spec.target.is_native:
        _link(module, path, compiler)
    else:
        module.mod.write_to_file(path, "o")
    return Build()


def _load_tvm() -> None:
    """Load TVM, whose part that remembers things between processes wants a home folder, also where a user has none."""
    if "tvm" in sys.modules or os.path.expanduser("~") != "~":  # noqa: PTH111 - Path's raises where there is none
        return
    named = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = named or str(process_folder())
    try:
        importlib.import_module("tvm.contrib.pickle_memoize")
    finally:
        if named is None:
            del os.environ["XDG_CACHE_HOME"]


def _compile_for_cuda(spec: KernelSpec, path: str | None, nvcc: str | None, linker: tuple[str, ...] | None) -> Build:
    import tvm  # noqa: PLC0415

    assert isinstance(spec.target, CudaTarget)
    compiler = Nvcc(spec.target, nvcc)
    tvm.register_global_func("tvm_callback_cuda_compile", compiler.__call__, override=True)
    target = tvm.target.Target(spec.target.to_tvm())
    with _LOCK, target:
        made = lowered(spec)
        compiler.options = made.nvcc
        module = compile_lowered(made, target)
    if path is not None:
        _link(module, path, linker)
    return Build(compiler.source, compiler.log)


def _link(module: Executable, path: str, compiler: tuple[str, ...] | None) -> None:
    command, *options = compiler or (None,)
    try:
        module.export_library(path, cc=command, **({"options": options} if options else {}))
    except RuntimeError as error:
        # The linker says so in its own words; callers know what to do about an OSError.
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error
        raise


def build_in_memory(spec: KernelSpec) -> tuple[Callable[..., None], Executable]:
    """Compile a spec to a function in this process; returns it and what has to be kept for it."""
    threads.prepare()
    _load_tvm()
    module = _compile(spec)
    return module["main"], module


def lowered(spec: KernelSpec) -> Lowered:
    """Return the TensorIR of a spec, and how TVM is to compile it. Loads TVM."""
    return family_of(spec.config).lower(spec.problem, spec.config, spec.direction)


def compile_lowered(made: Lowered, target: tvm.target.Target | dict[str, Any]) -> Executable:
    """Compile TensorIR to a module of TVM's, for a target of TVM's."""
    import tvm  # noqa: PLC0415

    with tvm.transform.PassContext(config=dict(made.options), disabled_pass=list(made.skipped)):
        return tvm.compile(made.function, target=target, tir_pipeline=made.pipeline)


def _compile(spec: KernelSpec) -> Executable:
    with _LOCK:
        return compile_lowered(lowered(spec), spec.target.to_tvm())
