"""The last kernel: gradients of queries from the order of registers, in float32, to their place in the tensor."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import I, T, emit, flat, index64, let, local, when
from na_compiler.schedules.sm90.backward.fused.arguments import FusedArguments
from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan
from na_compiler.schedules.sm90.backward.fused.work import QueryTile
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.products import conversion

__all__ = ["launch_convert"]

Expr = Any
_THREADS = 256
_WARPGROUP = 128
_QUADS = 4  # Threads of a warp that share rows.


def launch_convert(plan: FusedPlan, arguments: FusedArguments) -> None:
    """Emit the kernel, inside a launch: a block for each tile of queries.

    Eight columns of two rows, 8 apart, lie in four threads' accumulators one after another: 64 bytes. A thread has
    these; columns of eight count fastest, then rows, warps, warpgroups.
    """
    heads, groups, tiles = plan.turns_shape
    number = I.cta_id([T.Cast("int32", arguments.batch * (heads * groups * tiles))])
    thread = I.thread_id([_THREADS])
    eights, floats = plan.part_columns // 8, plan.part_bytes // 4
    parts = flat(arguments["parts"])
    tile = QueryTile(plan, number)
    for start in range(0, floats // 16, _THREADS):
        item = let(start + thread)
        eight, rest = let(item % eights), item // eights
        row, warp, warpgroup = let(rest % 8), let(rest // 8 % 4), let(rest // 32)
        first = warpgroup * (ROWS * plan.part_columns) + eight * (4 * _WARPGROUP) + (warp * 32 + row * _QUADS) * 4
        words = local(16, "uint32")
        with when(item < floats // 16):
            for quad in range(_QUADS):
                address = parts.ptr_to([index64(number) * floats + index64(first + 4 * quad)])
                emit(T.ptx["ld.global.nc.v4.u32"](*(words[4 * quad + i] for i in range(4)), address))
            column = warpgroup * plan.part_columns + eight * 8
            for half in range(2):
                _store(arguments, tile, let(warp * 16 + row + 8 * half), column, [words[i] for i in _pairs(half)])


def _pairs(half: int) -> list[int]:
    return [4 * quad + 2 * half + e for quad in range(_QUADS) for e in range(2)]


def _store(arguments: FusedArguments, tile: QueryTile, row: Expr, column: Expr, words: list[Expr]) -> None:
    """Scale, round and store eight columns of a row."""
    dtype = arguments.plan.problem.dtype
    pairs = local(4, "uint32")
    for place in range(4):
        # Scores are scaled, so their gradients are.
        low, high = (T.reinterpret("float32", word) * arguments.scale for word in words[2 * place : 2 * place + 2])
        emit(conversion(dtype)(pairs[place], high, low))
    gradient = arguments["grad_query"]
    exists, address = tile.address(gradient, row)
    with when(exists):
        place = flat(gradient).ptr_to([address + index64(column)])
        emit(T.ptx["st.global.v4.u32"](place, *(pairs[i] for i in range(4))))
