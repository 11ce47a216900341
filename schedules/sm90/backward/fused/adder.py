"""The warps that add: parts of gradients of queries to those in global memory, when it is their block's turn."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import I, T, emit, flat, index64, let, local, put, register, when
from na_compiler.schedules.sm90.backward.fused.block import PART_EMPTY, PART_FULL, FusedBlock
from na_compiler.schedules.sm90.backward.fused.work import FusedWork, GridCursor

__all__ = ["Adder"]

Expr = Any


class Adder:
    """Emits what one thread does, of a warp for each place that parts have in shared memory: so several are under way.

    Parameters
    ----------
    block
        The thread block.
    number
        Of the warp, and of its place.
    """

    def __init__(self, block: FusedBlock, number: Expr) -> None:
        self.block, self.plan, self.number = block, block.plan, number

    def add(self, work: FusedWork, extra: Expr) -> None:  # noqa: ARG002
        """Add all parts of the place, in the order of the tiles."""
        parts = self.plan.fused.parts
        cursor = work.cursor()
        total = let(work.total)
        tile = local(1, "int32")
        put(tile, 0, 0)
        with I.While(tile[0] < total):
            with when(tile[0] % parts == self.number):
                self._part(work, cursor, let((tile[0] // parts) % 2))
            cursor.advance()
            put(tile, 0, tile[0] + 1)

    def _part(self, work: FusedWork, cursor: GridCursor, phase: Expr) -> None:
        block, plan = self.block, self.plan
        heads, groups, tiles = plan.turns_shape
        before = register(work.before(cursor))
        at = (index64(work.batch) * heads + index64(cursor.head)) * groups + index64(cursor.group)
        place = let(at * tiles + index64(work.place(cursor)))
        turn = flat(block.arguments["turns"]).ptr_to([place])
        target = flat(block.arguments["parts"]).ptr_to([place * (plan.part_bytes // 4)])
        source = block.parts.ptr_to([self.number * (plan.part_bytes // 4)])
        self._wait_turn(turn, before)
        block.wait(PART_FULL, self.number, phase)
        size = T.uint32(plan.part_bytes)
        # The first one finds nothing to add to.
        with I.If(before == 0):
            with I.Then():
                emit(T.ptx["cp.async.bulk.global.shared::cta.bulk_group"](target, source, size))
            with I.Else():
                emit(T.ptx["cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"](target, source, size))
        emit(T.ptx["cp.async.bulk.commit_group"]())
        emit(T.ptx["cp.async.bulk.wait_group.read"](0))
        emit(T.ptx.mbarrier.arrive.shared.b64(block.barrier(PART_EMPTY, self.number), T.uint32(1)))
        emit(T.ptx["cp.async.bulk.wait_group"](0))
        # What copies wrote is seen by the copies of whoever sees the turn.
        emit(T.ptx["fence.proxy.async.global"]())
        emit(T.ptx["red.release.gpu.global.add.u32"](turn, T.uint32(1)))

    def _wait_turn(self, turn: Expr, before: Expr) -> None:
        seen = local(1, "uint32")
        emit(T.ptx["ld.acquire.gpu.global.u32"](seen[0], turn))
        with I.While(T.Cast("int32", seen[0]) != before):
            emit(T.ptx["ld.acquire.gpu.global.u32"](seen[0], turn))
        emit(T.ptx["fence.proxy.async.global"]())
