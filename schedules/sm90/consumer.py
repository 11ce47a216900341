"""The warps that compute: scores of a tile of keys beside the weighted sum and the softmax of the one before."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.mask import Mask
from na_compiler.schedules.shared.softmax import Softmax
from na_compiler.schedules.shared.trace import I, T, emit, let, local, minimum, put, register, when
from na_compiler.schedules.shared.work import StreamCursor, Work
from na_compiler.schedules.sm90.block import Block
from na_compiler.schedules.sm90.epilogue import Epilogue
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.products import Products
from na_compiler.schedules.sm90.rows import Rows
from na_compiler.schedules.sm90.softmax import PatientSoftmax
from na_compiler.schedules.sm90.store import sync_warpgroup

__all__ = ["Consumer"]

Expr = Any
_THREADS = 128  # of a warpgroup
# Named barriers: from here on, one a warpgroup, at which it waits for its turn to issue products.
_TURN = 4


class Consumer:
    """Emits what one warpgroup does."""

    def __init__(self, block: Block) -> None:
        self.block, self.plan = block, block.plan
        self.config = self.plan.config
        self.warpgroup = let(T.shift_right(block.warp, 2) - 1)
        warp = let(T.bitwise_and(block.warp, 3))
        self.products = Products(block, self.warpgroup)
        self.rows = Rows(self.plan, self.warpgroup, warp, block.lane)
        self.softmax = (
            PatientSoftmax(self.products, block.arguments.scale, self.config.threshold)
            if self.config.threshold
            else Softmax(self.products, block.arguments.scale)
        )
        self.epilogue = Epilogue(block, self.products, self.rows)
        if self.config.pingpong:
            with when(self.warpgroup == self.config.warpgroups - 1):
                self._pass_turn()

    def compute(self, work: Work, base: Expr, turn: Expr, extra: Expr) -> None:
        """Compute one tile of queries; for the parameters, see `Producer.load`."""
        block, softmax = self.block, self.softmax
        mask = Mask(self.products, self.rows, work, block.arguments.count)
        softmax.start()
        cursor = StreamCursor(work)
        total = let(work.tiles + extra)
        begin, end = self._range(work, cursor, total)
        tile = local(1, "int32")
        put(tile, 0, 0)
        block.wait("query", 0, turn % 2)
        with when(softmax.is_negative):
            self._negate_queries()
        self._skip(tile, begin, base)
        self._first(tile, cursor, mask, base)
        put(tile, 0, tile[0] + 1)
        with I.While(tile[0] < end):
            cursor.advance()
            self._next(tile, cursor, mask, base)
            put(tile, 0, tile[0] + 1)
        inverse, logarithm = self._last(tile, base)
        self._skip(tile, total, base)
        self.epilogue.store(work, mask, inverse, logarithm)

    def _negate_queries(self) -> None:
        """Turn the signs of the warpgroup's queries, for a negative scale."""
        plan = self.plan
        words = plan.columns.bytes(ROWS) // 4
        first = self.warpgroup * (plan.query_bytes // 4) + T.bitwise_and(self.block.thread, _THREADS - 1)
        for place in range(0, words, _THREADS):
            word = self.block.query_words[first + place]
            put(self.block.query_words, first + place, T.bitwise_xor(word, T.uint32(0x80008000)))
        # Products read shared memory by another way than threads do.
        emit(T.ptx.fence.proxy.async_.shared__cta())
        sync_warpgroup(self.warpgroup)

    def _range(self, work: Work, cursor: StreamCursor, total: Expr) -> tuple[Expr, Expr]:
        """Return the first tile that the warpgroup needs, and the end of those it needs; moves the cursor there."""
        if not self.plan.skips:
            return 0, total
        start, begin, end = work.part(self.warpgroup)
        put(cursor.at, 0, start)
        return register(begin), register(minimum(end, total))

    def _skip(self, tile: Any, end: Expr, base: Expr) -> None:
        """Let tiles pass that this warpgroup does not need. It keeps step with the loads and the turns all the same."""
        if not self.plan.skips:
            return
        block = self.block
        with I.While(tile[0] < end):
            stage, phase = let(block.stage(base + tile[0])), let(block.phase(base + tile[0]))
            for name in ("key", "value"):
                block.wait(name, stage, phase)
            self._wait_turn()
            self._pass_turn()
            for name in ("key_empty", "value_empty"):
                block.arrive(name, stage)
            put(tile, 0, tile[0] + 1)

    def _first(self, tile: Any, cursor: StreamCursor, mask: Mask, base: Expr) -> None:
        """Scores and softmax of the first tile."""
        block, products, softmax = self.block, self.products, self.softmax
        stage = let(block.stage(base + tile[0]))
        block.wait("key", stage, block.phase(base + tile[0]))
        self._wait_turn()
        products.fence()
        products.score(stage)
        products.commit()
        self._pass_turn()
        products.wait(0, products.scores)
        block.arrive("key_empty", stage)
        mask.apply(cursor, tile[0])
        self._weigh()
        softmax.pack()

    def _next(self, tile: Any, cursor: StreamCursor, mask: Mask, base: Expr) -> None:
        """Scores and softmax of a tile, and the weighted sum of the one before."""
        block, products, softmax = self.block, self.products, self.softmax
        stage = let(block.stage(base + tile[0]))
        before = let(block.stage(base + tile[0] - 1))
        block.wait("key", stage, block.phase(base + tile[0]))
        self._wait_turn()
        # Asked while products are under way, and not between the scores and their softmax, which others wait for.
        whole = register(T.Cast("int32", mask.whole(cursor))) != 0 if self.config.threshold else None
        products.pin(products.output)
        products.pin(products.weights)
        products.fence()
        products.score(stage)
        products.commit()
        block.wait("value", before, block.phase(base + tile[0] - 1))
        products.fence()
        products.weigh(before)
        products.commit()
        self._pass_turn()
        products.wait(1, products.scores)
        block.arrive("key_empty", stage)
        mask.apply(cursor, tile[0], whole)
        self._weigh()
        self._anchor()
        products.wait(0, products.output)
        block.arrive("value_empty", before)
        softmax.pack()
        softmax.rescale()

    def _weigh(self) -> None:
        """Turn scores into weights, and find out what the sums so far are to be multiplied by."""
        if isinstance(self.softmax, PatientSoftmax):
            self.softmax.weigh()
        else:
            self.softmax.raise_highest()
            self.softmax.exponentiate()

    def _last(self, tile: Any, base: Expr) -> tuple[Any, Any]:
        """Weighted sum of the last tile."""
        block, products = self.block, self.products
        stage = let(block.stage(base + tile[0] - 1))
        block.wait("value", stage, block.phase(base + tile[0] - 1))
        products.pin(products.output)
        products.pin(products.weights)
        products.fence()
        products.weigh(stage)
        products.commit()
        found = self.softmax.finish()
        products.wait(0, products.output)
        block.arrive("value_empty", stage)
        return found

    def _anchor(self) -> None:
        """Keep the softmax above the wait that follows.

        ptxas 13.0 otherwise moves the wait up over the whole softmax, which then waits for the weighted sum of the
        tile before. A branch ends the block that it moves instructions in; this one is never taken. Its body has
        to be a loop, or it would be predicated instead, and to do no harm: that phase of the barrier is long over.
        """
        if self.config.overlap:
            with when(self.softmax.total[0] + self.softmax.total[1] < T.float32(0)):
                self.block.wait("query", 0, 0)

    def _wait_turn(self) -> None:
        if self.config.pingpong:
            emit(T.ptx.bar.sync(T.Cast("uint32", self.warpgroup + _TURN), T.uint32(2 * _THREADS)))

    def _pass_turn(self) -> None:
        if self.config.pingpong:
            following = (self.warpgroup + 1) % self.config.warpgroups
            emit(T.ptx.bar.arrive(T.Cast("uint32", following + _TURN), T.uint32(2 * _THREADS)))
