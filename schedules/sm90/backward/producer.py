"""The warp that loads: what the block owns once, then tile by tile what streams by, as stages become free."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import I, T, emit, let, local, put
from na_compiler.schedules.sm90.backward.block import EMPTY, FULL, SweepBlock
from na_compiler.schedules.sm90.backward.plan import PLANES
from na_compiler.schedules.sm90.maps import TensorMap
from na_compiler.schedules.sm90.plan import ROWS

__all__ = ["SweepProducer"]

Expr = Any
# Boxes of columns whose loads are written out. More are loaded by a loop of the device: the compiler computes ahead
# what all of them need, and that is more than fits the registers of a thread that loads.
_FEW = 2


class SweepProducer:
    """Emits what one thread does to load the tiles of the block's work."""

    def __init__(self, block: SweepBlock) -> None:
        self.block, self.plan = block, block.plan

    def load(self, work: Any, extra: Expr) -> None:
        """Load all of a block's tiles; ``extra`` are those of additional keys."""
        plan, block = self.plan, self.block
        self._own(work)
        total = let(work.total + extra)
        cursor = work.cursor()
        tile = local(1, "int32")
        put(tile, 0, 0)
        with I.While(tile[0] < total):
            stage, phase = let(block.stage(tile[0])), let(block.phase(tile[0]))
            for which in range(2):
                block.wait(EMPTY[which], stage, phase ^ 1)
                planes = PLANES * plan.streamed * 4 if which == 0 and not plan.of_queries else 0
                block.expect(FULL[which], stage, plan.stream_bytes(which) + planes)
                if block.maps.additional:
                    with I.If(tile[0] < work.total):
                        with I.Then():
                            self._tile(which, stage, block.maps.stream[which], cursor.tokens(), cursor.head, work)
                        with I.Else():
                            tokens = [(tile[0] - work.total) * plan.streamed]
                            self._tile(which, stage, block.maps.additional[which], tokens, cursor.head, work)
                else:
                    self._tile(which, stage, block.maps.stream[which], cursor.tokens(), cursor.head, work)
                if planes:
                    self._statistics(stage, cursor, work)
            cursor.advance()
            put(tile, 0, tile[0] + 1)

    def _own(self, work: Any) -> None:
        plan, block = self.plan, self.block
        warpgroups = plan.config.warpgroups
        block.expect("own", 0, warpgroups * sum(plan.columns[i].bytes(ROWS) for i in plan.owned))
        for which in plan.owned:
            for warpgroup in range(warpgroups):
                first = work.tokens([work.first[0] + warpgroup * plan.own_box[0], *work.first[1:]])
                place = warpgroup * plan.own_bytes + plan.own_offset(which)
                self._boxes(block.own, place, ROWS, block.maps.own[which], work.batch, first, work.head, "own", 0)

    def _tile(self, which: int, stage: Expr, source: TensorMap, tokens: list[Expr], head: Expr, work: Any) -> None:
        plan, block = self.plan, self.block
        place = stage * plan.stream_bytes(which)
        self._boxes(block.stream[which], place, plan.streamed, source, work.batch, tokens, head, FULL[which], stage)

    def _boxes(
        self,
        target: Any,
        place: Expr,
        rows: int,
        source: TensorMap,
        batch: Expr,
        tokens: list[Expr],
        head: Expr,
        barrier: str,
        stage: Expr,
    ) -> None:
        def load(box: Expr) -> None:
            for number in range(source.pieces):
                offset = box * source.columns.box_bytes(rows) + number * source.piece_bytes
                emit(
                    source.load(
                        target.ptr_to([(place + offset) // 2]),
                        T.address_of(source.handle),
                        *source.at(batch, source.piece(tokens, number), head, box),
                        self.block.barrier(barrier, stage),
                    )
                )

        boxes = source.columns.boxes
        if boxes <= _FEW:
            for box in range(boxes):
                load(box)
            return
        box = local(1, "int32")
        put(box, 0, 0)
        with I.While(box[0] < boxes):
            load(let(box[0]))
            put(box, 0, box[0] + 1)

    def _statistics(self, stage: Expr, cursor: Any, work: Any) -> None:
        block = self.block
        source = block.maps.statistics
        assert source is not None
        for plane in range(PLANES):
            emit(
                source.load(
                    block.statistics.ptr_to([block.plane(stage, plane)]),
                    T.address_of(source.handle),
                    *source.at(work.batch, plane, cursor.head, cursor.group, list(cursor)),
                    block.barrier(FULL[0], stage),
                )
            )
