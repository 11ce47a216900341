"""A whole model as one library: everything through Relax, neighborhood attention and linear layers by our schedules.

What runs it needs apache-tvm-ffi and TVM's runtime library; neither torch, nor ONNX Runtime, nor TVM's compiler.
"""

from __future__ import annotations

from na_compiler.whole.build import compile_whole

__all__ = ["compile_whole"]
