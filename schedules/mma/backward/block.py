"""`SweepBlock`: what the warps of a thread block of the backward share."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.mma.backward.arguments import BackwardArguments
from na_compiler.schedules.mma.backward.plan import STATISTICS, SweepPlan
from na_compiler.schedules.mma.block import WarpBlock
from na_compiler.schedules.shared.trace import T, register

__all__ = ["SweepBlock"]

Expr = Any


class SweepBlock(WarpBlock):
    """Shared memory of a thread block of a sweep.

    Shared memory holds each warp's rows, a ring of tiles for each of the two tensors that stream by, the statistics
    of queries that do, and each warp's tables: addresses of the rows of its list, the mask, statistics.
    """

    def __init__(self, plan: SweepPlan, arguments: BackwardArguments) -> None:
        super().__init__(plan.warps, plan.shared_bytes)
        self.plan, self.arguments = plan, arguments
        self.dtype = plan.problem.dtype
        # All of it as elements, as words, as floats.
        self.elements = self.view(0, plan.shared_bytes // 2, self.dtype)
        self.words = self.view(0, plan.shared_bytes // 4, "uint32")
        self.floats = self.view(0, plan.shared_bytes // 4, "float32")
        # Where the warp's rows and its tables begin, in bytes.
        self.own = register(self.warp * plan.own_bytes)
        self.table = register(self.warp * plan.table_bytes + plan.table_offset)
        self.base = register(T.cuda.cvta_generic_to_shared(self.words.ptr_to([0])), "uint32")

    @property
    def mask(self) -> Expr:
        """Where the warp's mask begins."""
        return self.table + self.plan.lists * self.plan.addresses_bytes

    @property
    def list_statistics(self) -> Expr:
        """Where the statistics of its list begin."""
        return self.mask + self.plan.mask_bytes

    @property
    def places(self) -> Expr:
        """Where the places of its tokens in a table of biases begin."""
        return self.list_statistics + self.plan.list_statistics_bytes

    @property
    def hidden(self) -> Expr:
        """Where the words of its keys that take part begin."""
        return self.places + self.plan.places_bytes

    def stream(self, which: int, stage: Expr) -> Expr:
        """Return where a tile of a tensor that streams by begins."""
        return stage * self.plan.stream(which).bytes + self.plan.stream_offset(which)

    def statistics(self, stage: Expr) -> Expr:
        """Return where the statistics of a tile begin."""
        return stage * self.plan.statistics_bytes + self.plan.stream_offset(2)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a query's statistics."""
        return 4 * STATISTICS
