"""TVM's lowering for the CPU, and one pass more: blocks of accumulators stay on the stack, and so in registers."""

from __future__ import annotations

import functools
import math
from typing import Any

__all__ = ["NAME", "register"]

NAME = "na_compiler.cpu"

# As much as 32 registers of 512 bits hold. TVM itself turns any array of 1024 bytes or more into a heap allocation,
# which LLVM then has to keep in memory.
_REGISTER_BYTES = 32 * 64


@functools.cache
def register() -> str:
    """Register the pipeline with TVM, once, and return its name."""
    import tvm  # noqa: PLC0415
    from tvm import tirx  # noqa: PLC0415
    from tvm.tirx import compilation_pipeline  # noqa: PLC0415

    @tirx.transform.prim_func_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def keep_in_registers(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(_mark(function.body))

    def pipeline() -> tuple[Any, Any, Any]:
        lower, finish_host, finish_device = tirx.get_tir_pipeline("s_tir")
        return tvm.ir.transform.Sequential([lower, keep_in_registers]), finish_host, finish_device

    compilation_pipeline.PIPELINE_MAP[NAME] = pipeline
    return NAME


def _mark(statement: Any) -> Any:
    """Mark small arrays so that TVM leaves them where they are declared; walks what may hold declarations."""
    from tvm import tirx  # noqa: PLC0415

    if isinstance(statement, tirx.AllocBuffer):
        return (
            tirx.AllocBuffer(statement.buffer, {"disable_lower_builtin": tirx.IntImm("bool", 1)})
            if _is_small(statement)
            else statement
        )
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_mark(part) for part in statement.seq])
    if isinstance(statement, tirx.For):
        return tirx.For(
            statement.loop_var,
            statement.min,
            statement.extent,
            statement.kind,
            _mark(statement.body),
            statement.thread_binding,
            statement.annotations,
            statement.step,
        )
    if isinstance(statement, tirx.AttrStmt):
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, _mark(statement.body))
    if isinstance(statement, tirx.IfThenElse):
        otherwise = None if statement.else_case is None else _mark(statement.else_case)
        return tirx.IfThenElse(statement.condition, _mark(statement.then_case), otherwise)
    return statement


def _is_small(statement: Any) -> bool:
    import tvm  # noqa: PLC0415
    from tvm import tirx  # noqa: PLC0415

    buffer = statement.buffer
    if not all(isinstance(extent, tirx.IntImm) for extent in buffer.shape):
        return False
    kind = tvm.DataType(str(buffer.dtype))
    return math.prod(map(int, buffer.shape)) * int(kind.bits) * int(kind.lanes) <= 8 * _REGISTER_BYTES
