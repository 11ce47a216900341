"""`SweepBlock`: what the warps of a thread block of the backward share."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import Expr
from na_compiler.schedules.sm90.backward.arguments import BackwardArguments, Maps
from na_compiler.schedules.sm90.backward.plan import PLANES, SweepPlan
from na_compiler.schedules.sm90.block import SharedBlock

__all__ = ["EMPTY", "FULL", "SweepBlock"]

# Barriers of the tiles of the two tensors that stream by: all bytes have come, all warps are done.
FULL, EMPTY = ("first", "second"), ("first_empty", "second_empty")


class SweepBlock(SharedBlock):
    """Shared memory and barriers of a sweep.

    Shared memory holds each warpgroup's owned rows, a ring of tiles for each of the two tensors that stream by, the
    statistics of queries that do, and the barriers. The statistics belong to the tiles of the first tensor.
    """

    def __init__(self, plan: SweepPlan, arguments: BackwardArguments, maps: Maps) -> None:
        super().__init__(plan, plan.shared_bytes, plan.barrier_offset, plan.barriers)
        self.arguments, self.maps = arguments, maps
        stages = plan.config.stages
        self.own = self.view(0, plan.config.warpgroups * plan.own_bytes // 2)
        self.stream = [self.view(plan.stream_offset(i), stages * plan.stream_bytes(i) // 2) for i in range(2)]
        self.statistics: Any = None
        if not plan.of_queries:
            count = stages * PLANES * plan.plane_bytes // 4
            self.statistics = self.view(plan.statistics_offset, count, "float32", 128)
        self.place_barriers(
            {"own": 1, "first": stages, "first_empty": stages, "second": stages, "second_empty": stages}
        )

    def initialise(self) -> None:
        """Set the barriers up, once for all threads."""
        computing = self.plan.computing_warps
        self.initialise_barriers(
            {"own": 1, "first": 1, "first_empty": computing, "second": 1, "second_empty": computing}
        )

    def plane(self, stage: Expr, number: int) -> Expr:
        """Return where a plane of a tile's statistics begins."""
        return (stage * PLANES + number) * (self.plan.plane_bytes // 4)
