"""Building a library: description, schedule, machine code. The only module that loads TVM's compiler."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from na_compiler.compiler import cuda
from na_compiler.compiler.spec import KernelSpec
from na_compiler.runtime import threads
from na_compiler.runtime.host import c_compiler
from na_compiler.schedules.choose import family_of
from na_compiler.schedules.family import Lowered
from na_compiler.target import CpuTarget, CudaTarget

__all__ = ["build_in_memory", "build_library", "can_link", "compile_lowered", "lowered"]

_LOG = logging.getLogger("na_compiler")
# TVM's builder keeps the function it is at in a global.
_LOCK = threading.Lock()


def can_link() -> bool:
    """Return whether there is a C compiler, with which TVM makes shared libraries."""
    return c_compiler() is not None


def build_library(spec: KernelSpec, path: Path) -> None:
    """Compile a spec to a shared library, or to an object file where this machine cannot link for the target.

    Raises
    ------
    RuntimeError
        If a compiler or the linker fails, or is not there.
    """
    _LOG.info("compiling %s", spec)
    started = time.perf_counter()
    if isinstance(spec.target, CudaTarget):
        cuda.build_library(spec, path)
    else:
        assert isinstance(spec.target, CpuTarget)
        module = _compile(spec)
        compiler = c_compiler() if spec.target.is_native else shutil.which(f"{spec.target.triple}-gcc")
        if compiler or spec.target.is_native:
            _link(module, path, compiler)
        else:
            module.mod.write_to_file(str(path), "o")
    _LOG.info("compiled %s in %.2f s", spec, time.perf_counter() - started)


def _link(module: Any, path: Path, compiler: str | None) -> None:
    try:
        module.export_library(str(path), cc=compiler)
    except RuntimeError as error:
        # The linker says so in its own words; callers know what to do about an OSError.
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def build_in_memory(spec: KernelSpec) -> tuple[Any, Any]:
    """Compile a spec to a function in this process; returns it and what has to be kept for it."""
    threads.prepare()
    module = _compile(spec)
    return module["main"], module


def lowered(spec: KernelSpec) -> Lowered:
    """Return the TensorIR of a spec, and how TVM is to compile it. Loads TVM."""
    return family_of(spec.config).lower(spec.problem, spec.config, spec.direction)


def compile_lowered(made: Lowered, target: Any) -> Any:
    """Compile TensorIR to a module of TVM's, for a target of TVM's."""
    import tvm  # noqa: PLC0415

    with tvm.transform.PassContext(config=dict(made.options), disabled_pass=list(made.skipped)):
        return tvm.compile(made.function, target=target, tir_pipeline=made.pipeline)


def _compile(spec: KernelSpec) -> Any:
    with _LOCK:
        return compile_lowered(lowered(spec), spec.target.to_tvm())
