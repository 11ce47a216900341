"""What ends a warp's tile of queries: outputs divided, rounded, gathered in shared memory, and stored."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.mma.block import Block
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.packing import HeadsWork
from na_compiler.schedules.mma.plan import CHUNK, CHUNK_BYTES
from na_compiler.schedules.mma.products import RowTile
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.mask import Mask
from na_compiler.schedules.shared.trace import I, T, both, emit, let, local, put, when

__all__ = ["Epilogue"]

Expr = Any
_STORE = "st.global.v4.f32"


class Epilogue:
    """Emits the end of a tile of queries: of the 16 rows of one product, and all rows of the warp together."""

    def __init__(self, block: Block, work: HeadsWork) -> None:
        self.block, self.plan, self.work = block, block.plan, work

    def store_lse(self, rows: Rows, mask: Mask, logarithm: Any) -> None:
        """Store lse of 16 rows."""
        work = self.work
        buffer = self.block.arguments.lse
        flat = I.decl_buffer([2**62], "float32", data=buffer.data, scope="global")
        for row in range(2):
            with when(both(T.bitwise_and(rows.lane, 3) == 0, mask.exist[row])):
                I.buffer_store(flat, logarithm[row], [work.place(mask.queries[row], rows.head(rows.rows[row]))])

    def store_directly(self, rows: Rows, tile: RowTile, mask: Mask, inverse: Any) -> None:
        """Divide by the total, and store 16 rows of float32: four columns of a row lie in a thread."""
        work = self.work
        target = work.source(self.block.arguments.output)
        four = local(4)
        for row in range(2):
            with when(mask.exist[row]):
                offset: Any = T.bitwise_and(rows.lane, 3) * 2
                places = (*mask.queries[row], rows.head(rows.rows[row]))
                for position, step in zip(places, target.steps, strict=True):
                    offset = offset + position * step
                start = target.at(offset)
                for block in range(self.plan.problem.head_dim_v // 32):
                    for e in (0, 1):
                        for part in range(4):
                            number = tile.output[4 * (4 * block + part) + 2 * row + e]
                            put(four, part, number * inverse[row])
                        address = T.ptx.addr(target.buffer.ptr_to([start]), (8 * block + e) * CHUNK_BYTES)
                        emit(T.ptx[_STORE](address, *(four[part] for part in range(4))))

    def gather(self, rows: Rows, tile: RowTile, inverse: Any) -> None:
        """Divide by the total, round, and put 16 rows where their queries were."""
        plan, output = self.plan, tile.output
        count = plan.problem.head_dim_v // 4
        pairs = local(count, "uint32")
        for i in range(count):
            row = i % 2
            tile.pack(pairs, i, output[2 * i + 1] * inverse[row], output[2 * i] * inverse[row])
        self.block.sync_warp()
        swizzle = let(swizzled(rows.rows[0], plan.output))
        first = let(self.block.warp * (plan.query_bytes // 4) + T.bitwise_and(rows.lane, 3))
        for i in range(count):
            chunk = T.bitwise_xor(swizzle, i // 2) if plan.output.mask else i // 2
            at = first + rows.rows[i % 2] * (plan.output.width // 2) + chunk * (CHUNK // 2)
            put(self.block.query_words, at, pairs[i])

    def store_rows(self, rows: Rows) -> None:
        """Store all rows of the warp, 16 bytes a lane."""
        plan, work = self.plan, self.work
        problem = plan.problem
        target = work.source(self.block.arguments.output)
        chunks = problem.head_dim_v // CHUNK
        count = plan.rows * chunks
        self.block.sync_warp()
        for first in range(0, count, 32):
            number = let(first + rows.lane)
            row, chunk = let(number // chunks), let(number % chunks)
            place = T.bitwise_xor(chunk, swizzled(row, plan.output)) if plan.output.mask else chunk
            source = self.block.warp * (plan.query_bytes // 2) + row * plan.output.width + place * CHUNK
            positions = rows.position(row, work.first)
            inside = number < count if first + 32 > count else None
            with when(both(inside, work.within(positions, plan.own_tile))):
                offset = chunk
                for position, step in zip((*positions, rows.head(row)), target.steps, strict=True):
                    offset = offset + position * step
                value = self.block.queries.vload([source], dtype=f"{self.block.dtype}x{CHUNK}")
                # vstore only returns a statement; a traced body must add it.
                I.add_to_parent(target.buffer.vstore([target.at(offset)], value))
