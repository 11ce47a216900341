"""The warps that compute: scores and their gradients tile by tile, and sums over what streams by."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import I, T, let, local, maximum, minimum, put, register, when
from na_compiler.schedules.sm90.backward.block import EMPTY, FULL, SweepBlock
from na_compiler.schedules.sm90.backward.products import SweepProducts
from na_compiler.schedules.sm90.backward.results import Results
from na_compiler.schedules.sm90.backward.weights import Weights, Window
from na_compiler.schedules.sm90.rows import Rows

__all__ = ["SweepConsumer"]

Expr = Any


class SweepConsumer:
    """Emits what one warpgroup does."""

    def __init__(self, block: SweepBlock) -> None:
        self.block, self.plan = block, block.plan
        self.config = self.plan.config
        self.warpgroup = let(T.shift_right(block.warp, 2))
        warp = let(T.bitwise_and(block.warp, 3))
        self.products = SweepProducts(block, self.warpgroup)
        self.rows = Rows(self.plan, self.warpgroup, warp, block.lane)
        self.weights = Weights(self.products, self.rows)
        self.results = Results(block, self.products, self.rows)

    def compute(self, work: Any, extra: Expr) -> None:
        """Compute a block's tile; ``extra`` are the tiles of additional keys."""
        block, products = self.block, self.products
        is_window = self.plan.side != "additional"
        window = Window(products, self.rows, work, self._additional) if is_window else None
        self.weights.load(work, window)
        products.start()
        cursor = work.cursor() if is_window else None
        total = let(work.total + extra)
        begin, end = self._range(work, cursor, total)
        tile = local(1, "int32")
        put(tile, 0, 0)
        block.wait("own", 0, 0)
        self._skip(tile, begin)
        with I.While(tile[0] < end):
            self._tile(tile, begin, cursor, window)
            if cursor is not None:
                cursor.advance()
            put(tile, 0, tile[0] + 1)
        products.wait(0, *products.sums)
        if self.plan.skips:
            if self.config.defer:
                self._release(block.stage(tile[0] - 1), self._late)
            self._skip(tile, total)
        self.results.store(work)

    @property
    def _additional(self) -> Expr | None:
        return self.block.arguments.count if self.block.maps.additional else None

    def _range(self, work: Any, cursor: Any, total: Expr) -> tuple[Expr, Expr]:
        """Return the first tile that the warpgroup needs, and the end of those it needs; moves the cursor there."""
        if not self.plan.skips:
            return 0, total
        start, begin, end = work.part(self.warpgroup)
        put(cursor.at, 0, start)
        begin = register(begin)
        # Never less than one tile; see `KeyWork.total`.
        return begin, register(maximum(minimum(end, total), begin + 1))

    def _skip(self, tile: Any, end: Expr) -> None:
        """Let tiles pass that this warpgroup does not need."""
        if not self.plan.skips:
            return
        with I.While(tile[0] < end):
            stage, phase = let(self.block.stage(tile[0])), let(self.block.phase(tile[0]))
            for which in range(2):
                self.block.wait(FULL[which], stage, phase)
            self._release(stage, (0, 1))
            put(tile, 0, tile[0] + 1)

    @property
    def _late(self) -> tuple[int, ...]:
        """What the sums read: the others are done with when the gradients of weights are there."""
        return tuple(sorted(set(self.plan.sums)))

    @property
    def _early(self) -> tuple[int, ...]:
        return tuple(which for which in range(2) if which not in self._late)

    def _release(self, stage: Expr, which: tuple[int, ...]) -> None:
        for one in which:
            self.block.arrive(EMPTY[one], stage)

    def _tile(self, tile: Any, begin: Expr, cursor: Any, window: Window | None) -> None:
        """Weights of a tile, what they add to the gradient of values, and what their slopes add to the others."""
        block, products, plan = self.block, self.products, self.plan
        stage, phase = let(block.stage(tile[0])), let(block.phase(tile[0]))
        self._scores(tile, begin, stage, phase)
        self.weights.exponentiate(stage)
        if window is not None:
            window.find(cursor, tile[0])
            window.clear(products.scores)
        if 1 in plan.sums:
            self._pack(plan.sums.index(1), products.scores)
        self._anchor()
        if plan.needs_gradient:
            products.wait(0, products.slopes)
        else:
            block.wait(FULL[1], stage, phase)
        self._release(stage, self._early)
        if self.config.defer:
            self._slopes(stage, window)
            for result in range(len(plan.sums)):
                products.add(result, stage)
            return
        if 1 in plan.sums:
            products.add(plan.sums.index(1), stage)
            # Or the compiler spreads these products over the arithmetic that follows.
            self._anchor()
        self._slopes(stage, window)
        if 0 in plan.sums:
            products.add(plan.sums.index(0), stage)
        products.wait(0, *products.sums)
        self._release(stage, self._late)

    def _scores(self, tile: Any, begin: Expr, stage: Expr, phase: Expr) -> None:
        """Issue the products that a tile begins with, and wait for the scores."""
        block, products = self.block, self.products
        block.wait(FULL[0], stage, phase)
        products.score(0, stage)
        if self.plan.needs_gradient:
            block.wait(FULL[1], stage, phase)
            products.score(1, stage)
        # Groups end in order: the sums of the tile before have ended too.
        products.wait(int(self.plan.needs_gradient), products.scores, *products.sums)
        if self.config.defer:
            with when(tile[0] > begin):
                self._release(let(block.stage(tile[0] - 1)), self._late)

    def _slopes(self, stage: Expr, window: Window | None) -> None:
        """Make the gradients of scores an operand, where they are needed."""
        if not self.plan.needs_gradient:
            return
        self.weights.differentiate(stage)
        if window is not None:
            window.clear(self.products.slopes)
        self._pack(self.plan.sums.index(0), self.products.slopes)

    def _pack(self, result: int, source: Any) -> None:
        """Round a tile's elements to the operand of a result's sum."""
        for index in range(self.products.elements // 2):
            self.products.pack(self.products.operands[result], index, source[2 * index + 1], source[2 * index])

    def _anchor(self) -> None:
        """End the basic block, so that ptxas cannot move the next wait up over the exponentials.

        Weights are never negative, so the branch is never taken. See `na_compiler.schedules.sm90.consumer`.
        """
        scores = self.products.scores
        with when(scores[0] + scores[self.products.elements - 1] < T.float32(0)):
            self.block.wait("own", 0, 0)
