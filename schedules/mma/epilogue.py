"""What ends a warp's tile of queries: outputs divided, rounded, gathered in shared memory, and stored."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.mma.block import Block, Source
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.plan import CHUNK, ROWS
from na_compiler.schedules.mma.products import Products
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.mask import Mask
from na_compiler.schedules.shared.trace import I, T, both, let, local, put, when
from na_compiler.schedules.shared.work import Work

__all__ = ["Epilogue"]

Expr = Any


class Epilogue:
    """Emits the end of a tile of queries."""

    def __init__(self, block: Block, products: Products, rows: Rows) -> None:
        self.block, self.plan, self.products, self.rows = block, block.plan, products, rows

    def store(self, work: Work, mask: Mask, inverse: Any, logarithm: Any) -> None:
        """Store output and lse of the warp's queries."""
        self._store_lse(work, mask, logarithm)
        self._gather(inverse)
        self._store_rows(work)

    def _store_lse(self, work: Work, mask: Mask, logarithm: Any) -> None:
        buffer = self.block.arguments.lse
        flat = I.decl_buffer([2**62], "float32", data=buffer.data, scope="global")
        for row in range(2):
            with when(both(T.bitwise_and(self.rows.lane, 3) == 0, mask.exist[row])):
                I.buffer_store(flat, logarithm[row], [work.address(mask.queries[row], 1)])

    def _gather(self, inverse: Any) -> None:
        """Divide by the total, round, and put the warp's rows where its queries were."""
        plan, output = self.plan, self.products.output
        count = plan.problem.head_dim_v // 4
        pairs = local(count, "uint32")
        for i in range(count):
            row = i % 2
            self.products.pack(pairs, i, output[2 * i + 1] * inverse[row], output[2 * i] * inverse[row])
        self.block.sync_warp()
        swizzle = let(swizzled(self.rows.rows[0], plan.output))
        first = let(self.block.warp * (plan.query_bytes // 4) + T.bitwise_and(self.rows.lane, 3))
        for i in range(count):
            chunk = T.bitwise_xor(swizzle, i // 2) if plan.output.mask else i // 2
            at = first + self.rows.rows[i % 2] * (plan.output.width // 2) + chunk * (CHUNK // 2)
            put(self.block.query_words, at, pairs[i])
        self.block.sync_warp()

    def _store_rows(self, work: Work) -> None:
        """Store 16 rows, 16 bytes a lane."""
        plan, rows = self.plan, self.rows
        problem = plan.problem
        target = Source(work, self.block.arguments.output, work.head, problem.dilation, work.group)
        chunks = problem.head_dim_v // CHUNK
        count = ROWS * chunks
        for first in range(0, count, 32):
            number = let(first + rows.lane)
            row, chunk = let(number // chunks), let(number % chunks)
            place = T.bitwise_xor(chunk, swizzled(row, plan.output)) if plan.output.mask else chunk
            source = self.block.warp * (plan.query_bytes // 2) + row * plan.output.width + place * CHUNK
            positions = rows.position(row, work.first)
            inside = number < count if first + 32 > count else None
            with when(both(inside, work.within(positions, plan.own_tile))):
                offset = chunk
                for position, step in zip(positions, target.steps, strict=True):
                    offset = offset + position * step
                value = self.block.queries.vload([source], dtype=f"{self.block.dtype}x{CHUNK}")
                # vstore only returns a statement; a traced body must add it.
                I.add_to_parent(target.buffer.vstore([target.at(offset)], value))
