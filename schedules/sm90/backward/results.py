"""What leaves a sweep: gradients, or a strip's part of those of additional keys."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import I, T, flat, index64, let, when
from na_compiler.schedules.sm90.backward.block import SweepBlock
from na_compiler.schedules.sm90.backward.products import SweepProducts
from na_compiler.schedules.sm90.backward.work import StripWork
from na_compiler.schedules.sm90.rows import Rows
from na_compiler.schedules.sm90.store import RowStore

__all__ = ["Results"]

Expr = Any
_SPACES = {"grad_key": "additional_key_space", "grad_value": "additional_value_space"}


class Results:
    """Emits the end of a block's tile."""

    def __init__(self, block: SweepBlock, products: SweepProducts, rows: Rows) -> None:
        self.block, self.plan, self.products, self.rows = block, block.plan, products, rows
        first = rows.warpgroup * (self.plan.own_bytes // 2)
        # The first result takes the first owned tensor's place, the second the second's.
        self._stores = [
            RowStore(block.own, let(first + self.plan.own_offset(place) // 2), self.plan.columns[which], rows)
            for place, which in enumerate(self.plan.sums)
        ]

    def store(self, work: Any) -> None:
        """Store a block's results, once its products are complete."""
        if isinstance(work, StripWork):
            for name, sums in zip(self.plan.results, self.products.sums, strict=True):
                self._store_part(work, _SPACES[name], sums)
            return
        scale = self.block.arguments.scale
        for which, store, sums in zip(self.plan.sums, self._stores, self.products.sums, strict=True):
            # Scores are scaled, so their gradients are.
            factor = T.float32(1) if which else scale
            store.gather(sums, [factor, factor])
        for name, store in zip(self.plan.results, self._stores, strict=True):
            store.store(self.block.arguments[name], work)

    def _store_part(self, work: StripWork, name: str, sums: Any) -> None:
        """Store a strip's sums as they are: ``[batch, heads, strips, additional, width]``."""
        plan, rows = self.plan, self.rows
        space = flat(self.block.arguments[name])
        width = int(sums.shape[0]) * 2
        for half, row in enumerate(rows.rows):
            position = rows.position(row, work.first)[0]
            with when(position < work.count):
                strip = (index64(work.batch) * plan.heads + index64(work.head)) * plan.strips + index64(work.strip)
                first = let((strip * index64(work.count) + index64(position)) * width)
                column = T.bitwise_and(rows.lane, 3) * 2
                for group in range(width // 8):
                    for e in range(2):
                        place = first + index64(column + (8 * group + e))
                        I.buffer_store(space, sums[4 * group + 2 * half + e], [place])
