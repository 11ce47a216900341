"""Schedule of a linear layer, ``output = input @ weight^T + bias``, for whole models without torch.

The weights are constants, packed when the model is compiled: panels of output columns that lie together for each input
column. A task keeps a block of output rows and one panel in registers, and runs once over the input columns. How many
rows there are is not known before the model runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from na_compiler.target import CpuTarget

__all__ = ["dense", "pack", "panel"]

# Blocks of rows of a task: enough that a panel is read from memory once for many rows.
_BLOCKS = 8


def panel(target: CpuTarget) -> int:
    """Return the output columns of a panel: two vectors, so that a broadcast input element is used twice."""
    return 2 * target.vector


def _rows(target: CpuTarget) -> int:
    """Return the rows of a block: with two vectors each, most registers; beside them two weights and an input.

    TVM keeps local arrays of 1024 bytes and more in memory, which bounds them as well.
    """
    return 6 if target.registers == 16 else min(14, (1024 - 1) // (8 * target.vector))


def pack(weight: NDArray[Any], target: CpuTarget) -> NDArray[Any]:
    """Return the weights ``[outputs, inputs]`` of a linear layer as panels, ``[panels, inputs, columns]``."""
    outputs, inputs = weight.shape
    columns = panel(target)
    panels = -(-outputs // columns)
    padded = np.zeros((panels * columns, inputs), weight.dtype)
    padded[:outputs] = weight
    return np.ascontiguousarray(padded.reshape(panels, columns, inputs).transpose(0, 2, 1))


def dense(inputs: int, outputs: int, target: CpuTarget, *, has_bias: bool) -> tirx.PrimFunc:
    """Return ``main(input, weight[, bias], output)`` for float32: ``[rows, inputs]`` to ``[rows, outputs]``.

    Parameters
    ----------
    inputs, outputs
        Columns.
    target
        What to compile for.
    has_bias
        Whether there is a bias, ``[outputs]``.

    Notes
    -----
    Rows beyond the last are the last one again: it is computed, and stored, more than once.
    """
    vector, columns, height = target.vector, panel(target), _rows(target)
    panels = -(-outputs // columns)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            rows = tirx.Var("rows", "int64")
            names = ("input", "weight", "bias", "output") if has_bias else ("input", "weight", "output")
            shapes = {
                "input": (rows, inputs),
                "weight": (panels, inputs, columns),
                "bias": (outputs,),
                "output": (rows, outputs),
            }
            handles = [T.arg(name, T.handle()) for name in names]
            buffers = {
                name: IRBuilder.name(name, T.match_buffer(handle, shapes[name], "float32", align=4))
                for name, handle in zip(names, handles, strict=True)
            }
            blocks = tirx.floordiv(rows + (height - 1), tirx.IntImm("int64", height))
            groups = tirx.floordiv(blocks + (_BLOCKS - 1), tirx.IntImm("int64", _BLOCKS))
            with T.parallel(0, groups * panels) as task:
                group = tirx.floordiv(task, tirx.IntImm("int64", panels))
                part = tirx.floormod(task, tirx.IntImm("int64", panels))
                with T.serial(0, tirx.min(tirx.IntImm("int64", _BLOCKS), blocks - group * _BLOCKS)) as inner:
                    first = (group * _BLOCKS + inner) * height
                    _block(buffers, rows, first, part, (inputs, outputs, height, vector))
        return builder.get()


def _block(buffers: dict[str, Any], rows: Any, first: Any, part: Any, sizes: tuple[int, int, int, int]) -> None:
    """Emit one block of rows of one panel."""
    inputs, outputs, height, vector = sizes
    x, weight, output = buffers["input"], buffers["weight"], buffers["output"]
    columns = 2 * vector
    place = [tirx.min(first + row, rows - 1) for row in range(height)]
    sums = T.alloc_buffer((height, 2, vector), "float32", scope="local")
    for row in range(height):
        for half in range(2):
            with T.vectorized(0, vector) as lane:
                T.buffer_store(sums, _start(buffers, part * columns + half * vector + lane, outputs), [row, half, lane])
    with T.serial(0, inputs) as depth:
        for row in range(height):
            for half in range(2):
                with T.vectorized(0, vector) as lane:
                    product = x[place[row], depth] * weight[part, depth, half * vector + lane]
                    T.buffer_store(sums, sums[row, half, lane] + product, [row, half, lane])
    for row in range(height):
        for half in range(2):
            column = part * columns + half * vector
            if outputs % columns == 0:
                with T.vectorized(0, vector) as lane:
                    T.buffer_store(output, sums[row, half, lane], [place[row], column + lane])
            else:
                with T.serial(0, vector) as lane, T.If(column + lane < outputs), T.Then():
                    T.buffer_store(output, sums[row, half, lane], [place[row], column + lane])


def _start(buffers: dict[str, Any], column: Any, outputs: int) -> Any:
    bias = buffers.get("bias")
    if bias is None:
        return T.float32(0)
    return bias[tirx.min(column, outputs - 1)]
