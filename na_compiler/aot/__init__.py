"""Deployment without Python: packages of AOTInductor, and the library of operators that a C++ program loads for them.

Examples
--------
>>> program = torch.export.export(model, (image,))  # doctest: +SKIP
>>> package(program, "model.pt2", bundle="kernels")  # doctest: +SKIP
>>> build_library("deployment")  # doctest: +SKIP
"""

from __future__ import annotations

from na_compiler.aot.build import build_library, header_folder
from na_compiler.aot.package import package

__all__ = ["build_library", "header_folder", "package"]
