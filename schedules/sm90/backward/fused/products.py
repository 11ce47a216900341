"""The products of a warpgroup of the backward of five: those of a sweep, and its part of the gradients of queries."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import T, emit, let, local
from na_compiler.schedules.sm90.backward.fused.block import FusedBlock
from na_compiler.schedules.sm90.backward.products import SweepProducts
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.products import descriptor, instruction

__all__ = ["FusedProducts"]

Expr = Any
_STEP, _UNIT = 16, 16


class FusedProducts(SweepProducts):
    """Emits the products of one warpgroup.

    Attributes
    ----------
    part
        Accumulators of ``dS K``: all queries of the tile, and the warpgroup's half of the columns.
    """

    block: FusedBlock

    def __init__(self, block: FusedBlock, warpgroup: Expr) -> None:
        super().__init__(block, warpgroup)
        plan = block.plan
        columns = plan.columns[0]
        self.part = local(plan.part_columns // 2)
        self._part = instruction(plan.part_columns, block.dtype)
        # Both are read across their rows, which are keys. A warpgroup's columns are a box of those of the keys.
        self._slopes = descriptor(block.slopes, 0, 1, plan.slope_columns)
        first = let(warpgroup * (columns.box_bytes(ROWS) // 2))
        self._keys = descriptor(block.own, first, 1, columns)

    def partial(self, stage: Expr) -> None:
        """Emit the part of the gradients of a tile of queries, as a group of its own."""
        plan = self.plan
        warpgroups = plan.config.warpgroups
        # Of 16 rows.
        slope_step, key_step = (_STEP * columns.width * 2 // _UNIT for columns in (plan.slope_columns, plan.columns[0]))
        self.fence()
        for warpgroup in range(warpgroups):
            for step in range(ROWS // _STEP):
                slopes = (stage * warpgroups + warpgroup) * (plan.slope_bytes // _UNIT) + step * slope_step
                keys = warpgroup * (plan.own_bytes // _UNIT) + step * key_step
                emit(
                    self._part(
                        *(self.part[i] for i in range(plan.part_columns // 2)),
                        self._slopes[0] + T.Cast("uint64", slopes),
                        self._keys[0] + T.uint64(keys),
                        T.bool(warpgroup > 0 or step > 0),
                        1,
                        1,
                        1,
                        1,
                    )
                )
        self.commit()
