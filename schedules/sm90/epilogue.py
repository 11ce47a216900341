"""What leaves: output, through the shared memory of the queries, and lse."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.mask import Mask
from na_compiler.schedules.shared.trace import I, T, both, emit, flat, when
from na_compiler.schedules.shared.work import Work
from na_compiler.schedules.sm90.block import Block
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.products import Products
from na_compiler.schedules.sm90.rows import Rows
from na_compiler.schedules.sm90.store import RowStore, sync_warpgroup

__all__ = ["Epilogue"]

Expr = Any


class Epilogue:
    """Emits the end of a tile of queries."""

    def __init__(self, block: Block, products: Products, rows: Rows) -> None:
        self.block, self.plan, self.products, self.rows = block, block.plan, products, rows
        self.columns = self.plan.columns_v
        self._output = RowStore(block.queries, rows.warpgroup * (self.plan.query_bytes // 2), self.columns, rows)

    def store(self, work: Work, mask: Mask, inverse: Any, logarithm: Any) -> None:
        """Store the tile, once its products are complete."""
        self._store_lse(work, mask, logarithm)
        self._output.gather(self.products.output, [inverse[0], inverse[1]])
        if self.plan.stores_by_tma:
            self._store_by_tma(work)
        else:
            self._store_by_warp(work)

    def _store_lse(self, work: Work, mask: Mask, logarithm: Any) -> None:
        lse = flat(self.block.arguments.lse)
        for row in range(2):
            with when(both(T.bitwise_and(self.rows.lane, 3) == 0, mask.exist[row])):
                I.buffer_store(lse, logarithm[row], [work.address(mask.queries[row], 1)])

    def _store_by_tma(self, work: Work) -> None:
        block, plan = self.block, self.plan
        output = block.maps["output"]
        emit(T.ptx.fence.proxy.async_.shared__cta())
        sync_warpgroup(self.rows.warpgroup)
        with when(self.rows.warp == 0):
            with when(T.cuda.elect_sync() != T.uint32(0)):
                first = [work.first[0] + self.rows.warpgroup * plan.own_box[0], *work.first[1:]]
                for box in range(self.columns.boxes):
                    place = self.rows.warpgroup * (plan.query_bytes // 2) + box * (self.columns.box_bytes(ROWS) // 2)
                    coordinates = output.at(work.batch, first, work.head, box)
                    source = block.queries.ptr_to([place])
                    emit(output.store(T.address_of(output.handle), *coordinates, source))
                emit(T.ptx.cp.async_.bulk.commit_group())
                emit(T.ptx.cp.async_.bulk.wait_group.read(0))
            if plan.config.persistent:
                emit(T.cuda.warp_sync())
        if plan.config.persistent:
            block.arrive("query_empty")

    def _store_by_warp(self, work: Work) -> None:
        self._output.store(self.block.arguments.output, work)
        if self.plan.config.persistent:
            # What was read here is about to be overwritten by TMA.
            emit(T.ptx.fence.proxy.async_.shared__cta())
            emit(T.cuda.warp_sync())
            self.block.arrive("query_empty")
