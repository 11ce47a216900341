"""ONNX: operators for neighborhood attention, their export, their bodies, and their library for ONNX Runtime.

Needs the extra ``onnx``. Importing this registers the schemas of the operators with the onnx package.
"""

from __future__ import annotations

import importlib
from typing import Any

from na_compiler.onnx.schema import register_schemas, schema
from na_compiler.onnx.signature import DOMAIN, OPERATORS, VERSION

__all__ = [
    "DOMAIN",
    "OPERATORS",
    "VERSION",
    "add_bodies",
    "build_library",
    "export",
    "inline_bodies",
    "problems",
    "reference_ops",
    "register",
    "register_schemas",
    "schema",
    "translation_table",
]

# Where each name is defined; loaded when it is first asked for: exporting needs torch, running does not.
_LAZY = {
    "add_bodies": "na_compiler.onnx.bodies",
    "build_library": "na_compiler.onnx.ort.build",
    "export": "na_compiler.onnx.exporter",
    "inline_bodies": "na_compiler.onnx.bodies",
    "problems": "na_compiler.onnx.nodes",
    "reference_ops": "na_compiler.onnx.reference_ops",
    "register": "na_compiler.onnx.ort.register",
    "translation_table": "na_compiler.onnx.exporter",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - each name has a type of its own
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'na_compiler.onnx' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value
