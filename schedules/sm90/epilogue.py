"""What leaves: output, through the shared memory of the queries, and lse."""

from __future__ import annotations

import math
from typing import Any

from na_compiler.schedules.sm90.block import Block
from na_compiler.schedules.sm90.mask import Mask, Rows
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.products import Products
from na_compiler.schedules.sm90.trace import I, T, both, emit, index64, let, local, when
from na_compiler.schedules.sm90.work import Work

__all__ = ["Epilogue"]

Expr = Any
_CHUNK = 8  # Elements of 16 bytes.
# Named barriers: from here on, one a warpgroup.
_WARPGROUP = 1


class Epilogue:
    """Emits the end of a tile of queries."""

    def __init__(self, block: Block, products: Products, rows: Rows) -> None:
        self.block, self.plan, self.products, self.rows = block, block.plan, products, rows
        self.columns = self.plan.columns_v

    def store(self, work: Work, mask: Mask, inverse: Any, logarithm: Any) -> None:
        """Store the tile, once its products are complete."""
        self._store_lse(work, mask, logarithm)
        self._gather(inverse)
        if self.plan.stores_by_tma:
            self._store_by_tma(work)
        else:
            self._store_by_warp(work)

    def _address(self, work: Work, positions: list[Expr], width: int) -> Expr:
        """Return the offset of a token's head in a contiguous tensor with ``width`` elements a head."""
        problem = self.plan.problem
        offset = index64(work.batch)
        for token, extent in zip(work.tokens(positions), problem.layout, strict=True):
            offset = offset * extent + index64(token)
        return (offset * problem.heads + index64(work.head)) * width

    def _flat(self, buffer: Any) -> Any:
        return I.decl_buffer([2**62], str(buffer.dtype), data=buffer.data, scope="global")

    def _store_lse(self, work: Work, mask: Mask, logarithm: Any) -> None:
        lse = self._flat(self.block.arguments.lse)
        for row in range(2):
            with when(both(T.bitwise_and(self.rows.lane, 3) == 0, mask.exist[row])):
                I.buffer_store(lse, logarithm[row], [self._address(work, mask.queries[row], 1)])

    def _gather(self, inverse: Any) -> None:
        """Divide by the total, round, and put the warpgroup's rows where its queries were."""
        plan, rows, output = self.plan, self.rows, self.products.output
        pairs = local(plan.problem.head_dim_v // 4, "uint32")
        for i in range(plan.problem.head_dim_v // 4):
            row = i % 2
            self.products.pack(pairs, i, output[2 * i + 1] * inverse[row], output[2 * i] * inverse[row])
        self.sync()
        # A lane gives the address of one row of one of the four 8x8 matrices: rows 0-7 and 8-15, of two column groups.
        row = let(rows.warp * 16 + T.bitwise_and(rows.lane, 15))
        half = let(T.shift_right(rows.lane, 4))
        chunks = self.columns.width // _CHUNK
        groups = plan.problem.head_dim_v // _CHUNK
        for group in range(0, groups - 1, 2):
            place = self._place(row, group // chunks, group % chunks + half)
            emit(
                T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                    self.block.queries.ptr_to([place]), *(pairs[2 * group + i] for i in range(4))
                )
            )
        if groups % 2:
            place = self._place(row, (groups - 1) // chunks, (groups - 1) % chunks)
            emit(
                T.ptx["stmatrix.sync.aligned.m8n8.x2.shared.b16"](
                    self.block.queries.ptr_to([place]), *(pairs[2 * (groups - 1) + i] for i in range(2))
                )
            )

    def _place(self, row: Expr, box: Expr, chunk: Expr) -> Expr:
        """Return where in shared memory a chunk of an output's row is, swizzled as TMA has it."""
        width = self.columns.width
        chunks = width // _CHUNK
        # The swizzle exchanges 16-byte chunks by the number of the 128-byte line that they are in.
        line = T.bitwise_and(T.shift_right(row, int(math.log2(64 // width))), chunks - 1)
        first = self.rows.warpgroup * (self.plan.query_bytes // 2) + box * (self.columns.box_bytes(ROWS) // 2)
        return first + row * width + T.bitwise_xor(chunk, line) * _CHUNK

    def sync(self) -> None:
        """Wait for the other warps of the warpgroup."""
        emit(T.ptx.bar.sync(T.Cast("uint32", self.rows.warpgroup + _WARPGROUP), T.uint32(128)))

    def _store_by_tma(self, work: Work) -> None:
        block, plan = self.block, self.plan
        output = block.maps["output"]
        emit(T.ptx.fence.proxy.async_.shared__cta())
        self.sync()
        with when(self.rows.warp == 0):
            with when(T.cuda.elect_sync() != T.uint32(0)):
                first = [work.first[0] + self.rows.warpgroup * plan.query_box[0], *work.first[1:]]
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
        """Store 16 rows a warp, 16 bytes a lane."""
        block, plan, rows = self.block, self.plan, self.rows
        emit(T.cuda.warp_sync())
        target = self._flat(block.arguments.output)
        chunks = plan.problem.head_dim_v // _CHUNK
        in_box = self.columns.width // _CHUNK
        count = 16 * chunks
        for first in range(0, count, 32):
            number = let(first + rows.lane)
            row, chunk = let(rows.warp * 16 + number // chunks), let(number % chunks)
            source = self._place(row, chunk // in_box, chunk % in_box)
            positions = rows.position(row, work.first)
            inside = number < count if first + 32 > count else None
            with when(both(inside, work.within(positions, plan.query_tile))):
                value = block.queries.vload([source], dtype=f"{block.dtype}x{_CHUNK}")
                address = self._address(work, positions, plan.problem.head_dim_v) + index64(chunk * _CHUNK)
                # vstore only returns a statement; a traced body must add it.
                I.add_to_parent(target.vstore([address], value))
        if plan.config.persistent:
            # What was read here is about to be overwritten by TMA.
            emit(T.ptx.fence.proxy.async_.shared__cta())
            emit(T.cuda.warp_sync())
            block.arrive("query_empty")
