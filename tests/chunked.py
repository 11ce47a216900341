"""Kernels of CPUs whose keys come in chunks, which planners choose for large windows alone: made for small ones."""

from __future__ import annotations

from na_compiler.compiler import build
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.kernel import Kernel, make_kernel
from na_compiler.schedules.cpu.config import QueriesInLanes
from na_compiler.schedules.cpu.plan import Tiling
from na_compiler.target import Target

__all__ = ["compile_in_chunks"]

_CHUNKS = Tiling(
    tile=(1, 1, 8), patch=(1, 1, 4), strip=(1, 1, 4), chunk=(1, 1, 16), key_block=(1, 1, 4), vector=4, grad_block=4,
    additional_block=4,
)  # fmt: skip


def compile_in_chunks(problem: Problem, direction: str) -> Kernel:
    """Compile a kernel that visits 16 keys of the last axis at a time."""
    spec = KernelSpec(problem, direction, Target.parse("llvm"), QueriesInLanes(_CHUNKS, 8))
    assert spec.plan.is_chunked
    function, module = build.build_in_memory(spec)
    return make_kernel(spec.info, function, module)
