"""The warp that loads: queries once, keys and values tile by tile as stages become free."""

from __future__ import annotations

from typing import Any

from na_compiler.schedules.shared.trace import I, T, emit, let, local, put, when
from na_compiler.schedules.shared.work import StreamCursor, Work
from na_compiler.schedules.sm90.block import Block

__all__ = ["Producer"]

Expr = Any


class Producer:
    """Emits what one thread does to load the tiles of the block's work."""

    def __init__(self, block: Block) -> None:
        self.block, self.plan = block, block.plan

    def load(self, work: Work, base: Expr, turn: Expr, extra: Expr) -> None:
        """Load one tile of queries, and the keys and values for it.

        Parameters
        ----------
        work
            The tile.
        base
            Tiles of keys loaded before.
        turn
            Tiles of queries loaded before.
        extra
            Tiles of additional keys.
        """
        total = let(work.tiles + extra)
        keys, values = StreamCursor(work), StreamCursor(work)
        tile = local(1, "int32")
        put(tile, 0, 0)
        if self.plan.config.persistent:
            # The first keys come while the block still works on the queries before.
            self._tile("key", T.int32(0), keys, work, base)
            self.block.wait("query_empty", 0, (turn % 2) ^ 1)
            self._queries(work)
        else:
            self._queries(work)
            self._tile("key", T.int32(0), keys, work, base)
        with I.While(tile[0] < total):
            with when(tile[0] + 1 < total):
                keys.advance()
                self._tile("key", tile[0] + 1, keys, work, base)
            self._tile("value", tile[0], values, work, base)
            values.advance()
            put(tile, 0, tile[0] + 1)

    def _queries(self, work: Work) -> None:
        plan, block = self.plan, self.block
        queries = block.maps["query"]
        warpgroups = plan.config.warpgroups
        block.expect("query", 0, warpgroups * plan.columns.bytes(64))
        for warpgroup in range(warpgroups):
            first = [work.first[0] + warpgroup * plan.own_box[0], *work.first[1:]]
            for box in range(plan.columns.boxes):
                place = warpgroup * plan.query_bytes + box * plan.columns.box_bytes(64)
                self._box(block.queries, place, queries, work, work.tokens(first), work.head, box, "query", 0)

    def _tile(self, name: str, tile: Expr, cursor: StreamCursor, work: Work, base: Expr) -> None:
        """Load a tile of keys or of values into its stage, as soon as that is free."""
        block, plan = self.block, self.plan
        stage, phase = let(block.stage(base + tile)), let(block.phase(base + tile))
        block.wait(f"{name}_empty", stage, phase ^ 1)
        block.expect(name, stage, plan.key_bytes if name == "key" else plan.value_bytes)
        if not plan.problem.additional_kv:
            self._boxes(name, name, stage, work, work.tokens(list(cursor)))
            return
        with I.If(tile < work.tiles):
            with I.Then():
                self._boxes(name, name, stage, work, work.tokens(list(cursor)))
            with I.Else():
                additional = "additional_keys" if name == "key" else "additional_values"
                self._boxes(name, additional, stage, work, [(tile - work.tiles) * plan.streamed])

    def _boxes(self, name: str, source: str, stage: Expr, work: Work, tokens: list[Expr]) -> None:
        block, plan = self.block, self.plan
        columns, target = (plan.columns, block.keys) if name == "key" else (plan.columns_v, block.values)
        for box in range(columns.boxes):
            place = stage * columns.bytes(plan.streamed) + box * columns.box_bytes(plan.streamed)
            self._box(target, place, block.maps[source], work, tokens, work.stream_head, box, name, stage)

    def _box(
        self,
        target: Any,
        place: Expr,
        source: Any,
        work: Work,
        tokens: list[Expr],
        head: Expr,
        box: int,
        barrier: str,
        stage: Expr,
    ) -> None:
        for number in range(source.pieces):
            coordinates = source.at(work.batch, source.piece(tokens, number), head, box)
            emit(
                source.load(
                    target.ptr_to([(place + number * source.piece_bytes) // 2]),
                    T.address_of(source.handle),
                    *coordinates,
                    self.block.barrier(barrier, stage),
                )
            )
