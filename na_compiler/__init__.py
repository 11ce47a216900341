"""A compiler for neighborhood attention."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from na_compiler import after_torch
from na_compiler.place import Place
from na_compiler.problem import Problem

if TYPE_CHECKING:  # What `__getattr__` finds; type checkers do not call it.
    from na_compiler.compiler.bundle import save_bundle
    from na_compiler.compiler.kernels import compile  # noqa: A004
    from na_compiler.compiler.spec import KernelSpec
    from na_compiler.functional import na1d, na2d, na3d
    from na_compiler.integrations import convert
    from na_compiler.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
    from na_compiler.ops.torchscript import fvcore_handles
    from na_compiler.runtime.bundle import load_bundle
    from na_compiler.runtime.jit import MissingKernelError, compiling, specialize
    from na_compiler.tuning import tune

__all__ = [
    "KernelSpec",
    "MissingKernelError",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Place",
    "Problem",
    "compile",
    "compiling",
    "convert",
    "fvcore_handles",
    "load_bundle",
    "na1d",
    "na2d",
    "na3d",
    "save_bundle",
    "specialize",
    "tune",
]
__version__ = "0.1.0"

# Where each name is defined; loaded when it is first asked for, so that importing the package stays light.
_LAZY = {
    "KernelSpec": "na_compiler.compiler.spec",
    "MissingKernelError": "na_compiler.runtime.jit",
    "NeighborhoodAttention1D": "na_compiler.modules",
    "NeighborhoodAttention2D": "na_compiler.modules",
    "NeighborhoodAttention3D": "na_compiler.modules",
    "compile": "na_compiler.compiler.kernels",
    "compiling": "na_compiler.runtime.jit",
    "convert": "na_compiler.integrations",
    "fvcore_handles": "na_compiler.ops.torchscript",
    "load_bundle": "na_compiler.runtime.bundle",
    "na1d": "na_compiler.functional",
    "na2d": "na_compiler.functional",
    "na3d": "na_compiler.functional",
    "save_bundle": "na_compiler.compiler.bundle",
    "specialize": "na_compiler.runtime.jit",
    "tune": "na_compiler.tuning",
}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'na_compiler' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


after_torch.register()
if os.environ.get("NA_COMPILER_NATTEN"):
    importlib.import_module("na_compiler.compat.natten").install_from_environment()
