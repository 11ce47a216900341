"""What leaves a sweep: a warp's gradients, scaled, rounded, gathered in shared memory, and stored."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.mma.backward.products import SweepProducts
from na_compiler.schedules.mma.backward.strips import StripWork
from na_compiler.schedules.mma.block import Source
from na_compiler.schedules.mma.copies import swizzled
from na_compiler.schedules.mma.plan import CHUNK, ROWS, Tile
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.trace import I, T, both, flat, index64, let, local, put, when
from na_compiler.schedules.shared.work import Work

__all__ = ["store", "store_parts"]

Expr = Any
_SPACES = {"grad_key": "additional_key_space", "grad_value": "additional_value_space"}


def store(products: SweepProducts, rows: Rows, work: Work) -> None:
    """Emit the end of a tile: each result where the owned tensor of its columns was."""
    plan, block = products.plan, products.block
    # Scores are scaled, so their gradients are.
    factors = [T.float32(1) if which else block.arguments.scale for which in plan.sums]
    block.sync_warp()
    for which, sums, factor in zip(plan.sums, products.sums, factors, strict=True):
        _gather(products, rows, which, sums, factor)
    block.sync_warp()
    for name, which in zip(plan.results, plan.sums, strict=True):
        _store_rows(products, rows, work, which, block.arguments[name])


def store_parts(products: SweepProducts, rows: Rows, work: StripWork) -> None:
    """Emit the end of a tile of additional keys: a strip's sums as they are, ``[batch, heads, strips, additional]``."""
    plan = products.plan
    for name, sums in zip(plan.results, products.sums, strict=True):
        space = flat(products.block.arguments[_SPACES[name]])
        width = int(sums.shape[0]) * 2
        for half, row in enumerate(rows.rows):
            position = rows.position(row, work.first)[0]
            with when(position < work.count):
                strip = index64(work.batch) * plan.heads + index64(work.head)
                strip = strip * work.plan.strips + index64(work.strip)
                first = let((strip * index64(work.count) + index64(position)) * width)
                column = T.bitwise_and(rows.lane, 3) * 2
                for group in range(width // CHUNK):
                    for e in range(2):
                        place = first + index64(column + (CHUNK * group + e))
                        I.buffer_store(space, sums[4 * group + 2 * half + e], [place])


def _gather(products: SweepProducts, rows: Rows, which: int, sums: Any, factor: Expr) -> None:
    block, tile = products.block, products.plan.own(which)
    count = tile.extent // 4
    pairs = local(count, "uint32")
    for i in range(count):
        products.pack(pairs, i, sums[2 * i + 1] * factor, sums[2 * i] * factor)
    swizzle = let(swizzled(rows.rows[0], tile))
    first = let((block.own + products.plan.own_offset(which)) // 4 + T.bitwise_and(rows.lane, 3))
    for i in range(count):
        chunk = T.bitwise_xor(swizzle, i // 2) if tile.mask else i // 2
        at = first + rows.rows[i % 2] * (tile.width // 2) + chunk * (CHUNK // 2)
        put(block.words, at, pairs[i])


def _store_rows(products: SweepProducts, rows: Rows, work: Work, which: int, gradient: Any) -> None:
    """Store 16 rows, 16 bytes a lane."""
    plan, block = products.plan, products.block
    tile: Tile = plan.own(which)
    target = Source(work, gradient, work.head, plan.problem.dilation, work.group)
    chunks = tile.extent // CHUNK
    count = ROWS * chunks
    for first in range(0, count, 32):
        number = let(first + rows.lane)
        row, chunk = let(number // chunks), let(number % chunks)
        place = T.bitwise_xor(chunk, swizzled(row, tile)) if tile.mask else chunk
        # Not the place that is kept in a register: TVM has to see that it is a multiple of 16 bytes.
        source = block.warp * (plan.own_bytes // 2) + plan.own_offset(which) // 2 + row * tile.width + place * CHUNK
        positions = rows.position(row, work.first)
        inside = number < count if first + 32 > count else None
        with when(both(inside, work.within(positions, plan.own_tile))):
            offset = chunk
            for position, step in zip(positions, target.steps, strict=True):
                offset = offset + position * step
            value = block.elements.vload([source], dtype=f"{block.dtype}x{CHUNK}")
            # vstore only returns a statement; a traced body must add it.
            I.add_to_parent(target.buffer.vstore([target.at(offset)], value))
