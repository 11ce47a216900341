"""A compiler for neighborhood attention."""

from __future__ import annotations

import importlib
from typing import Any

from na_compiler.problem import Problem

__all__ = ["Problem", "compile", "load_bundle"]
__version__ = "0.1.0"

# Where each name is defined; loaded when it is first asked for, so that importing the package stays light.
_LAZY = {
    "compile": "na_compiler.compiler.kernels",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'na_compiler' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value
