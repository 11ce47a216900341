"""A thread block's tile: what its warps own, what streams by, and the loop over each warp's list."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from na_compiler.schedules.mma.backward.arguments import Statistics
from na_compiler.schedules.mma.backward.bias import BiasSums, SweepBias
from na_compiler.schedules.mma.backward.block import SweepBlock
from na_compiler.schedules.mma.backward.lists import Lists, WindowLists, counting
from na_compiler.schedules.mma.backward.products import SweepProducts
from na_compiler.schedules.mma.backward.results import store, store_parts
from na_compiler.schedules.mma.backward.statistics import make_statistics
from na_compiler.schedules.mma.backward.strips import StripTile, StripWork
from na_compiler.schedules.mma.backward.weights import Weights
from na_compiler.schedules.mma.block import Source
from na_compiler.schedules.mma.copies import Copy
from na_compiler.schedules.mma.rows import Rows
from na_compiler.schedules.shared.trace import T, both, emit, let, register, when
from na_compiler.schedules.shared.work import StreamCursor, Work

__all__ = ["StripSweep", "Sweep"]

Expr = Any
_OWN = {
    "queries": ("query", "grad_output", "output"),
    "keys": ("key", "value"),
    "additional": ("additional_keys", "additional_values"),
}
_STREAM = {"queries": ("key", "value"), "keys": ("query", "grad_output"), "additional": ("query", "grad_output")}
_PAIR = "cp.async.ca.shared.global"


class Sweep:
    """Emits all of a block's tile, which is the ``item``'th."""

    def __init__(self, block: SweepBlock, work: Work, item: Expr) -> None:
        self.item = item
        # Kept: bounds are used for every copy, and the simplifier would compute them again for each.
        work.first, work.low, work.high = ([register(at) for at in of] for of in (work.first, work.low, work.high))
        self._prepare(block, work)

    def _prepare(self, block: SweepBlock, work: Any) -> None:
        self.block, self.plan, self.work = block, block.plan, work
        self.rows = Rows(self.plan, block.warp, block.lane)
        self.products = SweepProducts(block)
        tile, threads = self.plan.stream_tile, self.plan.threads
        self.copies = [Copy(self.plan.stream(i), tile, threads, block.thread) for i in range(2)]
        self.weights: Any = None
        self.bias: SweepBias | None = None
        self.bias_sums: BiasSums | None = None

    def compute(self) -> None:
        """Emit the copies of what is owned, the tiles that stream by, and what becomes of the sums."""
        self._copy_own()
        lists = WindowLists(self.block, self.rows, self.work)
        self.products.start()
        if self.plan.sums_bias:
            self.bias_sums = BiasSums(self.products)
            self.bias_sums.clear()
        size = self.plan.problem.group_size
        if self.plan.of_queries or size == 1:
            self._visit(lists, self.work.stream_head, None)
        else:
            with counting(0, size, 1) as number:
                self._visit(lists, register(self.work.stream_head + number), number == 0)
        if self.plan.tail:
            self.bias = None
            self._visit_additional()
        store(self.products, self.rows, self.work)
        if self.bias_sums is not None:
            self.bias_sums.store(self.item)

    @property
    def _own_dilation(self) -> Sequence[int]:
        """Dilation of what is owned."""
        return self.plan.problem.dilation

    def _copy_own(self) -> None:
        """Emit the copy of the warp's rows."""
        plan, block, work = self.plan, self.block, self.work
        first = self.rows.first(work.first)
        for number, name in enumerate(_OWN[plan.side]):
            if number < 2 and number not in plan.owned:
                continue
            tile = plan.own(min(number, 1))
            source = Source(work, block.arguments[name], work.head, self._own_dilation, work.group)
            place = (block.own + plan.own_offset(number)) // 2
            Copy(tile, plan.warp_box, 32, block.lane).emit(source, block.elements, place, first, work.lengths)
        block.commit()

    def _take_own(self, pending: int, is_first: Expr | None) -> None:
        """Emit the wait for them, with some groups of copies pending; for queries, statistics of them."""
        with when(is_first):
            self.block.wait(pending)
            self.block.sync_warp()
            self.products.load_own()
        if self.plan.of_queries:
            self.weights = Weights(self.products, make_statistics(self.products, self.rows, self.work))
        elif self.weights is None:
            self.weights = Weights(self.products, [])

    def _visit(self, lists: WindowLists, head: Expr, is_first: Expr | None) -> None:
        """Emit the visit of all tiles of one head, and, before that of the first head, the wait for what is owned."""
        block, plan, work = self.block, self.plan, self.work
        places, around = (plan.problem.dilation, work.group), work.around if work.wraps else None
        stream = [Source(work, block.arguments[name], head, *places, around=around) for name in _STREAM[plan.side]]
        statistics = None if plan.of_queries else self._statistics(head, work.group)
        if plan.has_bias:
            self.bias = SweepBias(self.products, self.rows, work, work.head if plan.of_queries else head)
        if is_first is not None:
            # Tiles of the head before are done with.
            block.sync()
        loading = StreamCursor(work)
        ahead = max(plan.stages - 1, 1)
        for tile in range(ahead):
            with when(tile < work.tiles if tile else None):
                if tile:
                    loading.advance()
                self._copy(stream, statistics, loading, tile)
            block.commit()
        if plan.config.stream_tile is None:
            lists.build(list(loading), 0)
            self._take_own(1, is_first)
            block.wait(0)
            block.sync()
            self._step(lists, 0)
            return
        self._take_own(ahead, is_first)
        visiting = StreamCursor(work)
        with counting(0, work.tiles, 1) as tile:
            stage: Expr = register(tile % plan.stages) if plan.stages > 1 else 0
            lists.build(list(visiting), stage)
            block.wait(ahead - 1)
            block.sync()
            if plan.stages > 1:
                self._copy_ahead(stream, statistics, loading, tile + ahead)
            self._step(lists, stage)
            visiting.advance()
            if plan.stages == 1:
                block.sync()
                self._copy_ahead(stream, statistics, loading, tile + 1)

    def _statistics(self, head: Expr, group: Sequence[Expr]) -> Statistics:
        return Statistics(self.plan.problem, self.block.arguments["statistics"], self.work.batch, head, group)

    def _visit_additional(self) -> None:
        """Emit the visit of the additional keys, tile by tile, which take the place of the others."""
        block, plan, work = self.block, self.plan, self.work
        lists = Lists(block)
        count = register(block.arguments.count)
        names = ("additional_keys", "additional_values")
        stream = [Source(work, block.arguments[name], work.stream_head, (1,), (0,)) for name in names]
        copies = [Copy(plan.stream(i), (plan.tail,), plan.threads, block.thread) for i in range(2)]
        with counting(0, count, plan.tail) as first:
            block.sync()
            for which, (copy, source) in enumerate(zip(copies, stream, strict=True)):
                copy.emit(source, block.elements, block.stream(which, 0) // 2, [first], [count])
            block.commit()
            lists.build_line(T.min(count - first, plan.tail), 0)
            block.wait(0)
            block.sync()
            self._step(lists, 0)

    def _copy_ahead(
        self, stream: list[Source], statistics: Statistics | None, cursor: StreamCursor, tile: Expr
    ) -> None:
        with when(tile < self.work.tiles):
            cursor.advance()
            stage: Expr = let(tile % self.plan.stages) if self.plan.stages > 1 else 0
            self._copy(stream, statistics, cursor, stage)
        self.block.commit()

    def _copy(self, stream: list[Source], statistics: Statistics | None, cursor: StreamCursor, stage: Expr) -> None:
        self._copy_box(stream, statistics, list(cursor), self.work.high, stage)

    def _copy_box(
        self,
        stream: list[Source],
        statistics: Statistics | None,
        origin: list[Expr],
        end: Sequence[Expr],
        stage: Expr,
    ) -> None:
        """Emit the copy of a tile that begins at ``origin``, of what of it lies before the ends."""
        for which, source in enumerate(stream):
            place = self.block.stream(which, stage) // 2
            self.copies[which].emit(source, self.block.elements, place, origin, end, self.plan.order)
        if statistics is not None:
            self._copy_statistics(statistics, origin, end, stage)

    def _copy_statistics(self, statistics: Statistics, origin: list[Expr], end: Sequence[Expr], stage: Expr) -> None:
        """Emit the copy of the statistics of a tile, 8 bytes each."""
        plan, block = self.plan, self.block
        count = math.prod(plan.stream_tile)
        for first in range(0, count, plan.threads):
            number = let(block.thread + first)
            rest, at = number, list[Expr]()
            for extent in reversed(plan.stream_tile[1:]):
                at.insert(0, rest % extent)
                rest = rest // extent
            positions = [let(start + place) for start, place in zip(origin, [rest, *at], strict=True)]
            exists = both(*(position < last for position, last in zip(positions, end, strict=True)))
            with when(both(number < count if first + plan.threads > count else None, exists)):
                target = block.floats.ptr_to([block.statistics(stage) // 4 + 2 * number])
                source = statistics.buffer.ptr_to([statistics.at(self._around(positions))])
                emit(T.ptx[_PAIR](target, source, block.pair_bytes))

    def _around(self, positions: list[Expr]) -> list[Expr]:
        """Return where queries are whose positions may lie beyond an end, where windows wrap."""
        return [self.work.around(axis, position) for axis, position in enumerate(positions)]

    def _step(self, lists: Lists, stage: Expr) -> None:
        """Emit what a tile that has come adds to the sums."""
        block, plan = self.block, self.plan
        with lists.skip():
            if not plan.of_queries:
                lists.gather_statistics(stage)
            block.sync_warp()
            with counting(0, lists.count, plan.streamed) as number, when(lists.takes_part(number)):
                self._groups(number)
        # The tables of the next tile may be written.
        block.sync_warp()

    def _groups(self, number: Expr) -> None:
        """Emit what some groups of the list add to the sums."""
        plan, products, weights, bias = self.plan, self.products, self.weights, self.bias
        addresses = products.addresses(number)
        weights.look_up(number, bias)
        products.score(0, addresses[0])
        if plan.needs_gradient:
            products.score(1, addresses[1])
        weights.exponentiate(bias)
        if 1 in plan.sums:
            weights.clear(products.scores)
            products.pack_operand(products.scores)
            products.add(plan.sums.index(1), addresses[1])
        if plan.needs_gradient:
            weights.differentiate()
            weights.clear(products.slopes)
            if self.bias_sums is not None and bias is not None:
                self.bias_sums.add(bias, weights.sees)
            products.pack_operand(products.slopes)
            products.add(plan.sums.index(0), addresses[0])


class StripSweep(Sweep):
    """Emits all of a block's tile of additional keys: its part of their gradients, from a strip of queries."""

    work: StripWork

    def __init__(self, block: SweepBlock, work: StripWork) -> None:
        self._prepare(block, work)

    @property
    def _own_dilation(self) -> Sequence[int]:
        """None: they lie along one axis."""
        return (1,)

    def _around(self, positions: list[Expr]) -> list[Expr]:
        return positions

    def compute(self) -> None:
        """Emit the copies of what is owned, the tiles that stream by, and what becomes of the sums."""
        block, plan, work = self.block, self.plan, self.work
        self._copy_own()
        lists = Lists(block)
        self.products.start()
        self._take_own(0, None)
        with counting(work.start, work.end, 1) as number:
            tile = StripTile(work, number)
            names = _STREAM[plan.side]
            places = plan.problem.dilation, tile.group
            stream = [Source(work, block.arguments[name], tile.head, *places) for name in names]
            block.sync()
            self._copy_box(stream, self._statistics(tile.head, tile.group), tile.origin, tile.lengths, 0)
            block.commit()
            lists.build_box(tile.origin, tile.lengths, 0)
            block.wait(0)
            block.sync()
            self._step(lists, 0)
        store_parts(self.products, self.rows, work)
