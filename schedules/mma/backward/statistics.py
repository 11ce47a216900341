"""The statistics of a warp's queries: made where they are owned, and kept for the keys' kernel."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.mma.backward.arguments import Statistics, number_of
from na_compiler.schedules.mma.backward.products import SweepProducts
from na_compiler.schedules.mma.plan import GROUP
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.statistics import exponent_of, widened
from na_compiler.schedules.shared.trace import I, T, both, emit, flat, index64, local, put, register, when
from na_compiler.schedules.shared.work import Work

__all__ = ["make_statistics"]

Expr = Any
_HALVES = 2


def make_statistics(products: SweepProducts, rows: Rows, work: Work) -> list[list[Expr]]:
    """Emit the statistics of the thread's two rows, and their way to the workspace; rows and outputs have come."""
    plan, block = products.plan, products.block
    totals = _dot(products)
    kept = Statistics(plan.problem, block.arguments["statistics"], work.batch, work.head, work.group)
    found = []
    for half, row in enumerate(rows.rows):
        queries = rows.position(row, work.first)
        clamped = [work.clamp(axis, query) for axis, query in enumerate(queries)]
        place = number_of(work, clamped, work.head)
        exponent = register(exponent_of(flat(block.arguments["lse"])[place]), "float32")
        grad_lse = flat(block.arguments["grad_lse"])[place]
        given = T.if_then_else(index64(work.batch) < block.arguments.given, grad_lse, T.float32(0))
        delta = register(totals[half] - given, "float32")
        with when(both(T.bitwise_and(block.lane, 3) == 0, work.within(queries, plan.own_tile))):
            at = kept.at(clamped)
            for i, value in enumerate((exponent, delta)):
                I.buffer_store(kept.buffer, value, [at + i])
        found.append([exponent, delta])
    return found


def _dot(products: SweepProducts) -> Any:
    """Return the sums of grad_output times output of the thread's two rows."""
    plan = products.plan
    totals, other, outputs = local(_HALVES), local(1), local(4, "uint32")
    for half in range(_HALVES):
        put(totals, half, T.float32(0))
    address = products.own_address(1, plan.own_offset(2))
    for step in range(plan.own(1).width // GROUP):
        gradients, first = products.own_at(1, step)
        products.load_step(outputs, 0, address, 1, step)
        for i in range(4):
            for part in range(2):
                a, b = (widened(word, part, products.block.dtype) for word in (gradients[first + i], outputs[i]))
                put(totals, i % 2, totals[i % 2] + a * b)
    # Over the four lanes that share a row.
    for half in range(_HALVES):
        for distance in (1, 2):
            emit(
                T.ptx.shfl_sync.bfly.b32(
                    other[0], totals[half], T.uint32(distance), T.uint32(0x1F), T.uint32(0xFFFFFFFF)
                )
            )
            put(totals, half, totals[half] + other[0])
    return totals
