"""The forward on the tensor cores of single warps, generated with TVM's TIRx.

A thread block has 1, 2, 4 or 8 warps of 16 queries, whose boxes lie one beside the other. Keys and values of the box
that their windows come to are copied into shared memory, asynchronously: tile by tile into a ring, or all at once
where windows are small (`na_compiler.schedules.mma.resident`). Each warp computes ``S = Q K^T`` by mma.sync, the
softmax in registers, and ``O += P V`` with P in registers.

The body is traced: Python drives TVM's builder, so ints, loops and conditions of Python are those of the generator.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from na_compiler.operands import KEY_MASK, RELATIVE_POSITION_BIAS
from na_compiler.schedules.mma.bias import Bias
from na_compiler.schedules.mma.block import Arguments, Block, Source
from na_compiler.schedules.mma.copies import Copy
from na_compiler.schedules.mma.epilogue import Epilogue
from na_compiler.schedules.mma.packing import HeadsWork
from na_compiler.schedules.mma.plan import GROUP, ROWS, Plan
from na_compiler.schedules.mma.products import Products, RowTile
from na_compiler.schedules.mma.resident import Resident, WarpMask
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.mma.tf32 import RoundedProducts
from na_compiler.schedules.shared.key_mask import KeyMask
from na_compiler.schedules.shared.mask import Mask
from na_compiler.schedules.shared.softmax import Softmax
from na_compiler.schedules.shared.trace import I, T, both, hold, let, local, put, register, traced, when
from na_compiler.schedules.shared.work import StreamCursor, Work

__all__ = ["schedule_forward"]

Expr = Any
# Signs of two 16-bit numbers, and of one of 32 bits.
_NEGATE = {False: 0x80008000, True: 0x80000000}


def schedule_forward(plan: Plan) -> tirx.PrimFunc:
    """Return the forward of a problem, for TVM's ``tirx`` pipeline."""
    return traced(lambda: _trace(plan))


def _trace(plan: Plan) -> None:
    """Trace host and device."""
    arguments = Arguments(plan)
    # There are no launches on an empty grid.
    hold(I.If(arguments.batch > 0))
    hold(I.Then())
    I.device_entry()
    if plan.config.blocks:
        hold(I.attr({"tirx.launch_bounds_min_blocks_per_sm": plan.config.blocks}))
    item = I.cta_id([Work.count(plan, arguments.batch, plan.problem.heads // plan.packed)])
    block = Block(plan, arguments)
    work = HeadsWork(plan, item)
    with when(work.exists):
        (_Resident if plan.is_resident else _Ring)(block, work).compute()


class _Strip:
    """What is done for each 16 rows of a warp by themselves: everything but loads of keys and values."""

    def __init__(self, tile: RowTile, rows: Rows, work: HeadsWork, block: Block, key_mask: KeyMask | None) -> None:
        arguments = block.arguments
        self.tile, self.rows = tile, rows
        self.bias: Bias | None = None
        if tile.plan.problem.has(RELATIVE_POSITION_BIAS):
            self.bias = Bias(tile, rows, work, arguments.bias, arguments.scale)
        self.softmax = Softmax(tile, None if self.bias else arguments.scale)
        self.mask = Mask(tile, rows, work, arguments.count, key_mask)

    def weigh(self, *, is_first: bool = False) -> None:
        """Emit the softmax of the scores that are there, but for the weighted sum."""
        self.softmax.raise_highest()
        self.softmax.exponentiate()
        self.softmax.pack()
        if not is_first:
            self.softmax.rescale()


class _Forward:
    """What both ways share: queries, the softmax, additional keys, the epilogue."""

    def __init__(self, block: Block, work: HeadsWork) -> None:
        self.block, self.plan, self.work = block, block.plan, work
        plan, arguments = self.plan, block.arguments
        problem = plan.problem
        # Kept: bounds are used for every copy, and the simplifier would compute them again for each.
        work.first, work.low, work.high = ([register(at) for at in of] for of in (work.first, work.low, work.high))
        self.rows = self._rows(0)
        # Elements of a tile of shared memory.
        self.key_step, self.value_step = (tile.bytes // tile.element_bytes for tile in (plan.key, plan.value))
        self.products = RoundedProducts(block) if plan.is_tf32 else Products(block)
        self.key_mask: KeyMask | None = None
        if problem.has(KEY_MASK):
            # It remembers what 16 rows have seen.
            assert plan.row_tiles == 1, "no key mask with 32 rows a warp"
            self.key_mask = KeyMask(self.products.tiles[0], work, arguments.key_mask, block.lane, arguments.count)
        self.strips = [
            _Strip(tile, self._rows(ROWS * number), work, block, self.key_mask)
            for number, tile in enumerate(self.products.tiles)
        ]
        self.epilogue = Epilogue(block, work)
        groups = problem.dilation, work.group
        self.query = work.source(arguments.query)
        around = work.around if work.wraps else None
        self.key = Source(work, arguments.key, work.stream_head, *groups, around=around)
        self.value = Source(work, arguments.value, work.stream_head, *groups, around=around)
        if problem.additional_kv:
            self.extra = tuple(
                Source(work, b, work.stream_head, (1,), (0,)) for b in (arguments.keys, arguments.values)
            )
            self.count = register(arguments.count)
            box = (plan.streamed,)
            self.extra_copies = tuple(Copy(tile, box, plan.threads, block.thread) for tile in (plan.key, plan.value))

    def _rows(self, first: int) -> Rows:
        return Rows(self.plan, self.block.warp, self.block.lane, first, self.plan.packed)

    def compute(self) -> None:
        """Emit all of a tile of queries."""
        for strip in self.strips:
            strip.softmax.start()
        self.visit()
        self.block.sync_warp()
        for strip in self.strips:
            inverse, logarithm = strip.softmax.finish()
            if self.key_mask is not None:
                self.key_mask.finish(strip.tile.output, inverse, logarithm)
            self.epilogue.store_lse(strip.rows, strip.mask, logarithm)
            if self.plan.is_tf32:
                self.epilogue.store_directly(strip.rows, strip.tile, strip.mask, inverse)
            else:
                self.epilogue.gather(strip.rows, strip.tile, inverse)
        if not self.plan.is_tf32:
            self.epilogue.store_rows(self.rows)

    def visit(self) -> None:
        """Emit the visit of all keys."""
        raise NotImplementedError

    def copy_queries(self) -> None:
        """Emit the copy of the warp's queries."""
        plan, block = self.plan, self.block
        copy = Copy(plan.query, (*plan.warp_box, plan.packed), 32, block.lane)
        first, limits = (*self.rows.first(self.work.first), 0), (*self.work.lengths, plan.packed)
        copy.emit(
            self.query, block.queries, block.warp * (plan.query_bytes // plan.problem.element_bytes), first, limits
        )
        block.commit()

    def take_queries(self, pending: int) -> None:
        """Emit the wait for them, with some groups of copies pending, and read them; for a negative scale, negated."""
        block, plan = self.block, self.plan
        block.wait(pending)
        block.sync_warp()
        is_negative = self.strips[0].softmax.is_negative
        if is_negative is None:
            self.products.load_queries()
            return
        with when(is_negative):
            words = plan.query.bytes // 4
            first = block.warp * (plan.query_bytes // 4) + block.lane
            for place in range(0, words, 32):
                word = block.query_words[first + place]
                put(block.query_words, first + place, T.bitwise_xor(word, T.uint32(_NEGATE[plan.is_tf32])))
            block.sync_warp()
        self.products.load_queries()

    def copy_additional(self, tile: Expr, stage: Expr) -> None:
        """Emit the copy of a tile of additional keys and values."""
        plan, block = self.plan, self.block
        places = (stage * self.key_step, stage * self.value_step)
        for copy, source, buffer, place in zip(
            self.extra_copies, self.extra, (block.keys, block.values), places, strict=True
        ):
            copy.emit(source, buffer, place, [tile * plan.streamed], [self.count])


class _Ring(_Forward):
    """Keys come tile by tile, some tiles ahead."""

    def __init__(self, block: Block, work: HeadsWork) -> None:
        super().__init__(block, work)
        plan = self.plan
        self.copies = tuple(Copy(tile, plan.stream_tile, plan.threads, block.thread) for tile in (plan.key, plan.value))
        windows: Expr = work.tiles
        self.windows = register(T.int32(windows) if isinstance(windows, int) else windows)
        extra: Expr = 0
        if plan.problem.additional_kv:
            extra = (self.count + (plan.streamed - 1)) // plan.streamed
        self.total = register(self.windows + extra) if plan.problem.additional_kv else self.windows

    def visit(self) -> None:
        """Emit the loop over tiles of keys."""
        block, stages = self.block, self.plan.stages
        ahead = max(stages - 1, 1)
        loading, visiting = StreamCursor(self.work), StreamCursor(self.work)
        low, high = self._warp_keys()
        self.copy_queries()
        for tile in range(ahead):
            with when(tile < self.total if tile else None):
                self._copy(loading, T.int32(tile), tile)
            block.commit()
        self.take_queries(ahead)
        tile = local(1, "int32")
        put(tile, 0, 0)
        with I.While(tile[0] < self.total):
            if self.key_mask is not None:
                # Before the waits, behind which it hides; in place of additional keys' the last ones' is read.
                self.key_mask.load(self.plan.stream_tile, list(visiting), self.work.high, 0, self.plan.streamed)
            block.wait(ahead - 1)
            block.sync()
            stage: Expr = let(tile[0] % stages) if stages > 1 else 0
            if stages > 1:
                self._copy_ahead(loading, tile[0] + ahead)
            if self.key_mask is not None:
                self.key_mask.vote()
            with when(self._is_needed(visiting, tile[0], low, high)):
                self.products.score(stage * self.key_step)
                for strip in self.strips:
                    if strip.bias is not None:
                        self._add_bias(strip.bias, visiting, tile[0])
                    strip.mask.apply(visiting, tile[0])
                    strip.weigh()
                self.products.weigh(stage * self.value_step)
            visiting.advance()
            if stages == 1:
                block.sync()
                self._copy_ahead(loading, tile[0] + 1)
            put(tile, 0, tile[0] + 1)

    def _add_bias(self, bias: Bias, cursor: StreamCursor, tile: Expr) -> None:
        plan = self.plan
        if not plan.problem.additional_kv:
            bias.add(plan.stream_tile, list(cursor), 0, plan.streamed)
            return
        with I.If(tile < self.windows):
            with I.Then():
                bias.add(plan.stream_tile, list(cursor), 0, plan.streamed)
            with I.Else():
                bias.scale(plan.streamed)

    def _copy_ahead(self, cursor: StreamCursor, tile: Expr) -> None:
        tile = let(tile)
        with when(tile < self.total):
            self._copy(cursor, tile, let(tile % self.plan.stages) if self.plan.stages > 1 else 0)
        self.block.commit()

    def _copy(self, cursor: StreamCursor, tile: Expr, stage: Expr) -> None:
        """Emit the copy of a tile of keys and values, and step to the next."""
        if not self.plan.problem.additional_kv:
            self._copy_window(cursor, stage)
            return
        with I.If(tile < self.windows):
            with I.Then():
                self._copy_window(cursor, stage)
            with I.Else():
                self.copy_additional(let(tile - self.windows), stage)

    def _copy_window(self, cursor: StreamCursor, stage: Expr) -> None:
        block = self.block
        origin = list(cursor)
        places = (stage * self.key_step, stage * self.value_step)
        buffers = (block.keys, block.values)
        for copy, source, buffer, place in zip(self.copies, (self.key, self.value), buffers, places, strict=True):
            copy.emit(source, buffer, place, origin, self.work.high)
        cursor.advance()

    def _warp_keys(self) -> tuple[list[Expr], list[Expr]]:
        """Return where the keys begin and end that the warp's own windows come to."""
        work = self.work
        first, last = self.rows.warp_queries(work.first)
        low = [register(work.bounds(axis, work.clamp(axis, query))[0]) for axis, query in enumerate(first)]
        high = [register(work.bounds(axis, work.clamp(axis, query))[1]) for axis, query in enumerate(last)]
        return low, high

    def _is_needed(self, cursor: StreamCursor, tile: Expr, low: list[Expr], high: list[Expr]) -> Expr | None:
        """Return whether a tile has keys that the warp's windows come to, and that are not all hidden."""
        meets = None if self.key_mask is None else self.key_mask.has_any
        if self.plan.warps > 1:
            for axis, extent in enumerate(self.plan.stream_tile):
                meets = both(meets, cursor[axis] < high[axis], cursor[axis] + extent > low[axis])
        if meets is None:
            return None
        return T.Or(tile >= self.windows, meets) if self.plan.problem.additional_kv else meets


class _Resident(_Forward):
    """All keys and values are there at once."""

    def visit(self) -> None:
        """Emit the groups of keys of the warp's own box, and the additional keys."""
        block, plan, work = self.block, self.plan, self.work
        keys = Resident(block, self.products, self.rows, work)
        self.copy_queries()
        for tile, source, buffer in ((plan.key, self.key, block.keys), (plan.value, self.value, block.values)):
            copy = Copy(tile, plan.union, plan.threads, block.thread)
            copy.emit(source, buffer, 0, work.low, work.high, keys.order)
            block.commit()
        self.take_queries(2)
        masks = [WarpMask(strip.tile, strip.rows, work, keys, self.key_mask) for strip in self.strips]
        self._load_key_mask(keys, 0)
        block.wait(1)
        block.sync()
        for first in range(0, plan.groups, plan.config.chunk):
            groups = range(first, min(first + plan.config.chunk, plan.groups))
            rows = keys.rows_of(groups)
            self.products.score_scattered(keys.keys_at(rows))
            if self.key_mask is not None:
                self.key_mask.vote()
            for strip, mask in zip(self.strips, masks, strict=True):
                strip.softmax.elements = GROUP // 2 * len(groups)
                if strip.bias is not None:
                    strip.bias.add(plan.warp_union, keys.low, GROUP * groups.start, GROUP * len(groups))
                mask.apply(groups)
                if strip is self.strips[-1]:
                    self._load_key_mask(keys, groups.stop)
                strip.weigh(is_first=first == 0)
            if first == 0:
                block.wait(0)
                block.sync()
            if isinstance(self.products, RoundedProducts):
                self.products.weigh_pairs(keys.pair_at, GROUP * groups.start, GROUP * len(groups))
            else:
                self.products.weigh_scattered(keys.values_at(rows))
        if plan.problem.additional_kv:
            self._visit_additional()

    def _load_key_mask(self, keys: Resident, first: int) -> None:
        """Emit the reads of the key mask for the next groups, from the first of them on."""
        plan = self.plan
        count = min(plan.config.chunk, plan.groups - first)
        if self.key_mask is not None and count > 0:
            self.key_mask.load(plan.warp_union, keys.low, keys.high, GROUP * first, GROUP * count)

    def _visit_additional(self) -> None:
        """Emit the loop over tiles of additional keys, which take the place of the others."""
        block, plan = self.block, self.plan
        tile = local(1, "int32")
        put(tile, 0, 0)
        with I.While(tile[0] * plan.streamed < self.count):
            block.sync()
            self.copy_additional(tile[0], 0)
            block.commit()
            block.wait(0)
            block.sync()
            self.products.score(0)
            for strip in self.strips:
                strip.softmax.elements = plan.streamed // 2
                if strip.bias is not None:
                    strip.bias.scale(plan.streamed)
                strip.mask.tail(tile[0] * plan.streamed)
                strip.weigh()
            self.products.weigh(0)
            put(tile, 0, tile[0] + 1)
