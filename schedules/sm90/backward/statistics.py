"""The first kernel of a backward: what both sweeps want to know of each query.

Two numbers: ``lse`` in units of the exponent, and ``delta = sum(grad_output * output) - grad_lse``, which all gradients
of the query's weights are less. They are kept by dilation group, so that a tile of queries is a box of them: TMA steps
along no innermost axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.shared.statistics import exponent_of, widened
from na_compiler.schedules.shared.trace import (
    I,
    T,
    both,
    emit,
    flat,
    index64,
    let,
    local,
    put,
    register,
    strided_offset,
    when,
)  # fmt: skip
from na_compiler.schedules.sm90.backward.arguments import BackwardArguments
from na_compiler.schedules.sm90.backward.plan import BackwardPlan, SweepPlan
from na_compiler.schedules.sm90.backward.work import QueryRow

__all__ = ["launch_statistics"]

Expr = Any
_THREADS = 256
_VECTOR = 8  # Elements that a lane reads at once: 16 bytes.


def launch_statistics(
    plan: BackwardPlan | SweepPlan, arguments: BackwardArguments, cleared: Sequence[str] = ()
) -> None:
    """Emit the kernel, inside a launch.

    Parameters
    ----------
    plan
        Of the backward.
    arguments
        Of the function.
    cleared
        Workspace that is set to zeros as well: not more numbers than there are queries.
    """
    problem = plan.problem
    # Lanes that share a row; two rows of 32 elements are one cache line.
    lanes = 8 if problem.head_dim_v > 32 else 4
    rows = QueryRow.count(plan)
    count = T.Cast("int32", arguments.batch * rows)
    per_block = _THREADS // lanes
    block = I.cta_id([T.Cast("int32", (arguments.batch * rows + (per_block - 1)) // per_block)])
    thread = I.thread_id([_THREADS])
    number = let(block * per_block + thread // lanes)
    lane = let(thread % lanes)
    for name in cleared:
        numbers = T.Cast("int32", arguments.batch * math.prod(int(extent) for extent in arguments[name].shape[1:]))
        with when(both(lane == 0, number < numbers)):
            I.buffer_store(flat(arguments[name]), T.float32(0), [index64(number)])
    # Threads beyond the last row do as it does, but store nothing: lanes exchange what they have.
    rest: Expr = register(T.max(T.min(number, count - 1), 0))
    row = QueryRow(plan, rest)
    place = row.place
    total = _dot(arguments, place, lane, lanes)
    offset = strided_offset(arguments["lse"], place)
    with when(both(lane == 0, number < count)):
        exponent = exponent_of(flat(arguments["lse"])[offset])
        grad_lse = flat(arguments["grad_lse"])[offset]
        # In a register: within the choice below, what is read for a row that does not exist would be read where it is
        # not, since TVM drops the bound of a place from what is chosen only where there is one.
        delta = register(total - T.if_then_else(row.batch < arguments.given, grad_lse, T.float32(0)), "float32")
        statistics = flat(arguments["statistics"])
        for plane, value in enumerate((exponent, delta)):
            kept = value if row.exists is None else T.Select(row.exists, value, T.float32(0))
            I.buffer_store(statistics, kept, [row.statistics(plane)])


def _dot(arguments: BackwardArguments, place: list[Expr], lane: Expr, lanes: int) -> Expr:
    """Return the sum of grad_output times output, which all lanes of a row get."""
    output, gradient = arguments["output"], arguments["grad_output"]
    width = int(output.shape[-1])
    sums, other = local(1), local(1)
    put(sums, 0, T.float32(0))
    starts = [let(strided_offset(buffer, place)) for buffer in (output, gradient)]
    for first in range(0, width, lanes * _VECTOR):
        column = lane * _VECTOR + first
        with when(column < width if first + lanes * _VECTOR > width else None):
            parts = []
            for buffer, start in zip((output, gradient), starts, strict=True):
                words = local(4, "uint32")
                address = flat(buffer).ptr_to([start + index64(column)])
                emit(T.ptx["ld.global.nc.v4.u32"](*(words[i] for i in range(4)), address))
                parts.append(words)
            for word in range(4):
                for half in range(2):
                    a, b = (widened(words[word], half, str(output.dtype)) for words in parts)
                    put(sums, 0, sums[0] + a * b)
    distance = 1
    while distance < lanes:
        emit(T.ptx.shfl_sync.bfly.b32(other[0], sums[0], T.uint32(distance), T.uint32(0x1F), T.uint32(0xFFFFFFFF)))
        put(sums, 0, sums[0] + other[0])
        distance *= 2
    return sums[0]
