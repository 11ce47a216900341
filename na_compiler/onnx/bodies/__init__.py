"""Bodies of the operators in ONNX's own: what any runtime computes that does not know them."""

from __future__ import annotations

from na_compiler.onnx.bodies.attach import BODIES, MINIMUM_OPSET, add_bodies
from na_compiler.onnx.bodies.blocked import blocked_body
from na_compiler.onnx.bodies.generic import generic_body
from na_compiler.onnx.bodies.standard import inline_bodies

__all__ = ["BODIES", "MINIMUM_OPSET", "add_bodies", "blocked_body", "generic_body", "inline_bodies"]
