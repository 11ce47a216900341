"""The warps that compute: scores and their gradients tile by tile, sums over queries, and a part of a sum over keys."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import I, T, emit, let, local, put
from na_compiler.schedules.sm90.backward.block import EMPTY, FULL
from na_compiler.schedules.sm90.backward.consumer import SweepConsumer
from na_compiler.schedules.sm90.backward.fused.block import PART_EMPTY, PART_FULL, FusedBlock
from na_compiler.schedules.sm90.backward.fused.products import FusedProducts
from na_compiler.schedules.sm90.backward.fused.work import FusedWork
from na_compiler.schedules.sm90.backward.results import Results
from na_compiler.schedules.sm90.backward.weights import Weights, Window
from na_compiler.schedules.sm90.plan import ROWS
from na_compiler.schedules.sm90.rows import Rows
from na_compiler.schedules.sm90.store import RowStore

__all__ = ["FusedConsumer"]

Expr = Any
# The named barrier of both warpgroups; those before are one's own.
_BOTH = 3
_THREADS = 128  # of a warpgroup


class FusedConsumer(SweepConsumer):
    """Emits what one warpgroup does.

    Of a tile of queries, in this order::

        S = K Q^T, dP = V dO^T      issued; P while dP is under way
        dV += P^T dO                issued; dS meanwhile, written to shared memory, where both warpgroups meet
        dQ = dS K, dK += dS^T Q     issued; dQ leaves by shared memory while dK is under way
    """

    block: FusedBlock

    def __init__(self, block: FusedBlock) -> None:  # The products are others, so it does not call the other one.
        self.block, self.plan = block, block.plan
        self.config = self.plan.config
        self.warpgroup = let(T.shift_right(block.warp, 2))
        warp = let(T.bitwise_and(block.warp, 3))
        self.products: FusedProducts = FusedProducts(block, self.warpgroup)
        self.rows = Rows(self.plan, self.warpgroup, warp, block.lane)
        self.weights = Weights(self.products, self.rows)
        self.results = Results(block, self.products, self.rows)

    def compute(self, work: FusedWork, extra: Expr) -> None:  # noqa: ARG002
        """Compute a block's tile."""
        block, products = self.block, self.products
        window = Window(products, self.rows, work, None)
        products.start()
        cursor = work.cursor()
        total = let(work.total)
        tile = local(1, "int32")
        put(tile, 0, 0)
        block.wait("own", 0, 0)
        with I.While(tile[0] < total):
            self._tile(tile, 0, cursor, window)
            cursor.advance()
            put(tile, 0, tile[0] + 1)
        # Results take the place of keys, of which the other warpgroup may still be making a part.
        self._meet()
        self.results.store(work)

    def _tile(self, tile: Any, begin: Expr, cursor: Any, window: Window | None) -> None:
        """All five products of a tile."""
        block, products = self.block, self.products
        assert window is not None
        stage, phase = let(block.stage(tile[0])), let(block.phase(tile[0]))
        self._scores(tile, begin, stage, phase)
        self.weights.exponentiate(stage)
        window.find(cursor, tile[0])
        window.clear(products.scores)
        self._pack(1, products.scores)
        self._anchor()
        products.wait(0, products.slopes)
        products.add(1, stage)
        # Or the compiler spreads these products over the arithmetic that follows.
        self._anchor()
        self._slopes(stage, window)
        slopes = let(tile[0] % self.plan.fused.slopes)
        self._share(slopes)
        self._meet()
        products.partial(slopes)
        products.add(0, stage)
        products.wait(1, products.part, products.sums[1])
        block.arrive(EMPTY[1], stage)
        self._hand_over(tile)
        products.wait(0, products.sums[0])
        block.arrive(EMPTY[0], stage)

    def _scores(self, tile: Any, begin: Expr, stage: Expr, phase: Expr) -> None:  # noqa: ARG002
        block, products = self.block, self.products
        block.wait(FULL[0], stage, phase)
        products.score(0, stage)
        block.wait(FULL[1], stage, phase)
        products.score(1, stage)
        products.wait(1, products.scores)

    def _meet(self) -> None:
        """Wait for the other warpgroup."""
        emit(T.ptx.bar.sync(T.uint32(_BOTH), T.uint32(_THREADS * self.config.warpgroups)))

    def _share(self, stage: Expr) -> None:
        """Put the gradients of scores where the other warpgroup reads them as well."""
        plan = self.plan
        first = (stage * plan.config.warpgroups + self.warpgroup) * (plan.slope_bytes // 2)
        store = RowStore(self.block.slopes, let(first), plan.slope_columns, self.rows)
        store.put(self.products.operands[0])
        # Products read shared memory by another way than threads write it.
        emit(T.ptx.fence.proxy.async_.shared__cta())

    def _hand_over(self, tile: Any) -> None:
        """Write the part of the gradients of queries where a copy reads it: accumulators of a thread four by four."""
        block, plan, products = self.block, self.plan, self.products
        parts = plan.fused.parts
        stage, phase = let(tile[0] % parts), let((tile[0] // parts) % 2)
        block.wait(PART_EMPTY, stage, phase ^ 1)
        quads = plan.part_columns // 8
        thread = T.bitwise_and(block.thread, _THREADS - 1)
        first = let(stage * (plan.part_bytes // 4) + self.warpgroup * (ROWS * plan.part_columns) + thread * 4)
        for quad in range(quads):
            place = block.parts.ptr_to([first + quad * (4 * _THREADS)])
            emit(T.ptx["st.shared.v4.f32"](place, *(products.part[4 * quad + i] for i in range(4))))
        emit(T.ptx.fence.proxy.async_.shared__cta())
        emit(T.cuda.warp_sync())
        block.arrive(PART_FULL, stage)
