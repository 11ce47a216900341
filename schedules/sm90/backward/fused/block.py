"""`FusedBlock`: what the warps of a thread block of the backward of five products share."""

from __future__ import annotations

from na_compiler.schedules.shared.trace import T, emit, flat, let, local, put, register, when
from na_compiler.schedules.sm90.backward.arguments import Maps
from na_compiler.schedules.sm90.backward.block import SweepBlock
from na_compiler.schedules.sm90.backward.fused.arguments import FusedArguments
from na_compiler.schedules.sm90.backward.fused.plan import FusedPlan
from na_compiler.schedules.sm90.backward.fused.work import item_of_ticket

__all__ = ["PART_EMPTY", "PART_FULL", "FusedBlock"]

Expr = object
# Barriers of parts of gradients of queries: all warps have written theirs, the copy has read all of it.
PART_FULL, PART_EMPTY = "part", "part_empty"


class FusedBlock(SweepBlock):
    """Shared memory and barriers: those of a sweep, gradients of scores, and parts of the gradients of queries.

    Both warpgroups need all gradients of a tile's scores, for half of the columns of those of its queries.
    """

    plan: FusedPlan

    def __init__(self, plan: FusedPlan, arguments: FusedArguments, maps: Maps) -> None:
        super().__init__(plan, arguments, maps)
        config = plan.fused
        self.slopes = self.view(plan.slopes_offset, config.slopes * plan.config.warpgroups * plan.slope_bytes // 2)
        self.parts = self.view(plan.parts_offset, config.parts * plan.part_bytes // 4, "float32")
        stages = plan.config.stages
        ring = dict.fromkeys(("first", "first_empty", "second", "second_empty"), stages)
        self.place_barriers({"own": 1, **ring, **dict.fromkeys((PART_FULL, PART_EMPTY), config.parts)})
        self._item = self.view(plan.barrier_offset + 8 * (plan.barriers - 1), 1, "int32", 8)

    def initialise(self) -> None:
        """Set the barriers up, and take a tile, once for all threads."""
        with when(self.thread == 0):
            self._take()
        computing = self.plan.computing_warps
        empty = dict.fromkeys(("first_empty", "second_empty", PART_FULL), computing)
        self.initialise_barriers({"own": 1, "first": 1, "second": 1, **empty, PART_EMPTY: 1})

    def _take(self) -> None:
        plan = self.plan
        ticket = local(1, "uint32")
        emit(T.ptx["atom.global.add.u32"](ticket[0], flat(self.arguments["ticket"]).ptr_to([0]), T.uint32(1)))
        problems = T.Cast("int32", self.arguments.batch * (plan.heads * plan.groups))
        put(self._item, 0, item_of_ticket(plan, let(T.Cast("int32", ticket[0])), problems))

    @property
    def item(self) -> Expr:
        """The number of the block's tile."""
        return register(self._item[0])
