"""Transposition of square float32 tiles in registers, as a tensor intrinsic."""

from __future__ import annotations

import functools
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

__all__ = ["transpose_intrin"]


@functools.cache
def transpose_intrin(size: int) -> str:
    """Register the transposition of ``size`` rows of ``size`` floats and return its name; ``size`` is a power of 2.

    A network of ``log2(size)`` stages, each of which swaps halves of ever larger squares between two rows: what
    LLVM makes of it are in-register shuffles, where a plain loop nest would scatter single elements.
    """
    vector = f"float32x{size}"

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def description(source: T.handle, target: T.handle):  # type: ignore[no-untyped-def]  # noqa: ANN202
        source_stride = T.int32()
        target_stride = T.int32()
        A = T.match_buffer(source, (size, size), "float32", offset_factor=1, strides=[source_stride, 1])
        B = T.match_buffer(target, (size, size), "float32", offset_factor=1, strides=[target_stride, 1])
        with T.sblock("root"):
            T.reads(A[0:size, 0:size])
            T.writes(B[0:size, 0:size])
            for i, j in T.grid(size, size):
                with T.sblock("transpose"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    B[vi, vj] = A[vj, vi]

    def store(A: Any, B: Any) -> None:
        for i, row in enumerate(_network([A.vload([i, 0], vector) for i in range(size)])):
            T.buffer_store(B, row, [i, T.ramp(0, 1, size)])

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def implementation(source: T.handle, target: T.handle):  # type: ignore[no-untyped-def]  # noqa: ANN202
        source_stride = T.int32()
        target_stride = T.int32()
        A = T.match_buffer(source, (size, size), "float32", offset_factor=1, strides=[source_stride, 1])
        B = T.match_buffer(target, (size, size), "float32", offset_factor=1, strides=[target_stride, 1])
        with T.sblock("root"):
            T.reads(A[0:size, 0:size])
            T.writes(B[0:size, 0:size])
            store(A, B)

    name = f"na_compiler.transpose_{size}x{size}"
    TensorIntrin.register(name, description, implementation, override=True)
    return name


def _network(rows: list[Any]) -> list[Any]:
    size = len(rows)
    step = 1
    while step < size:
        lower = [lane if not lane & step else size + lane - step for lane in range(size)]
        upper = [lane + step if not lane & step else size + lane for lane in range(size)]
        swapped = list(rows)
        for first in range(size):
            if not first & step:
                pair = [rows[first], rows[first + step]]
                swapped[first], swapped[first + step] = _shuffle(pair, lower), _shuffle(pair, upper)
        rows = swapped
        step *= 2
    return rows


def _shuffle(vectors: list[Any], lanes: list[int]) -> Any:
    return tirx.Shuffle(vectors, [tirx.IntImm("int32", lane) for lane in lanes])
