"""Building for CUDA, on any machine: no GPU and no driver are needed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from na_compiler.compiler.messages import Build
from na_compiler.compiler.nvcc import check_library
from na_compiler.compiler.workers import POOL

if TYPE_CHECKING:
    from na_compiler.compiler.spec import KernelSpec

__all__ = ["build_library", "generate"]

_LOG = logging.getLogger("na_compiler")


def build_library(spec: KernelSpec, path: Path) -> Build:
    """Compile a spec to a library with the GPU's machine code in it.

    Raises
    ------
    RuntimeError
        If there is no nvcc or C compiler, or one of them fails, or the library is not what it should be.
    """
    build = POOL.build(spec, path)
    check_library(path)
    _LOG.debug("nvcc: %s", build.log)
    return build


def generate(spec: KernelSpec) -> str:
    """Return the CUDA C++ that a spec comes to; needs no nvcc."""
    return POOL.build(spec, None).source
