"""Small helpers for tracing a TensorIR function: plain Python drives TVM's builder, statement by statement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

__all__ = [
    "I", "T", "both", "emit", "flat", "hold", "index64", "let", "local", "maximum", "minimum", "put", "register",
    "strided_offset", "traced", "when",
]  # fmt: skip

Expr = Any


def traced(trace: Callable[[], None]) -> tirx.PrimFunc:
    """Return a library's one function, for TVM's ``tirx`` pipeline: host and device are what a call emits."""
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name("main")
            I.func_attr({"global_symbol": "main"})
            trace()
        return builder.get()


def emit(call: Expr) -> None:
    """Append a call as a statement; a traced body drops expressions that nothing uses."""
    I.evaluate(call)


def flat(buffer: Any) -> Any:
    """Return a buffer's elements in one axis, to be indexed by offsets of 64 bits."""
    return I.decl_buffer([2**62], str(buffer.dtype), data=buffer.data, scope="global")


def strided_offset(buffer: Any, place: Sequence[Expr]) -> Expr:
    """Return the offset of a place in a buffer, by its strides; of axes that are left out it is the first."""
    strides = list(buffer.strides)
    if not strides:
        shape = list(buffer.shape)
        strides = [math.prod(shape[axis + 1 :], start=1) for axis in range(len(shape))]
    offset: Expr = 0
    for at, stride in zip(place, strides, strict=False):
        offset = offset + index64(at) * (stride if isinstance(stride, int) else index64(stride))
    return offset


def put(buffer: Any, index: Any, value: Expr) -> None:
    """Store an element."""
    I.buffer_store(buffer, value, [index])


def let(value: Expr) -> Expr:
    """Name a value. The simplifier may still compute it again at each use; `register` keeps it."""
    return value if isinstance(value, int) else I.Bind(value)


def local(count: int, dtype: str = "float32") -> Any:
    """Allocate registers, which are indexed with Python ints."""
    return I.alloc_buffer([count], dtype, scope="local")


def register(value: Expr, dtype: str = "int32") -> Expr:
    """Compute a value once and keep it in a register."""
    if isinstance(value, int):
        return value
    buffer = local(1, dtype)
    put(buffer, 0, value)
    return buffer[0]


class when:  # noqa: N801  # Reads as a keyword.
    """``with when(condition):`` traces the statements that run if it holds; ``None`` always does."""

    def __init__(self, condition: Expr | None) -> None:
        self._frames = [] if condition is None else [I.If(condition), I.Then()]

    def __enter__(self) -> None:
        for frame in self._frames:
            frame.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for frame in reversed(self._frames):
            frame.__exit__(kind, error, trace)


def hold(frame: Any) -> None:
    """Enter a frame and keep it open until the enclosing one ends."""
    frame.add_callback(lambda: frame.__exit__(None, None, None))
    frame.__enter__()


def minimum(a: Expr, b: Expr) -> Expr:
    """Return the smaller one; an int of ints."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else T.min(a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    """Return the larger one; an int of ints."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else T.max(a, b)


def both(*conditions: Expr | None) -> Expr | None:
    """Return whether all hold; ``None`` stands for one that always does."""
    found = None
    for condition in conditions:
        if condition is not None:
            found = condition if found is None else T.And(found, condition)
    return found


def index64(value: Expr) -> Expr:
    """Widen an index, so that offsets beyond 2^31 come out right."""
    return tirx.Cast("int64", value) if not isinstance(value, int) else tirx.IntImm("int64", value)
